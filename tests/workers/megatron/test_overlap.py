"""Data-parallel ranks that exchange gradients and weights beside the computation train as those that do it after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import train_stages as ts
from tiny_checkpoints import CONFIGS

from launcher.workers.megatron.parallel import process_groups

#: Every parameter its own bucket: whatever is read before its bucket has come is old, and shows.
EACH = ts.exchange(bucket_size=1)
AFTER = ts.exchange(overlap=False)


def bits(stage: ts.TrainStage) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Figures of all steps that do not depend on the clock, and the finished weights."""
    kept = ("iteration", "loss", "lr", "grad_norm", "validation/prepare/two")
    with process_groups():
        weights = ts.weights(stage.checkpoint)
    return [{k: row[k] for k in kept if k in row} for row in stage.metrics()], weights


def same_bits(stage: ts.TrainStage, other: ts.TrainStage) -> None:
    (figures, weights), (wanted_figures, wanted) = bits(stage), bits(other)
    assert figures == wanted_figures
    assert weights.keys() == wanted.keys()
    assert not [name for name in wanted if not torch.equal(weights[name], wanted[name])]


def make(root: Path, name: str, model: str, **changes: Any) -> ts.TrainStage:
    often = {"train_iters": 6, "save_interval": 2, "eval_interval": 3, "eval_iters": 1}
    return ts.make_stage(root, name, model=ts.model(model), **{"ranks": 2, **often, **changes})


@pytest.mark.parametrize(
    ("model", "precision", "validation"),
    [("llama-tiny", "fp32", []), ("nemotron-h-tiny", "bf16", ["prepare/two"])],  # an evaluation gathers weights too
)
def test_steps_evaluations_checkpoints_and_the_artifact_are_those_of_exchange_after(
    root: Path, model: str, precision: str, validation: list[str]
) -> None:
    settings = {"precision": precision, "validation": validation}
    after = make(root, f"after-{model}", model, **settings)
    assert ts.run(after, AFTER) == [0, 0], ts.log(after)
    beside = make(root, f"beside-{model}", model, **settings)
    assert ts.run(beside, ts.signal_at(3)) == [0, 0], ts.log(beside)
    assert ts.run(beside, attempt=1) == [0, 0], ts.log(beside, 1)
    assert "after step 4" in ts.log(beside, 1)
    same_bits(beside, after)
    # The norm of the gradient is summed in another order over smaller buckets.
    each = make(root, f"each-{model}", model, **settings)
    assert ts.run(each, EACH) == [0, 0], ts.log(each)
    assert each.losses() == pytest.approx(after.losses(), rel=2e-6 if precision == "fp32" else 2e-3)


#: Buckets so small that there are many, and that most end in padding.
MANY = ts.exchange(bucket_size=3000)


def many_and_stopped() -> None:
    MANY()
    ts.signal_at(3)()


#: Granite 4's hybrid in miniature, with the vocabulary of the tests' tokens.
GRANITE_H = {**CONFIGS["granite-4.0-h-micro-base"], "vocab_size": 512, "max_position_embeddings": 256}


@pytest.mark.parametrize(
    ("model", "ranks", "precision"),
    [("llama-tiny", 3, "bf16"), ("nemotron-h-tiny", 2, "bf16"), ("granite-4.0-h-micro", 3, "fp32")],
)
def test_a_run_of_many_padded_buckets_goes_on_as_if_unbroken(
    root: Path, model: str, ranks: int, precision: str
) -> None:
    described = ts.model(model)
    described |= {"config": GRANITE_H} if model == "granite-4.0-h-micro" else {}
    settings: dict[str, Any] = {"model": described, "ranks": ranks, "precision": precision, "train_iters": 6}
    settings |= {"global_batch_size": 6, "micro_batch_size": 1}
    unbroken = ts.make_stage(root, f"padded-{model}", **settings)
    assert ts.run(unbroken, MANY) == [0] * ranks, ts.log(unbroken)
    stopped = ts.make_stage(root, f"padded-stopped-{model}", **settings)
    assert ts.run(stopped, many_and_stopped) == [0] * ranks, ts.log(stopped)
    assert ts.run(stopped, MANY, attempt=1) == [0] * ranks, ts.log(stopped, 1)
    assert "after step 4" in ts.log(stopped, 1)
    same_bits(stopped, unbroken)


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("nemotron-h-tiny", {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "recompute": "full"}),
        ("nemotron-h-tiny", {"pipeline_model_parallel_size": 2}),
    ],
)
def test_two_kinds_of_parallelism_at_once(root: Path, model: str, layout: dict[str, Any]) -> None:
    """Four processes: tensor- and pipeline-parallel ones, and two replicas of a pipeline."""
    name = f"{model}-{'-'.join(layout)}"
    one = make(root, f"one-{name}", model, ranks=1)
    assert ts.run(one) == [0], ts.log(one)
    sequence_parallel = "tensor_model_parallel_size" in layout
    four = make(root, f"four-{name}", model, ranks=4, parallelism={**layout, "sequence_parallel": sequence_parallel})
    assert ts.run(four, EACH) == [0] * 4, ts.log(four)
    assert four.losses() == pytest.approx(one.losses(), rel=2e-6)
