"""Progress goes to disk and comes back to the bit: many padded buckets, odd layouts, and another one than before."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gloo_ranks as gr
import made_states as ms
import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear

from launcher.configs import Parallelism
from launcher.errors import UserError
from launcher.workers.megatron import shares

LLAMA = ms.Case("llama-tiny", changes=(("num_hidden_layers", 4),))
TIED = ms.Case("granite-tiny", changes=(("num_hidden_layers", 4), ("tie_word_embeddings", True)))
NEMOTRON = ms.Case("nemotron-h-tiny")


def save(folder: Path, case: ms.Case, parallelism: Parallelism) -> int:
    """Write a checkpoint whose every number is known; returns the buckets that end in padding."""
    trainer = ms.build(case, parallelism)
    ms.fill(trainer, case, parallelism)
    saver = trainer.saver(folder / "saved")
    saver.start(3)
    saver.finish()
    assert ms.wrong(trainer, case, parallelism)["exp_avg"] == 0
    return ms.padded_buckets(trainer)


def resume(folder: Path, case: ms.Case, parallelism: Parallelism, fused: bool = False) -> dict[str, int]:
    """Read it into a trainer that began with other weights; returns what is wrong."""
    if fused:
        fused_names()
    trainer = ms.build(case, parallelism, seed=99)
    assert trainer.load(folder / "saved" / "iter_0000003") == 3
    return ms.wrong(trainer, case, parallelism)


def fused_names() -> None:
    """From here on layers are named, and their parameters ordered, as Transformer Engine's are."""
    import fused_layers

    fused_layers.install()


def round_trip(
    folder: Path, case: ms.Case, before: tuple[int, dict[str, int]], after: tuple[int, dict[str, int]]
) -> list[int]:
    """Save on one layout and resume on another; returns the padded buckets of each rank that saved."""
    (ranks, one), (other_ranks, other) = before, after
    one_layout, other_layout = gr.layout(**one), gr.layout(**other)
    padded = gr.results(gr.on_ranks(ranks, save, folder, case, one_layout, parallelism=one_layout))
    found = gr.results(gr.on_ranks(other_ranks, resume, folder, case, other_layout, parallelism=other_layout))
    assert [f for f in found if any(f.values())] == []
    return padded


@pytest.mark.parametrize(
    ("case", "ranks"),
    [
        (LLAMA, 3),
        (NEMOTRON, 2),
        (ms.Case("granite-4.0-h-micro-base"), 3),
        (ms.Case("nemotron-h-tiny", precision="fp32", bucket_size=1), 3),
        (ms.Case("llama-tiny", trainable="attention"), 3),
        (ms.Case("nemotron-h-tiny", trainable="attention", precision="fp32"), 2),
        (ms.Case("llama-tiny", bucket_size=None), 1),
    ],
    ids=lambda value: "-".join(map(str, [value.model, value.trainable])) if isinstance(value, ms.Case) else str(value),
)
def test_many_padded_buckets_come_back_to_the_bit(tmp_path: Path, case: ms.Case, ranks: int) -> None:
    padded = round_trip(tmp_path, case, (ranks, {}), (ranks, {}))
    if ranks > 1 and case.trainable == "all":
        assert min(padded) > 2, "the shape of the trouble is many padded buckets"


Layout = dict[str, Any]


@pytest.mark.parametrize(
    ("case", "before", "after"),
    [
        (LLAMA, (3, {}), (2, {})),
        (LLAMA, (2, {"tp": 2}), (2, {"pp": 2})),
        (TIED, (2, {"pp": 2}), (4, {"tp": 2, "pp": 2})),
        (TIED, (2, {"tp": 2}), (2, {})),
        (NEMOTRON, (4, {"tp": 2, "cp": 2}), (3, {})),
        (NEMOTRON, (3, {}), (2, {"tp": 2})),
        (ms.Case("nemotron-h-tiny", trainable="attention"), (2, {"tp": 2}), (3, {})),
        (NEMOTRON, (8, {"tp": 2, "pp": 2, "cp": 2}), (6, {"pp": 2})),
    ],
)
def test_another_layout_finds_its_own(
    tmp_path: Path, case: ms.Case, before: tuple[int, Layout], after: tuple[int, Layout]
) -> None:
    round_trip(tmp_path, case, before, after)


