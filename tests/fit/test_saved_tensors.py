"""Activation bytes against the tensors that torch really keeps for backward, in tiny layers on a CPU.

The operators are those that keep as little as a GPU's fused kernels: scaled_dot_product_attention, and a gated MLP
that keeps its first product alone. Mamba-2's fused kernel has no CPU form, so its formula is held by the published
peaks of hybrids in test_fit_memory.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from launcher.fit.layers import Architecture, layer_activations

TOKENS = 192


class Gate(torch.autograd.Function):
    """SwiGLU that keeps its input alone, as a fused kernel does."""

    @staticmethod
    def forward(ctx: Any, both: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, -1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (both,) = ctx.saved_tensors
        return torch.cat([gradient, gradient], -1) * both


def layer(a: Architecture, x: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """One pre-norm attention + MLP layer."""
    rows = x.shape[1]
    y = F.layer_norm(x, (a.hidden,), weights["norm1"])
    q, k, v = (F.linear(y, weights[n]).view(1, rows, -1, a.head_dim).transpose(1, 2) for n in ("q", "k", "v"))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    x = x + F.linear(mixed.transpose(1, 2).reshape(1, rows, -1), weights["out"])
    first = F.linear(F.layer_norm(x, (a.hidden,), weights["norm2"]), weights["up"])
    return x + F.linear(Gate.apply(first) if a.gated else F.gelu(first), weights["down"])


def kept_bytes(a: Architecture) -> float:
    """Bytes a token of all that autograd keeps for one layer, each storage once, weights left out."""
    width, keys = a.heads * a.head_dim, a.groups * a.head_dim
    shapes = {
        "norm1": (a.hidden,), "norm2": (a.hidden,), "q": (width, a.hidden), "k": (keys, a.hidden),
        "v": (keys, a.hidden), "out": (a.hidden, width), "up": (a.ffn * (2 if a.gated else 1), a.hidden),
        "down": (a.hidden, a.ffn),
    }  # fmt: skip
    weights = {n: torch.nn.Parameter(torch.randn(s, dtype=torch.bfloat16) * 0.02) for n, s in shapes.items()}
    own = {w.untyped_storage().data_ptr() for w in weights.values()}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(1, TOKENS, a.hidden, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(a, x * 1, weights)
        assert out.requires_grad  # and stays alive until the count is read
        return sum(seen.values()) / TOKENS


@pytest.mark.parametrize(
    ("gated", "hidden", "heads", "groups", "head_dim", "ffn"),
    [(True, 256, 8, 2, 32, 640), (False, 256, 8, 2, 32, 640), (True, 192, 4, 4, 64, 512), (True, 320, 8, 1, 32, 960)],
)
def test_kept_bytes_are_those_that_autograd_keeps(
    gated: bool, hidden: int, heads: int, groups: int, head_dim: int, ffn: int
) -> None:
    torch.manual_seed(0)
    a = Architecture(
        hidden=hidden, pattern="*-", unit=2, heads=heads, groups=groups, head_dim=head_dim, ffn=ffn, vocab=512,
        padded_vocab=512, gated=gated,
    )  # fmt: skip
    ours = sum(layer_activations(a, letter) for letter in a.pattern)
    assert ours == pytest.approx(kept_bytes(a), rel=0.02)
