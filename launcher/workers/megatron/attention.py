"""Attention by torch's own scaled_dot_product_attention, where Transformer Engine is not: fused on a GPU, with sliding
windows, context parallelism and masked documents everywhere. megatron-core's own attention without Transformer Engine
has none of them.

What a token sees is always a stretch of keys that ends with its own. So the queries are cut where that stretch begins
anew, and each piece meets its own keys alone: no mask grows with the square of the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from launcher.workers.megatron.documents import Documents

#: Queries that meet the keys of their windows at once.
_ROWS = 4096


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


@lru_cache(maxsize=4)
def _natural_order(seq_length: int, size: int, device: torch.device) -> Tensor:
    """Where each position is among the keys gathered."""
    return context_order(seq_length, size).argsort().to(device)


class Piece(NamedTuple):
    """Queries of a rank, by their places there, and the keys that the last of them sees, by their positions."""

    rows: slice
    keys: slice


def pieces(
    lengths: Sequence[int], size: int = 1, rank: int = 0, window: int | None = None, most: int = _ROWS
) -> list[Piece]:
    """The queries that a context-parallel rank holds of a sequence of documents of these lengths, cut into pieces.

    The keys of a piece are of one document, and end with that of the piece's last query. With a window, the keys
    before a token that it sees, a piece has `most` queries at most and no keys that none of them sees.
    """
    total = sum(lengths)
    chunk = total // (2 * size) if size > 1 else total
    starts = [rank * chunk, (2 * size - 1 - rank) * chunk] if size > 1 else [0]
    found = []
    for place, start in enumerate(starts):
        for document, end in pairwise([0, *accumulate(lengths)]):
            begin, stop = max(start, document), min(start + chunk, end)
            while begin < stop:
                last = stop if window is None else min(stop, begin + most)
                first = document if window is None else max(document, begin - window)
                offset = place * chunk - start
                found.append(Piece(slice(begin + offset, last + offset), slice(first, last)))
                begin = last
    return found


@lru_cache(maxsize=8)
def _band(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """Which keys (columns) the queries (rows) see, whose own keys are the last; made once for all layers."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (distance >= 0) & (distance <= window)


class TorchAttention(MegatronModule):
    """Causal attention, built and called as megatron-core does its DotProductAttention.

    `config.window_size` (left, 0) bounds what a token sees. Documents one after the other in a row
    (`documents.Documents`) are attended to one by one. With context parallelism each rank's queries meet the keys and
    values of all, gathered: plain, and as much memory for these as without.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: object,
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
        packed_seq_params: Documents | None = None,
        **_: object,
    ) -> Tensor:
        """Queries [s, b, heads, channels], keys and values [s, b, groups, channels]; gives [s, b, heads * channels].

        `attention_mask` is no mask, but `documents.lengths_table`; for context parallelism alone. With
        `packed_seq_params` there is no dimension b.
        """
        if packed_seq_params is not None:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
            return self._attend_all(query, key, value, packed_seq_params.lengths).squeeze(1)
        size = parallel_state.get_context_parallel_world_size()
        if size > 1:
            group = parallel_state.get_context_parallel_group()
            key, value = (gather_from_sequence_parallel_region(x, group=group) for x in (key, value))
            order = _natural_order(key.shape[0], size, key.device)
            key, value = key[order], value[order]
        if attention_mask is None:
            return self._attend_all(query, key, value, [key.shape[0]], size)
        rows = [[n for n in row if n] for row in attention_mask.tolist()]
        columns = zip(*(x.split(1, dim=1) for x in (query, key, value)), rows, strict=True)
        return torch.cat([self._attend_all(q, k, v, lengths, size) for q, k, v, lengths in columns], dim=1)

    def _attend_all(self, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], size: int = 1) -> Tensor:
        """A sequence's queries, or this rank's part of them, each to what it sees of all keys."""
        rank = parallel_state.get_context_parallel_rank() if size > 1 else 0
        window = self.window if self.window is not None and self.window < max(lengths) - 1 else None
        cut = pieces(lengths, size, rank, window)
        parts = [self._attend(query[p.rows], key[p.keys], value[p.keys]) for p in cut]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Queries whose own keys are the last of these."""
        queries, keys = query.shape[0], key.shape[0]
        mask = None
        if self.window is not None and self.window < keys - 1:
            mask = _band(queries, keys, self.window, query.device)
        elif queries < keys:
            mask = causal_lower_right(queries, keys)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=grouped
        )
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)
