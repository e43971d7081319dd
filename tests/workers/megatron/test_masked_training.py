"""Training on masked and packed documents: the same losses on every layout, resumed as if unbroken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import train_stages as ts
from test_loop import same_run
from test_parallel import CP, PP, TP, same_training

PACKED: dict[str, Any] = {
    "document_masking": True,
    "packing": "best-fit",
    "seq_length": 64,
    "data": {"prepare/one": 2.0, "prepare/two": 1.0},
    "train_iters": 4,
    "validation": ["prepare/two"],
    "eval_interval": 2,
    "eval_iters": 1,
    "adam_eps": 1e-5,  # a gradient that is all rounding would else move its weight as far as any
}


def test_losses_are_the_same_on_every_layout(root: Path) -> None:
    """Micro-batches of all of them count different tokens, and one rank has more padding than another."""
    tp_sp = {**TP, "sequence_parallel": True}
    cases: list[tuple[str, bool, dict[str, Any], dict[str, dict[str, Any]]]] = [
        ("llama-tiny", True, {"num_hidden_layers": 4}, {"tp": tp_sp, "pp": PP, "dp": {}, "cp": CP}),
        ("nemotron-h-tiny", True, {}, {"tp": TP, "dp": {}}),
        ("nemotron-h-tiny", False, {}, {"cp": CP}),
    ]
    for model, masking, changes, layouts in cases:
        name = f"{model}-{masking}"
        settings = {**PACKED, "document_masking": masking, "model": ts.model(model, **changes)}
        one = ts.make_stage(root, f"packed-one-{name}", **settings)
        assert ts.run(one) == [0], ts.log(one)
        assert "padding" in ts.log(one)
        assert all(0 < source["padding"] < 0.2 for source in one.record()["data"])
        for layout, parallelism in layouts.items():
            rows = 1 if layout == "dp" else 2  # sequences of one micro-batch, which masking lays end to end
            both = ts.make_stage(
                root, f"packed-{layout}-{name}", **settings, ranks=2, parallelism=parallelism, micro_batch_size=rows
            )
            assert ts.run(both) == [0, 0], ts.log(both)
            same_training(both, one)
            assert held_out(both) == pytest.approx(held_out(one), rel=2e-6)
            flops = [[row["tflops_per_rank"] * row["seconds"] for row in s.metrics()] for s in (both, one)]
            assert [2 * f for f in flops[0]] == pytest.approx(flops[1], rel=1e-9)


def held_out(stage: ts.TrainStage) -> list[float]:
    return [row["validation/prepare/two"] for row in stage.metrics() if "validation/prepare/two" in row]


def test_masking_without_packing_changes_what_is_learnt_and_goes_on_as_if_unbroken(root: Path) -> None:
    plain = ts.make_stage(root, "unmasked", seq_length=64, train_iters=4)
    masked, stopped = (
        ts.make_stage(root, name, seq_length=64, train_iters=4, document_masking=True)
        for name in ("masked", "masked-stopped")
    )
    assert ts.run(plain) == [0] == ts.run(masked), ts.log(masked)
    assert ts.run(stopped, ts.signal_at(1)) == [0] == ts.run(stopped, attempt=1), ts.log(stopped, 1)
    same_run(stopped, masked)
    assert masked.losses()[-1] != pytest.approx(plain.losses()[-1], rel=1e-3)
    work = [s.metrics()[0]["tflops_per_rank"] * s.metrics()[0]["seconds"] for s in (masked, plain)]
    assert work[0] < work[1], "documents by themselves are less work"
