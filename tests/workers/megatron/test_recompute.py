"""What backward computes again changes no loss and no gradient, and is computed again indeed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import train_stages as ts
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor

from launcher.configs import Parallelism
from launcher.models.families import shape_of
from launcher.workers.megatron import model as m
from launcher.workers.megatron.parallel import process_groups

PARTS = {"mixer", "self_attention", "mlp"}


def gradients(name: str, recompute: str, trainable: Any = "all") -> tuple[Tensor, dict[str, Tensor], Counter[str]]:
    """Loss, gradients by name, and how often each kind of a layer's parts ran, of a training step."""
    shape = shape_of(ts.model(name)["config"])
    model = m.build_model(shape, Parallelism(recompute=recompute)).train()  # type: ignore[arg-type]
    m.initialize(model, shape, 0.08, 0)
    m.freeze(model, trainable)
    ran: Counter[str] = Counter()
    for path, module in model.named_modules():
        if (part := path.rpartition(".")[2]) in PARTS and not isinstance(module, IdentityOp):
            module.register_forward_hook(lambda *_, part=part: ran.update([part]))
    tokens = torch.arange(64).view(2, 32) * 7 % 500
    loss = model(tokens, torch.arange(32).expand(2, -1), None, labels=tokens).mean()
    torch.autograd.backward(loss)
    found = {path: p.grad for path, p in model.named_parameters() if p.grad is not None}
    assert len(found) == sum(p.requires_grad for p in model.parameters())
    return loss.detach(), found, ran


@pytest.mark.parametrize("name", ["llama-tiny", "granite-tiny", "nemotron-h-tiny"])
def test_nothing_changes_and_the_parts_asked_for_run_twice(name: str) -> None:
    with process_groups():
        loss, wanted, once = gradients(name, "none")
        for recompute in ("mlp", "full"):
            again, found, ran = gradients(name, recompute)
            assert torch.equal(again, loss)
            assert all(torch.equal(found[path], gradient) for path, gradient in wanted.items())
            twice = PARTS if recompute == "full" else {"mlp"}
            assert ran == {part: count * (2 if part in twice else 1) for part, count in once.items()}


def test_a_hybrids_layers_below_all_that_is_trained_run_once() -> None:
    """Layers M-M*M- of which the attention is trained: a mixer and an MLP above it run twice, and it."""
    with process_groups():
        _, wanted, _ = gradients("nemotron-h-tiny", "none", trainable="attention")
        _, found, ran = gradients("nemotron-h-tiny", "full", trainable="attention")
    assert found.keys() == wanted.keys() and len(wanted) == 2
    assert all(torch.equal(found[path], gradient) for path, gradient in wanted.items())
    assert ran == {"mixer": 2 + 2, "mlp": 1 + 2, "self_attention": 2}


def test_layers_of_a_hybrid_run_once_where_there_is_no_backward() -> None:
    shape = shape_of(ts.model("nemotron-h-tiny")["config"])
    with process_groups():
        model = m.build_model(shape, Parallelism(recompute="full"))
        m.initialize(model, shape, 0.08, 0)
        ran: list[int] = []
        model.decoder.layers[0].mixer.register_forward_hook(lambda *_: ran.append(1))
        tokens = torch.arange(32)[None]
        with torch.no_grad():
            assert torch.isfinite(model.eval()(tokens, tokens, None, labels=tokens)).all()
    assert ran == [1]
