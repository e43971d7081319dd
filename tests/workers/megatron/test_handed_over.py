"""What a `train` stage hands over is whole for other programs: Megatron-Bridge's file lies beside the tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import train_stages as ts
import yaml

from launcher.convert.__main__ import run
from launcher.models.torch_dist import checkpoint_dir

Reference = Callable[..., ts.TrainStage]


@pytest.mark.parametrize(("name", "precision"), [("llama-tiny", "fp32"), ("nemotron-h-tiny", "fp32")])
def test_it_has_the_run_config_that_a_conversion_of_it_has(
    name: str, precision: str, reference: Reference, tmp_path: Path
) -> None:
    base = reference(name, precision).checkpoint
    found = yaml.safe_load((checkpoint_dir(base) / "run_config.yaml").read_text())
    run(base, tmp_path / "hf", "hf")
    run(tmp_path / "hf", tmp_path / "again", "megatron")
    wanted = yaml.safe_load((tmp_path / "again" / "release" / "run_config.yaml").read_text())
    assert found["model"] == wanted["model"] and found["model"]["params_dtype"]["_target_"] == "torch.float32"
    assert found["checkpoint"] == wanted["checkpoint"] and found["tokenizer"] == wanted["tokenizer"]


def test_granite_has_none(reference: Reference) -> None:
    assert not list(reference("granite-tiny").checkpoint.rglob("run_config.yaml"))
