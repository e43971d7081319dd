"""Attention by torch's own scaled_dot_product_attention, where Transformer Engine is not: fused on a GPU, with sliding
windows and context parallelism everywhere. megatron-core's own attention without Transformer Engine has neither.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


def context_positions(seq_length: int, size: int, rank: int) -> Tensor:
    """The positions of a sequence that a context-parallel rank holds: its chunk from either end, so that causal
    attention is the same work for all. Megatron's order: `megatron.core.utils.get_batch_on_this_cp_rank`.
    """
    positions = torch.arange(seq_length)
    if size == 1:
        return positions
    chunks = positions.view(2 * size, -1)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


class TorchAttention(MegatronModule):
    """Causal attention, built and called as megatron-core does its DotProductAttention.

    `config.window_size` (left, 0) bounds what a token sees. With context parallelism each rank's queries meet the keys
    and values of all, gathered: plain, and as much memory as without.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self.window = config.window_size[0] if config.window_size else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Queries [s, b, heads, channels], keys and values [s, b, groups, channels]; gives [s, b, heads * channels]."""
        size = parallel_state.get_context_parallel_world_size()
        mask = None
        if size > 1:
            group = parallel_state.get_context_parallel_group()
            key, value = (gather_from_sequence_parallel_region(x, group=group) for x in (key, value))
        if size > 1 or (self.window is not None and self.window < key.shape[0] - 1):
            mask = self._mask(key.shape[0], size, query.device)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=grouped
        )
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def _mask(self, seq_length: int, size: int, device: torch.device) -> Tensor:
        """Which keys (columns, in the order gathered) this rank's queries (rows) see."""
        rank = parallel_state.get_context_parallel_rank()
        mine = context_positions(seq_length, size, rank)
        all_of_them = torch.cat([context_positions(seq_length, size, r) for r in range(size)])
        distance = mine[:, None] - all_of_them[None, :]
        seen = distance >= 0
        return (seen if self.window is None else seen & (distance <= self.window)).to(device)