@pytest.mark.parametrize("case", [LLAMA, NEMOTRON], ids=["llama", "nemotron-h"])
def test_layers_of_other_names_find_what_plain_ones_wrote(tmp_path: Path, case: ms.Case) -> None:
    """A run that began without Transformer Engine goes on with it, on another number of ranks."""
    gr.results(gr.on_ranks(2, save, tmp_path, case, gr.layout()))
    two = gr.layout(tp=2)
    found = gr.results(gr.on_ranks(2, resume, tmp_path, case, two, True, parallelism=two))
    assert [f for f in found if any(f.values())] == []


def keep_scales(folder: Path, resumed: bool) -> list[tuple[str, int | None]]:
    """Let linear layers keep something beside their weights, as FP8's do from the first step on."""

    def get(layer: Any) -> torch.Tensor | None:
        return layer.__dict__.get("scales")

    def put(layer: Any, state: torch.Tensor | None) -> None:
        layer.scales = state

    ColumnParallelLinear.get_extra_state, ColumnParallelLinear.set_extra_state = get, put
    trainer = ms.build(NEMOTRON, gr.layout())
    layers = [(n, m) for n, m in trainer.module.named_modules() if isinstance(m, ColumnParallelLinear)]
    if resumed:
        trainer.load(folder / "saved" / "iter_0000003")
        return [(name, layer.__dict__.get("scales", torch.tensor([])).sum().item()) for name, layer in layers]
    ms.fill(trainer, NEMOTRON, gr.layout())
    for number, (_, layer) in enumerate(layers):
        layer.scales = torch.full((number + 1,), number + 2, dtype=torch.uint8)
    saver = trainer.saver(folder / "saved")
    saver.start(3)
    saver.finish()
    return [(name, (number + 1) * (number + 2)) for number, (name, _) in enumerate(layers)]


def test_what_layers_keep_beside_weights_comes_back_on_every_rank(tmp_path: Path) -> None:
    [wanted, _] = gr.results(gr.on_ranks(2, keep_scales, tmp_path, False))
    named = [(name, value) for name, value in wanted if "output_layer" not in name]
    for found in gr.results(gr.on_ranks(3, keep_scales, tmp_path, True)):
        assert [(name, value) for name, value in found if "output_layer" not in name] == named and len(named) > 3


# ---------------------------------------------------------------------------------------------------------- refused


def refused(folder: Path, kind: str) -> str:
    """Make progress that cannot be resumed from, and try."""
    trainer = ms.build(LLAMA, Parallelism())
    path = folder / "saved" / "iter_0000003"
    if kind == "older":
        path.mkdir(parents=True)
        (path / ".metadata").write_bytes(b"what torch_dist keeps there")
    else:
        ms.fill(trainer, LLAMA, Parallelism())
        saver = trainer.saver(folder / "saved")
        saver.start(3)
        saver.finish()
        index = path / shares.INDEX
        if kind == "newer":
            index.write_text(index.read_text().replace('"version": 1', '"version": 99'))
        elif kind == "cut short":
            os.truncate(path / shares.file_name(0), 1000)
        elif kind == "damaged":
            index.write_text(index.read_text()[:100])
        else:
            trainer = ms.build(ms.Case("nemotron-h-tiny"), Parallelism())
    with pytest.raises(UserError) as caught:
        trainer.load(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            "older",
            ["iter_0000003: this progress was written by an older version", "remove ", "starts over from its input"],
        ),
        ("newer", ["iter_0000003: progress of version 99, here is version 1", "remove "]),
        ("cut short", ["00000.bin: ends at 1000 bytes; it was cut short"]),
        ("damaged", ["progress.json: damaged: ", "remove "]),
        ("another model", ["iter_0000003: lacks decoder.layers.0.mixer"]),
    ],
)
def test_progress_that_cannot_be_resumed_from_is_refused_by_name(tmp_path: Path, kind: str, words: list[str]) -> None:
    [said] = gr.results(gr.on_ranks(1, refused, tmp_path, kind))
    assert not [word for word in words if word not in said], said


def resume_cut_short(folder: Path) -> str:
    """What a rank says where the file of another, at its next place, is cut short."""
    trainer = ms.build(LLAMA, Parallelism(), seed=1)
    with pytest.raises(UserError) as caught:
        trainer.load(folder / "saved" / "iter_0000003")
    return str(caught.value)


def test_what_one_rank_cannot_read_ends_all(tmp_path: Path) -> None:
    gr.results(gr.on_ranks(3, save, tmp_path, LLAMA, gr.layout()))
    os.truncate(tmp_path / "saved" / "iter_0000003" / shares.file_name(1), 5000)
    for said in gr.results(gr.on_ranks(3, resume_cut_short, tmp_path)):
        assert "00001.bin: ends at 5000 bytes; it was cut short" in said
