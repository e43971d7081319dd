"""The same model, data and seed on two processes, by tensor, pipeline, context and data parallelism, as on one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import train_stages as ts

from launcher.workers.megatron.parallel import process_groups, sum_over_ranks

TP, PP, CP = ({f"{kind}_parallel_size": 2} for kind in ("tensor_model", "pipeline_model", "context"))
#: Losses differ in the last bit or two of fp32 (2e-7 seen); the norm of the gradient sums more numbers (3e-6 seen).
LOSS, NORM, WEIGHT = 2e-6, 2e-5, 1e-4


def test_losses_and_weights_are_the_same_on_every_layout(root: Path, reference: Callable[..., ts.TrainStage]) -> None:
    """PP wants a layer count that it divides, so the models of 3 layers have 4 here, one of them with tied ends."""
    cases: list[tuple[str, dict[str, Any], dict[str, dict[str, Any]]]] = [
        ("llama-tiny", {"num_hidden_layers": 4, "tie_word_embeddings": True}, {"tp": TP, "pp": PP, "dp": {}}),
        ("granite-tiny", {"num_hidden_layers": 4}, {"tp": {**TP, "sequence_parallel": True}, "pp": PP, "cp": CP}),
        ("nemotron-h-tiny", {}, {"tp": TP, "pp": PP, "cp": CP, "dp": {}}),
    ]
    for name, changes, layouts in cases:
        one = ts.make_stage(root, f"one-{name}", model=ts.model(name, **changes), train_iters=6)
        assert ts.run(one) == [0], ts.log(one)
        for layout, parallelism in layouts.items():
            both = ts.make_stage(
                root,
                f"{layout}-{name}",
                model=ts.model(name, **changes),
                train_iters=6,
                ranks=2,
                parallelism=parallelism,
            )
            assert ts.run(both) == [0, 0], ts.log(both)
            same_training(both, one)
            assert both.record()["parameters"] == one.record()["parameters"]


def same_training(stage: ts.TrainStage, one: ts.TrainStage) -> None:
    assert stage.losses() == pytest.approx(one.losses(), rel=LOSS), stage.spec.stage
    norms = [[row["grad_norm"] for row in s.metrics()] for s in (stage, one)]
    assert norms[0] == pytest.approx(norms[1], rel=NORM), stage.spec.stage
    with process_groups():
        mine, theirs = ts.weights(stage.checkpoint), ts.weights(one.checkpoint)
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in theirs.items()}
    for name, weight in mine.items():
        torch.testing.assert_close(weight, theirs[name], rtol=WEIGHT, atol=WEIGHT)


@pytest.mark.parametrize(
    ("ranks", "layout", "message"),
    [
        (3, {"tensor_model_parallel_size": 3}, "tensor_model_parallel_size: 3 does not divide the model's 4 attention"),
        (2, PP, "pipeline_model_parallel_size: 2 does not divide the model's 3 layers"),
        (3, {}, "global_batch_size: 4 is not a multiple of micro_batch_size 2 x 3"),
    ],
)
def test_a_layout_that_cannot_work_is_refused_with_the_reason(
    root: Path, ranks: int, layout: dict[str, int], message: str
) -> None:
    stage = ts.make_stage(root, f"refused-{ranks}-{len(layout)}", ranks=ranks, parallelism=layout)
    codes = ts.run(stage)
    assert codes[0] == 2
    assert stage.ending()["class"] == "user-error"
    assert message in stage.ending()["message"]
    assert ts.log(stage).strip() == stage.ending()["message"]


def test_sums_of_one_rank_are_its_own() -> None:
    with process_groups():
        assert sum_over_ranks([1.5, 2.0]) == [1.5, 2.0]
    with process_groups():  # a process may come and go again
        assert torch.distributed.get_world_size() == 1
    assert not torch.distributed.is_initialized()
