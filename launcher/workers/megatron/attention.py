"""Attention by torch's own scaled_dot_product_attention, where Transformer Engine is not: fused on a GPU, with sliding
windows, context parallelism and masked documents everywhere. megatron-core's own attention without Transformer Engine
has none of them.
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


def context_order(seq_length: int, size: int) -> Tensor:
    """The positions of a sequence in the order in which its context-parallel ranks hold them."""
    return torch.cat([context_positions(seq_length, size, rank) for rank in range(size)])


class TorchAttention(MegatronModule):
    """Causal attention, built and called as megatron-core does its DotProductAttention.

    `config.window_size` (left, 0) bounds what a token sees. Documents one after the other in a row
    (`documents.Documents`) are attended to one by one. With context parallelism each rank's queries meet the keys and
    values of all, gathered: plain, and as much memory as without.
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
        packed_seq_params: Any = None,
        **_: Any,
    ) -> Tensor:
        """Queries [s, b, heads, channels], keys and values [s, b, groups, channels]; gives [s, b, heads * channels].

        `attention_mask`, b 1 s/ranks s, is true where a query may see a key, causality and window apart; for context
        parallelism alone. With `packed_seq_params` there is no dimension b.
        """
        if packed_seq_params is not None:
            parts = zip(*(x.unsqueeze(1).split(packed_seq_params.lengths) for x in (query, key, value)), strict=True)
            return torch.cat([self._attend(*part) for part in parts]).squeeze(1)
        size, mask = parallel_state.get_context_parallel_world_size(), None
        if size > 1:
            group = parallel_state.get_context_parallel_group()
            key, value = (gather_from_sequence_parallel_region(x, group=group) for x in (key, value))
            mask = self._mask(key.shape[0], size, query.device)
            mask = mask if attention_mask is None else mask & attention_mask
        return self._attend(query, key, value, mask)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None and self.window is not None and self.window < key.shape[0] - 1:
            mask = self._mask(key.shape[0], 1, query.device)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=grouped
        )
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def _mask(self, seq_length: int, size: int, device: torch.device) -> Tensor:
        """Which keys (columns, in the order gathered) this rank's queries (rows) see."""
        rank = parallel_state.get_context_parallel_rank() if size > 1 else 0
        mine = context_positions(seq_length, size, rank)
        distance = mine[:, None] - context_order(seq_length, size)[None, :]
        seen = distance >= 0
        return (seen if self.window is None else seen & (distance <= self.window)).to(device)
