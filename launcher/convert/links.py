"""A family's table of tensors in the direction of a conversion: what to read, what to write, the way there and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from launcher.convert.entry import Shape
from launcher.models.families import tensor_map
from launcher.models.shape import ModelShape
from launcher.models.tensors import TensorMap

Target = Literal["hf", "megatron"]
Transform = Callable[[Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Link:
    """Source tensors that become target tensors.

    `source_shapes` holds, for each source, the shapes that fit: a vocabulary comes with and without padding rows.
    `rows`: the vocabulary's rows, for a tensor that has padding below them in one of the formats.
    """

    sources: tuple[str, ...]
    source_shapes: tuple[tuple[Shape, ...], ...]
    targets: tuple[str, ...]
    target_shapes: tuple[Shape, ...]
    forward: Transform
    back: Transform
    rows: int | None = None

    def content(self, tensor: Tensor) -> Tensor:
        """The tensor without padding rows."""
        return tensor if self.rows is None else tensor[: self.rows]


def links(shape: ModelShape, to: Target) -> tuple[Link, ...]:
    """Every tensor of a model of `shape`, in the model's order."""
    return tuple(_link(row, shape, to) for row in tensor_map(shape))


def slot(row: TensorMap, key: str) -> str:
    """A tensor's name in a hybrid model's checkpoint, which homogeneous models' readers and writers use too."""
    return key if row.layer is None else f"decoder.layers.{row.layer}.{key}"


def _link(row: TensorMap, shape: ModelShape, to: Target) -> Link:
    def pack(tensors: Sequence[Tensor]) -> list[Tensor]:
        return to_megatron(row, shape, tensors)

    def unpack(tensors: Sequence[Tensor]) -> list[Tensor]:
        return to_hf(row, shape, tensors)

    rows = shape.vocab_size if row.transform == "vocab" else None
    slots = tuple(slot(row, key) for key in row.megatron)
    if to == "megatron":
        fitting = tuple((s,) for s in row.hf_shapes)
        return Link(row.hf, fitting, slots, row.megatron_shapes, pack, unpack, rows)
    fitting = tuple(((s, row.hf_shapes[0]) if rows else (s,)) for s in row.megatron_shapes)
    return Link(slots, fitting, row.hf, row.hf_shapes, unpack, pack, rows)


def to_megatron(row: TensorMap, shape: ModelShape, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of `row.hf` as those of `row.megatron`; padding rows are zero."""
    if row.transform == "vocab":
        return [_padded(tensors[0], row.megatron_shapes[0][0])]
    if row.transform == "qkv":
        width = tensors[0].shape[1]
        groups = [t.view(shape.num_query_groups, -1, width) for t in tensors]
        return [torch.cat(groups, dim=1).view(row.megatron_shapes[0])]
    if row.transform == "gate_up":
        return [torch.cat(list(tensors))]
    if row.transform == "split":
        return list(tensors[0].split([s[0] for s in row.megatron_shapes]))
    return list(tensors)


def to_hf(row: TensorMap, shape: ModelShape, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of `row.megatron` as those of `row.hf`; padding rows are cut."""
    if row.transform == "vocab":
        return [tensors[0][: row.hf_shapes[0][0]]]
    if row.transform == "qkv":
        group = shape.num_attention_heads // shape.num_query_groups * shape.kv_channels
        width = tensors[0].shape[1]
        groups = tensors[0].view(shape.num_query_groups, -1, width)
        parts = groups.split([group, shape.kv_channels, shape.kv_channels], dim=1)
        return [part.reshape(-1, width) for part in parts]
    if row.transform == "gate_up":
        return list(tensors[0].split([s[0] for s in row.hf_shapes]))
    if row.transform == "split":
        return [torch.cat(list(tensors))]
    return list(tensors)


def _padded(tensor: Tensor, rows: int) -> Tensor:
    if len(tensor) == rows:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])
