"""Weights that are handed over are written and read by all data-parallel ranks, a part each, and nothing is forked."""

from __future__ import annotations

import os
from pathlib import Path

import gloo_ranks as gr
import made_states as ms
import pytest
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from launcher.configs import Parallelism
from launcher.workers.megatron import checkpoint
from launcher.workers.megatron.model import sharding_metadata


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


def save_without_padding(folder: Path, case: ms.Case, parallelism: Parallelism) -> None:
    """As others write it: the vocabulary's own rows alone."""
    module = ms.build(case, parallelism, seed=7).module
    sharded = module.sharded_state_dict(metadata=sharding_metadata())
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        rows = sharded[key].data.detach()[: case.shape.vocab_size].clone()
        sharded[key] = ShardedTensor.from_rank_offsets(key, rows)
    checkpoint._write(sharded, folder / "port" / "iter_0000005")
    (folder / "port" / checkpoint.TRACKER).write_text("5")


@pytest.mark.parametrize("sizes", [{}, {"tp": 2}])
def test_rows_that_pad_the_vocabulary_are_zeros_on_every_rank(tmp_path: Path, sizes: dict[str, int]) -> None:
    case, layout = ms.Case("Nemotron-H-8B-Base-8K"), gr.layout(**sizes)
    assert case.shape.padded_vocab_size > case.shape.vocab_size
    gr.results(gr.on_ranks(1, save_without_padding, tmp_path, case, gr.layout()))
    assert gr.results(gr.on_ranks(4, load, tmp_path, case, layout, parallelism=layout)) == [0] * 4


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
