"""A family's table of tensors in the direction of a conversion: what to read, what to write, the way there and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from launcher.convert.entry import Shape
from launcher.convert.folding import fold, unfold
from launcher.models.families import tensor_map
from launcher.models.formats import Format, names_of, row_in, shapes_of
from launcher.models.shape import ModelShape
from launcher.models.tensors import TensorMap

Transform = Callable[[Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Link:
    """Source tensors that become target tensors.

    `source_shapes` holds, for each source, the shapes that fit: a vocabulary comes with and without padding rows.
    `rows`: the vocabulary's rows, for a tensor that has padding below them in one of the formats. `dtype`: the type
    that targets get, where it is not the source's.
    """

    sources: tuple[str, ...]
    source_shapes: tuple[tuple[Shape, ...], ...]
    targets: tuple[str, ...]
    target_shapes: tuple[Shape, ...]
    forward: Transform
    back: Transform
    rows: int | None = None
    dtype: torch.dtype | None = None
    copies: bool = True

    def content(self, tensor: Tensor) -> Tensor:
        """The tensor without padding rows."""
        return tensor if self.rows is None else tensor[: self.rows]


@dataclass(frozen=True)
class _Packing:
    """How one format holds a row's tensors: names, the shapes that fit (the first is written), the way from and to
    Hugging Face's tensors."""

    names: tuple[str, ...]
    shapes: tuple[tuple[Shape, ...], ...]
    pack: Transform
    unpack: Transform


def links(shape: ModelShape, source: Format, target: Format, folded: torch.dtype | None = None) -> tuple[Link, ...]:
    """Every tensor of a model of `shape`, in the model's order.

    `folded`: Granite's multipliers are in the weights of the format `nemo`, in fp32; the type says what they are of
    in the other format.
    """
    return tuple(_link(row, shape, source, target, folded) for row in tensor_map(shape))


def _link(row: TensorMap, shape: ModelShape, source: Format, target: Format, folded: torch.dtype | None) -> Link:
    read, written = (_packing(row, shape, name, folded) for name in (source, target))
    dtype = None if folded is None else torch.float32 if target == "nemo" else folded
    return Link(
        read.names,
        read.shapes,
        written.names,
        tuple(fit[0] for fit in written.shapes),
        lambda tensors: written.pack(read.unpack(tensors)),
        lambda tensors: read.pack(written.unpack(tensors)),
        shape.vocab_size if row.transform == "vocab" else None,
        dtype,
        row.transform != "copy",
    )


def _packing(row: TensorMap, shape: ModelShape, name: Format, folded: torch.dtype | None) -> _Packing:
    slots, shapes = names_of(row, name), shapes_of(row, shape, name)
    if name == "hf":
        return _Packing(slots, shapes, list, list)
    row = row_in(row, name)
    if name == "megatron" or folded is None:
        return _Packing(slots, shapes, lambda t: to_megatron(row, shape, t), lambda t: to_hf(row, shape, t))
    return _Packing(
        slots,
        shapes,
        lambda tensors: to_megatron(row, shape, fold(row, shape, tensors)),
        lambda tensors: unfold(row, shape, to_hf(row, shape, tensors), folded),
    )


def to_megatron(row: TensorMap, shape: ModelShape, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of `row.hf` as those of `row.megatron`; padding rows are zero."""
    if row.transform == "vocab":
        return [_padded(tensors[0], row.megatron_shapes[0][0])]
    if row.transform == "qkv":
        width = tensors[0].shape[1]
        groups = [t.view(shape.num_query_groups, -1, width) for t in tensors]
        return [torch.cat(groups, dim=1).view(row.megatron_shapes[0])]
    if row.transform == "gate_up":
        return [_joined(tensors)]
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
        return [_joined(tensors)]
    return list(tensors)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """One above the other; without a copy where they lie so in memory, as `HfReader.read_together` reads them."""
    first = tensors[0]
    home, place = first.untyped_storage().data_ptr(), first.storage_offset()
    for tensor in tensors:
        if (tensor.untyped_storage().data_ptr(), tensor.storage_offset()) != (
            home,
            place,
        ) or not tensor.is_contiguous():
            return torch.cat(list(tensors))
        place += tensor.numel()
    return first.as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())


def _padded(tensor: Tensor, rows: int) -> Tensor:
    if len(tensor) == rows:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])
