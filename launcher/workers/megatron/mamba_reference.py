"""Reference kernels of Mamba-2 in plain torch, under the names that megatron-core's mixer calls.

They compute what mamba_ssm's and causal_conv1d's CUDA kernels compute in training (state-space duality, Dao and Gu
2024, arXiv 2405.21060, section 6: chunks of attention-like products, joined by a recurrence over chunk states), in
fp32 inside, differentiable by autograd. Inference is not there.

Letters in shapes: b batch, l length, h heads, p head size, g groups, n state size, c chunks, q positions in a chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """RMS norm over groups of `group_size` features; the gate is applied before it, by the scan."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size = eps, group_size or hidden_size
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x: ... hidden."""
        groups = x.float().unflatten(-1, (-1, self.group_size))
        normal = F.rms_norm(groups, (self.group_size,), eps=self.eps).flatten(-2)
        return (normal * self.weight.float()).to(x.dtype)


def causal_conv1d_fn(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """Depthwise convolution over the past alone. x: b d l; weight: d width; bias: d; returns b d l."""
    width = weight.shape[-1]
    past = F.pad(x, (width - 1, 0))
    y = F.conv1d(past, weight.unsqueeze(1).to(x.dtype), None if bias is None else bias.to(x.dtype), groups=x.shape[1])
    return F.silu(y) if activation == "silu" else y


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    activation: str = "silu",
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = False,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """Split the projection, convolve x, B and C, scan, add D * x, gate by z.

    zxbcdt: b l (2hp + 2gn + h); A: h, negative; D and dt_bias: h; returns b l hp. `seq_idx`, 1 l, numbers the
    sequences that a row of b = 1 holds one after the other: each starts from nothing.
    """
    if headdim is None:
        raise NotImplementedError("a D for each feature is not there in the reference kernel")
    if seq_idx is not None:
        lengths = seq_idx[0].unique_consecutive(return_counts=True)[1].tolist()
        shared = conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, activation, headdim, ngroups, norm_before_gate
        return torch.cat([mamba_split_conv1d_scan_combined(part, *shared) for part in zxbcdt.split(lengths, 1)], 1)
    heads = D.shape[0]
    inner = heads * headdim
    state = (zxbcdt.shape[-1] - 2 * inner - heads) // 2
    z, xbc, dt = zxbcdt.split([inner, inner + 2 * state, heads], -1)
    xbc = causal_conv1d_fn(xbc.transpose(1, 2), conv1d_weight, conv1d_bias, activation).transpose(1, 2).float()
    x, B, C = xbc.split([inner, state, state], -1)
    x = x.unflatten(-1, (heads, headdim))
    dt = F.softplus(dt.float() + dt_bias.float())
    y = chunk_scan(x, dt, A.float(), B.unflatten(-1, (ngroups, -1)), C.unflatten(-1, (ngroups, -1)), chunk_size)
    y = y + x * D.float()[:, None]
    return (y.flatten(-2) * F.silu(z.float())).to(zxbcdt.dtype)


def chunk_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int) -> Tensor:
    """The state-space recurrence state' = exp(dt A) state + dt x B, y = state' C, a chunk at a time.

    x: b l h p; dt: b l h, positive; A: h, negative; B, C: b l g n; returns b l h p, all fp32.
    """
    length, heads = x.shape[1:3]
    chunk = min(chunk_size, length)
    pad = -length % chunk
    u, decay = F.pad(x * dt[..., None], (0, 0, 0, 0, 0, pad)), F.pad(dt * A, (0, 0, 0, pad))
    B, C = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (B, C))
    # b c h q *: everything below is a batch of matrix products; B and C stay by group until then
    u, B, C = (t.unflatten(1, (-1, chunk)).transpose(2, 3) for t in (u, B, C))
    total = decay.unflatten(1, (-1, chunk)).transpose(2, 3).cumsum(-1)  # log of the decay since the chunk began
    per_group = heads // B.shape[2]
    scores = (C @ B.transpose(-1, -2)).repeat_interleave(per_group, 2)
    B, C = (t.repeat_interleave(per_group, 2) for t in (B, C))

    past = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    within = (total[..., :, None] - total[..., None, :]).masked_fill(~past, float("-inf")).exp()
    y = (scores * within) @ u
    if u.shape[1] > 1:
        left = (u * (total[..., -1:] - total).exp()[..., None]).transpose(-1, -2) @ B  # b c h p n, at the chunk's end
        y = y + (C * total.exp()[..., None]) @ _entering_states(left, total[..., -1].exp()).transpose(-1, -2)
    return y.transpose(2, 3).flatten(1, 2)[:, :length]


def _entering_states(left: Tensor, decay: Tensor) -> Tensor:
    """The state at the start of each chunk. left: b c h p n, what each chunk adds; decay: b c h; returns b c h p n."""
    state = torch.zeros_like(left[:, 0])
    entering = []
    for i in range(left.shape[1]):
        entering.append(state)
        state = state * decay[:, i, :, None, None] + left[:, i]
    return torch.stack(entering, 1)
