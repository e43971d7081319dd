"""The table of scales in docs/training.md is what the formulas give, and they give what they must."""

from __future__ import annotations

from pathlib import Path

import pytest
import scale_table
from real_models import PARAMETERS, REAL

from launcher.fit.layers import architecture_of
from launcher.fit.memory import Layout
from launcher.fit.saving import Saving, saving_of
from launcher.models.families import shape_of

DOCS = Path(__file__).resolve().parents[2] / "docs" / "training.md"


def test_the_documents_table_is_that_of_the_formulas() -> None:
    assert scale_table.table() in DOCS.read_text(), "python tests/scale/scale_table.py prints it anew"


@pytest.mark.parametrize("name", REAL)
def test_bytes_on_disk_are_of_the_model_alone_and_those_of_a_rank_shrink_with_ranks(name: str) -> None:
    a = architecture_of(shape_of(REAL[name]))
    tp = 4 if a.mamba_groups in (0, 8) else 1
    found = [saving_of(a, Layout(gpus=gpus, tp=tp)) for gpus in (64, 128, 256, 512, 1024)]
    assert len({saving.total_bytes for saving in found}) == 1
    assert found[0].total_bytes == pytest.approx(12 * PARAMETERS[name], rel=2e-3)
    shares = [saving.rank_bytes for saving in found]
    assert shares == [pytest.approx(shares[0] / 2**i) for i in range(5)]
    assert found[-1].index_bytes < 5e6 and found[-1].files == 1026
    assert saving_of(a, Layout(gpus=64, tp=tp), trainable="attention").total_bytes < 0.5 * found[0].total_bytes


def test_time_and_bandwidth_of_a_save_are_each_others_inverse() -> None:
    saving = Saving(total_bytes=96e9, rank_bytes=1.5e9, host_bytes=12e9, index_bytes=1e6, files=66)
    assert saving.seconds(saving.bandwidth(300.0)) == pytest.approx(300.0)
    assert saving.bandwidth(0.1) == float("inf"), "less than the copy off the GPU takes"
