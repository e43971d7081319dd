"""The reference kernels against the recurrence and convolution written out step by step, in double precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from launcher.workers.megatron import mamba_reference as reference


def inputs(
    length: int, batch: int = 2, heads: int = 4, groups: int = 2, head: int = 3, state: int = 5
) -> dict[str, Tensor]:
    """x, dt, A, B, C of a scan, in double precision, ready for gradients."""
    torch.manual_seed(length)
    values = {
        "x": torch.randn(batch, length, heads, head, dtype=torch.float64),
        "dt": torch.rand(batch, length, heads, dtype=torch.float64) * 0.5 + 0.01,
        "A": -torch.rand(heads, dtype=torch.float64) * 3 - 0.1,
        "B": torch.randn(batch, length, groups, state, dtype=torch.float64),
        "C": torch.randn(batch, length, groups, state, dtype=torch.float64),
    }
    return {name: value.requires_grad_() for name, value in values.items()}


def step_by_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """state' = exp(dt A) state + dt x B, y = state' C, one position after the other."""
    heads = x.shape[2]
    B, C = (t.repeat_interleave(heads // t.shape[2], 2) for t in (B, C))
    state = torch.zeros(x.shape[0], heads, x.shape[3], B.shape[-1], dtype=x.dtype)
    out = []
    for i in range(x.shape[1]):
        decay = (dt[:, i] * A).exp()[..., None, None]
        state = decay * state + (dt[:, i, :, None] * x[:, i])[..., None] * B[:, i, :, None, :]
        out.append((state * C[:, i, :, None, :]).sum(-1))
    return torch.stack(out, 1)


@pytest.mark.parametrize(
    ("length", "chunk"), [(1, 4), (3, 4), (4, 4), (7, 4), (8, 4), (13, 4), (13, 5), (13, 1), (9, 64)]
)
def test_the_scan_is_the_recurrence_with_its_gradients(length: int, chunk: int) -> None:
    values = inputs(length)
    y, wanted = reference.chunk_scan(**values, chunk_size=chunk), step_by_step(**values)
    torch.testing.assert_close(y, wanted, rtol=1e-11, atol=1e-12)
    weight = torch.randn_like(wanted)
    mine = torch.autograd.grad((y * weight).sum(), list(values.values()))
    theirs = torch.autograd.grad((wanted * weight).sum(), list(values.values()))
    for name, a, b in zip(values, mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=name)


def test_gradients_of_the_scan_by_differences() -> None:
    values = inputs(5, batch=1, heads=2, groups=1, head=2, state=2)
    assert torch.autograd.gradcheck(lambda *v: reference.chunk_scan(*v, chunk_size=2), tuple(values.values()))


def test_strong_decay_does_not_overflow() -> None:
    values = {name: value.detach() for name, value in inputs(12).items()}
    values["A"] = values["A"] * 1000  # exp(dt A) underflows; its inverse would overflow
    y = reference.chunk_scan(**values, chunk_size=4)
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y, step_by_step(**values), rtol=1e-11, atol=1e-12)


def test_the_convolution_sees_the_past_alone() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, 6), torch.randn(3, 4), torch.randn(3)
    padded = F.pad(x, (3, 0))
    wanted = torch.stack([(padded[..., i : i + 4] * weight).sum(-1) + bias for i in range(6)], -1)
    torch.testing.assert_close(reference.causal_conv1d_fn(x, weight, bias), wanted)
    torch.testing.assert_close(reference.causal_conv1d_fn(x, weight, bias, "silu"), F.silu(wanted))


def test_the_norm_is_over_groups() -> None:
    torch.manual_seed(0)
    norm = reference.RMSNorm(6, eps=1e-3, group_size=3)
    norm.weight.data = torch.randn(6)
    x = torch.randn(2, 6)
    halves = x.view(2, 2, 3)
    wanted = (halves / (halves.square().mean(-1, keepdim=True) + 1e-3).sqrt()).flatten(1) * norm.weight
    torch.testing.assert_close(norm(x), wanted)


def test_the_whole_kernel_in_its_order() -> None:
    """Split z | x B C | dt, convolve, softplus, scan, D, gate: each written out."""
    torch.manual_seed(0)
    heads, head, groups, state, length = 4, 3, 2, 5, 7
    inner, wide = heads * head, heads * head + 2 * groups * state
    packed = torch.randn(2, length, inner + wide + heads)
    weight, bias, dt_bias = torch.randn(wide, 4), torch.randn(wide), torch.randn(heads)
    A, D = -torch.rand(heads), torch.randn(heads)
    y = reference.mamba_split_conv1d_scan_combined(
        packed, weight, bias, dt_bias, A, D, chunk_size=4, headdim=head, ngroups=groups
    )
    z, xbc, dt = packed[..., :inner], packed[..., inner : inner + wide], packed[..., inner + wide :]
    xbc = reference.causal_conv1d_fn(xbc.transpose(1, 2), weight, bias, "silu").transpose(1, 2)
    x = xbc[..., :inner].reshape(2, length, heads, head)
    B = xbc[..., inner : inner + groups * state].reshape(2, length, groups, state)
    C = xbc[..., inner + groups * state :].reshape(2, length, groups, state)
    scanned = step_by_step(x, F.softplus(dt + dt_bias), A, B, C) + D[:, None] * x
    torch.testing.assert_close(y, scanned.reshape(2, length, inner) * F.silu(z), rtol=1e-4, atol=1e-5)
    with pytest.raises(NotImplementedError):
        reference.mamba_split_conv1d_scan_combined(packed, weight, bias, dt_bias, A, D, chunk_size=4)
