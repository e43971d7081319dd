"""Granite's multipliers inside plain Llama weights, for programs that have no setting for them.

With y = x / r for the residual stream (r residual, e embedding, a attention multiplier, g logits scaling) a Granite
model is a Llama whose norms have epsilon / r^2, queries a * sqrt(head size) times as large, embeddings e / r times,
and logits 1 / g: of the output layer's weights, or, where they are the embedding's, of the last norm's, which then also
takes back e / r. Weights folded in fp32 from bf16 come back with every bit.

Training is another matter: under Adam a weight that is c times as large learns 1 / c as fast, and the norm that
gradients are clipped by changes too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from launcher.models.shape import ModelShape
from launcher.models.tensors import TensorMap


def factors(shape: ModelShape) -> dict[str, float]:
    """What each kind of weight is multiplied by, by the end of its name in Hugging Face files; others are not."""
    embed = shape.embedding_multiplier / shape.residual_multiplier
    last = {"model.norm.weight": 1 / (embed * shape.logits_scaling)}
    head = {"lm_head.weight": 1 / shape.logits_scaling}
    return {
        "q_proj.weight": (shape.attention_multiplier or shape.kv_channels**-0.5) * shape.kv_channels**0.5,
        "embed_tokens.weight": embed,
        **(last if shape.share_embeddings_and_output_weights else head),
    }


def fold(row: TensorMap, shape: ModelShape, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The row's Hugging Face tensors with the multipliers in them, in fp32."""
    return [t.to(torch.float32, copy=True).mul_(factor) for t, factor in zip(tensors, _of(row, shape), strict=True)]


def unfold(row: TensorMap, shape: ModelShape, tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The same without them, rounded to `dtype`."""
    return [_divided(t, factor, dtype) for t, factor in zip(tensors, _of(row, shape), strict=True)]


#: Elements that are divided at a time, so that fp32 copies stay small whatever a tensor's size.
_PIECE = 1 << 20


def _divided(tensor: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    made = torch.empty(tensor.shape, dtype=dtype)
    for into, of in zip(made.view(-1).split(_PIECE), tensor.reshape(-1).split(_PIECE), strict=True):
        into.copy_(of.float() / factor)
    return made


def _of(row: TensorMap, shape: ModelShape) -> list[float]:
    table = factors(shape)
    return [next((f for end, f in table.items() if name.endswith(end)), 1.0) for name in row.hf]
