"""`trainable: attention`: what stays to the bit, what moves, and the same on every layout and after a stop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import train_stages as ts
from test_loop import same_run
from test_parallel import PP, TP, same_training

from launcher.configs import Parallelism
from launcher.models.families import shape_of
from launcher.workers.megatron.model import build_model, freeze, initialize
from launcher.workers.megatron.parallel import process_groups

Reference = Callable[..., ts.TrainStage]


def changed(stage: ts.TrainStage, start: ts.TrainStage) -> tuple[set[str], set[str]]:
    """The keys of a checkpoint whose tensors are not those that training began with, and all others."""
    with process_groups():
        after, before = ts.weights(stage.checkpoint), ts.weights(start.checkpoint)
    assert after.keys() == before.keys()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    return moved, set(after) - moved


@pytest.mark.parametrize(("name", "precision"), [("llama-tiny", "fp32"), ("nemotron-h-tiny", "bf16")])
def test_attention_moves_and_nothing_else_and_a_stop_changes_nothing(
    root: Path, reference: Reference, name: str, precision: str
) -> None:
    start = reference(name, precision)
    settings: dict[str, Any] = {"model": ts.model(name), "precision": precision, "trainable": "attention"}
    unbroken = ts.make_stage(root, f"attention-{name}", start=start, **settings)
    assert ts.run(unbroken) == [0], ts.log(unbroken)
    moved, still = changed(unbroken, start)
    assert moved and all(key.endswith(("linear_qkv.weight", "linear_proj.weight")) for key in moved)
    assert not [key for key in still if "self_attention" in key and "norm" not in key]
    assert {key.rpartition(".")[2] for key in still if "linear_qkv" in key} == {"layer_norm_weight"}

    record, shape = unbroken.record(), shape_of(ts.model(name)["config"])
    layers = (shape.hybrid_override_pattern or "*" * shape.num_layers).count("*")
    heads = 2 * shape.num_attention_heads + 2 * shape.num_query_groups
    assert record["trainable_parameters"] == layers * heads * shape.kv_channels * shape.hidden_size
    assert record["parameters"] == start.record()["parameters"] == start.record()["trainable_parameters"]

    stopped = ts.make_stage(root, f"attention-stopped-{name}", start=start, **settings)
    assert ts.run(stopped, ts.signal_at(3)) == [0]
    assert ts.run(stopped, attempt=1) == [0], ts.log(stopped, 1)
    assert "after step 4" in ts.log(stopped, 1)
    same_run(stopped, unbroken)


@pytest.mark.parametrize(
    ("name", "layouts"),
    [
        ("granite-tiny", {"tp": {**TP, "sequence_parallel": True}, "pp": PP}),  # its ends are tied
        ("nemotron-h-tiny", {"tp": TP, "dp": {}}),
    ],
)
def test_losses_and_weights_are_the_same_on_every_layout(
    root: Path, name: str, layouts: dict[str, dict[str, Any]]
) -> None:
    changes = {"num_hidden_layers": 4, "tie_word_embeddings": True} if name == "granite-tiny" else {}
    settings = {"model": ts.model(name, **changes), "train_iters": 5, "trainable": "attention"}
    one = ts.make_stage(root, f"attention-one-{name}", **settings)
    assert ts.run(one) == [0], ts.log(one)
    for layout, parallelism in layouts.items():
        both = ts.make_stage(root, f"attention-{layout}-{name}", ranks=2, parallelism=parallelism, **settings)
        assert ts.run(both) == [0, 0], ts.log(both)
        same_training(both, one)
        assert both.record()["trainable_parameters"] == one.record()["trainable_parameters"]


def build(name: str, trainable: Literal["all", "attention"], **layout: Any) -> Any:
    shape = shape_of(ts.model(name)["config"])
    module = build_model(shape, Parallelism(**layout))
    initialize(module, shape, 0.08, 0)
    freeze(module, trainable)
    return module


def losses(module: Any) -> torch.Tensor:
    tokens = torch.arange(32)[None] * 7 % 500
    found: torch.Tensor = module(tokens, torch.arange(32)[None], None, labels=tokens.roll(-1))
    return found


@pytest.mark.parametrize("name", ["llama-tiny", "granite-tiny", "nemotron-h-tiny"])
def test_gradients_are_those_of_the_whole_model(name: str) -> None:
    with process_groups():
        whole, part = build(name, "all"), build(name, "attention")
        for module in (whole, part):
            losses(module).sum().backward()
    wanted = {n: p.grad for n, p in whole.named_parameters()}
    found = {n: p.grad for n, p in part.named_parameters() if p.grad is not None}
    assert found and not any(gradient is None for gradient in wanted.values())
    assert set(found) == {n for n in wanted if n.endswith(("linear_qkv.weight", "linear_proj.weight"))}
    for key, gradient in found.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, wanted[key], rtol=1e-5, atol=1e-6)


def test_layers_that_are_computed_again_get_their_gradients() -> None:
    """Without a gradient at the embedding's end, megatron-core's checkpointing would pass none to any layer."""
    tokens = torch.arange(16)[None]
    with process_groups():
        for recompute in ("none", "full"):
            module = build("llama-tiny", "attention", recompute=recompute)
            assert losses(module).requires_grad, recompute
            assert module.embedding(tokens, tokens).requires_grad == (recompute == "full")
