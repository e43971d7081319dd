"""A micro-batch as the model takes it: on this rank's part of each sequence, each document by itself where asked for.

Without context parallelism a micro-batch that is masked becomes one row, all its documents one after the other, the
form of Transformer Engine ("thd") and of mamba-ssm (`seq_idx`). With it, each rank holds a part of every document, and
a mask says what its tokens see.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from launcher.workers.megatron.attention import context_order

#: Lengths that kernels are told are multiples of this: some are built anew for every longest document.
_LENGTH_STEP = 64


class Batch(NamedTuple):
    """Sequences of a micro-batch, b s each.

    `loss_mask` is 1 where the loss counts, None where all do. Where documents are masked, `lengths` has those of each
    sequence's documents, which sum to s.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor | None = None
    lengths: tuple[list[int], ...] | None = None

    @property
    def squares(self) -> int:
        """The sum of the squares of the lengths within which tokens see each other."""
        count, places = self.tokens.shape
        if self.lengths is None:
            return count * places**2
        return sum(n * n for row in self.lengths for n in row)


@dataclass
class Documents(PackedSeqParams):
    """megatron-core's parameters of packed sequences, with the lengths on the host.

    `seq_idx`, 1 s, is the number of each token's document: 0.16.1 finds it itself, newer ones have this field for it.
    """

    seq_idx: Tensor | None = None
    lengths: tuple[int, ...] = ()


def packed_documents(lengths: tuple[int, ...], device: Any = None) -> Documents:
    """Documents of these lengths, one after the other in one row."""
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    numbers = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), torch.tensor(lengths))
    longest = -(-max(lengths) // _LENGTH_STEP) * _LENGTH_STEP
    return Documents(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        seq_idx=numbers[None].to(device),
        lengths=lengths,
    )


def model_inputs(batch: Batch, positions: Tensor) -> tuple[dict[str, Any], Tensor | None]:
    """The arguments of the model's forward, and the mask of the losses it gives. `positions`: those this rank holds."""
    device = positions.device
    tokens, labels, mask = (
        None if t is None else t.to(device, non_blocking=True) for t in (batch.tokens, batch.labels, batch.loss_mask)
    )
    assert tokens is not None and labels is not None
    further: dict[str, Any] = {"attention_mask": None}
    split = len(positions) < tokens.shape[1]
    if batch.lengths is not None and not split:
        # No model here has positions but RoPE's, which megatron-core starts anew at each document.
        assert mask is not None
        lengths = tuple(n for row in batch.lengths for n in row)
        inputs = {"input_ids": tokens.view(1, -1), "position_ids": None, "labels": labels.view(1, -1)}
        return {**inputs, **further, "packed_seq_params": packed_documents(lengths, device)}, mask.view(1, -1)
    if split:
        tokens, labels = tokens[:, positions], labels[:, positions]
        mask = None if mask is None else mask[:, positions]
    if batch.lengths is not None:
        further = {"attention_mask": _seen(batch.lengths, positions)}
    return {"input_ids": tokens, "position_ids": positions.expand(len(tokens), -1), "labels": labels, **further}, mask


def _seen(lengths: tuple[list[int], ...], positions: Tensor) -> Tensor:
    """Which keys are of the document of each of this rank's tokens: b 1 s/ranks s, the keys in the order gathered."""
    device, size = positions.device, parallel_state.get_context_parallel_world_size()
    numbers = torch.stack([torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in lengths]).to(device)
    keys = numbers[:, context_order(numbers.shape[1], size).to(device)]
    return (numbers[:, positions, None] == keys[:, None, :]).unsqueeze(1)
