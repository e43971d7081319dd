"""A micro-batch as the model takes it: on this rank's part of each sequence, each document by itself where asked for.

Without context parallelism a micro-batch that is masked becomes one row, all its documents one after the other, the
form of Transformer Engine ("thd") and of mamba-ssm (`seq_idx`). With it, each rank holds a part of every document, and
attention is told how long they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

#: Lengths that kernels are told are multiples of this: some are built anew for every longest document.
_LENGTH_STEP = 64


@dataclass
class Documents(PackedSeqParams):
    """megatron-core's parameters of packed sequences, with the lengths on the host.

    `seq_idx`, 1 s, is the number of each token's document: 0.16.1 finds it itself, newer ones have this field for it.
    """

    seq_idx: Tensor | None = None
    lengths: tuple[int, ...] = ()


class Batch(NamedTuple):
    """Sequences of a micro-batch, b s each; without tokens and labels on pipeline stages that read none.

    `loss_mask` is 1 where the loss counts, None where all do. Where documents are masked, `lengths` has those of each
    sequence's documents, which sum to s, and `documents` what is made of them ahead of the step.
    """

    tokens: Tensor | None = None
    labels: Tensor | None = None
    loss_mask: Tensor | None = None
    lengths: tuple[list[int], ...] | None = None
    documents: Documents | None = None

    @property
    def places(self) -> int | None:
        """The length of a sequence; None where nothing tells it."""
        if self.tokens is not None:
            return int(self.tokens.shape[1])
        return None if self.lengths is None else sum(self.lengths[0])

    @property
    def squares(self) -> int:
        """The sum of the squares of the lengths within which tokens see each other."""
        if self.lengths is not None:
            return sum(n * n for row in self.lengths for n in row)
        assert self.tokens is not None
        count, places = self.tokens.shape
        return int(count * places**2)


def packed_documents(lengths: tuple[int, ...], device: torch.device | None = None) -> Documents:
    """Documents of these lengths, one after the other in one row."""
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    numbers = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), torch.tensor(lengths))
    longest = -(-max(lengths) // _LENGTH_STEP) * _LENGTH_STEP
    documents = Documents(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        seq_idx=numbers[None],
        lengths=lengths,
    )
    return documents if device is None else _on(documents, device)


def _on(documents: Documents, device: torch.device) -> Documents:
    return _with_tensors(documents, lambda tensor: tensor.to(device, non_blocking=True))


def _with_tensors(documents: Documents, copied: Callable[[Tensor], Tensor]) -> Documents:
    """The same documents with other tensors: copies of theirs, on the device or in pinned memory."""
    assert documents.seq_idx is not None, "`packed_documents` makes them with it"
    bounds, numbers = copied(documents.cu_seqlens_q), copied(documents.seq_idx)
    tensors = {"cu_seqlens_q": bounds, "cu_seqlens_kv": bounds, "seq_idx": numbers}
    return replace(documents, **tensors)


def prepared(batch: Batch, *, joined: bool, pin: bool) -> Batch:
    """All of a micro-batch that can be made before the step. `joined`: documents are one row, one after the other.

    `pin` puts it into pinned memory: from elsewhere a copy to the GPU waits for all that the GPU has to do.
    """
    if joined and batch.lengths is not None and batch.documents is None:
        batch = batch._replace(documents=packed_documents(_flat(batch.lengths)))
    if not pin:
        return batch
    tokens, labels, mask = (None if t is None else t.pin_memory() for t in batch[:3])
    documents = batch.documents
    if documents is not None:
        documents = _with_tensors(documents, lambda tensor: tensor.pin_memory())
    return batch._replace(tokens=tokens, labels=labels, loss_mask=mask, documents=documents)


def model_inputs(batch: Batch, positions: Tensor) -> tuple[dict[str, Any], Tensor | None]:
    """The arguments of the model's forward, and the mask of the losses it gives. `positions`: those this rank holds."""
    device = positions.device
    tokens, labels, mask = (None if t is None else t.to(device, non_blocking=True) for t in batch[:3])
    split = batch.places is not None and len(positions) < batch.places
    inputs: dict[str, Any] = {"input_ids": tokens, "position_ids": None, "labels": labels, "attention_mask": None}
    if batch.lengths is not None and not split:
        # No model here has positions but RoPE's, which megatron-core starts anew at each document.
        documents = batch.documents or packed_documents(_flat(batch.lengths))
        tokens, labels, mask = (None if t is None else t.view(1, -1) for t in (tokens, labels, mask))
        inputs |= {"input_ids": tokens, "labels": labels, "packed_seq_params": _on(documents, device)}
        return inputs, mask
    if split:
        tokens, labels, mask = (None if t is None else t[:, positions] for t in (tokens, labels, mask))
    if batch.lengths is not None:
        inputs["attention_mask"] = lengths_table(batch.lengths)
    if tokens is not None:
        inputs["position_ids"] = positions.expand(len(tokens), -1)
    return {**inputs, "input_ids": tokens, "labels": labels}, mask


def _flat(lengths: tuple[list[int], ...]) -> tuple[int, ...]:
    return tuple(n for row in lengths for n in row)


def lengths_table(lengths: tuple[list[int], ...]) -> Tensor:
    """The lengths of each sequence's documents, a row a sequence, filled up with 0; on the host, where they are read.

    `attention.TorchAttention` takes it for a mask, which at the lengths that context parallelism is for has no room.
    """
    longest = max(map(len, lengths))
    return torch.tensor([row + [0] * (longest - len(row)) for row in lengths])
