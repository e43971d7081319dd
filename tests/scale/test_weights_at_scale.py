"""Weights that are handed over are written and read by all data-parallel ranks, a part each, and nothing is forked."""

from __future__ import annotations

import os
from pathlib import Path

import gloo_ranks as gr
import made_states as ms
import pytest

from launcher.configs import Parallelism
from launcher.workers.megatron import checkpoint


def save(folder: Path, case: ms.Case, parallelism: Parallelism) -> None:
    os.fork = None  # type: ignore[assignment]
    trainer = ms.build(case, parallelism, seed=7)
    checkpoint.save_weights(folder / "port", 5, trainer.module)


def load(folder: Path, case: ms.Case, parallelism: Parallelism) -> int:
    """Weights that are not those that were saved."""
    wanted = ms.build(case, parallelism, seed=7).module
    found = ms.build(case, parallelism, seed=8).module
    checkpoint.load_weights(folder / "port", found)
    pairs = zip(wanted.parameters(), found.parameters(), strict=True)
    return sum(int((a != b).sum()) for a, b in pairs)


@pytest.mark.parametrize(
    ("case", "before", "after"),
    [
        (ms.Case("granite-4.0-h-micro-base"), (4, {}), (3, {})),
        (ms.Case("nemotron-h-tiny"), (4, {"tp": 2}), (1, {})),
        (ms.Case("llama-tiny", precision="fp32"), (1, {}), (4, {"tp": 2})),
    ],
)
def test_every_rank_writes_and_reads_its_share(
    tmp_path: Path, case: ms.Case, before: tuple[int, dict[str, int]], after: tuple[int, dict[str, int]]
) -> None:
    (ranks, one), (other_ranks, other) = before, after
    gr.results(gr.on_ranks(ranks, save, tmp_path, case, gr.layout(**one), parallelism=gr.layout(**one)))
    written = [sum(p.stat().st_size for p in tmp_path.glob(f"port/*/__{rank}_*")) for rank in range(ranks)]
    assert min(written) > 0.4 * max(written), written
    wrong = gr.results(
        gr.on_ranks(other_ranks, load, tmp_path, case, gr.layout(**other), parallelism=gr.layout(**other))
    )
    assert wrong == [0] * other_ranks
