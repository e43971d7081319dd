"""Named tensors in megatron-core's torch_dist format, read and written one at a time, without megatron-core.

    .metadata         a pickle: what there is, and where
    *.distcp          one torch.save after another
    metadata.json, common.pt

A homogeneous GPT model has one tensor for all layers, `decoder.layers.mlp.linear_fc2.weight`, with a leading layer
axis; here it is one tensor a layer, `decoder.layers.3.mlp.linear_fc2.weight`, as in files that have it so.
"""

from __future__ import annotations

import contextlib
import json
import math
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view
from torch.utils.serialization import config

from launcher.convert.entry import Entry, Shape
from launcher.convert.files import Member, begin_writing
from launcher.convert.lanes import LANES
from launcher.convert.metadata import parse_metadata
from launcher.errors import UserError, bounded
from launcher.models.headers import Held
from launcher.models.shape import ModelShape
from launcher.models.spans import Files
from launcher.models.torch_dist import is_weight, layers_of

#: What Megatron-LM reads beside the tensors.
RELEASE_COMMON = {"iteration": 0, "checkpoint_version": 3.0, "content_metadata": {"singleton_local_shards": False}}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


#: Modules of each kind of layer that ask a checkpoint for a state, in one version of Transformer Engine or another.
_STATEFUL = {
    "M": ("mixer.in_proj", "mixer.out_proj"),
    "*": ("self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention"),
    "-": ("mlp.linear_fc1", "mlp.linear_fc2"),
}


def extra_states(shape: ModelShape) -> list[str]:
    """Keys of the states that Transformer Engine's modules ask for; without them Megatron-LM and NeMo load nothing."""
    last, n = ("final_layernorm" if shape.hybrid_override_pattern is None else "final_norm"), shape.num_layers
    if shape.hybrid_override_pattern is None:
        modules = (*_STATEFUL["*"], *_STATEFUL["-"])
        inside = [f"decoder.layers.{module}._extra_state/shard_{i}_{n}" for module in modules for i in range(n)]
    else:
        kinds = enumerate(shape.hybrid_override_pattern)
        inside = [f"decoder.layers.{i}.{m}._extra_state/shard_0_1" for i, kind in kinds for m in _STATEFUL[kind]]
        inside.append("output_layer._extra_state/shard_0_1")  # a hybrid model asks for it, a GPT model does not
    return [*inside, f"decoder.{last}._extra_state/shard_0_1"]


@dataclass(frozen=True)
class _Piece:
    """A part of a tensor, by offsets and sizes, and where it lies."""

    offsets: Shape
    sizes: Shape
    info: _StorageInfo


class TorchDistReader:
    """The tensors of one torch_dist checkpoint: `entries` by name, `read` one at a time. Raises UserError.

    `files` are those of its folder, or of an archive. Keys are read without `prefix`, and those that lack it not at
    all; nor are optimizer states and objects.
    """

    def __init__(self, where: Path, files: Files, prefix: str = ""):
        self.where, self._files = where, files
        self.entries: dict[str, Entry] = {}
        self.held: dict[str, Held] = {}
        self._keys: dict[str, tuple[str, int | None]] = {}
        self._pieces: dict[str, list[_Piece]] = {}
        if ".metadata" not in files:
            raise UserError(f"{where}: no .metadata; no torch_dist checkpoint is there, or its writing was cut off")
        metadata = parse_metadata(files[".metadata"].read(), str(files[".metadata"]))
        tensors = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata) and is_weight(key, prefix)
        }
        for key, value in tensors.items():
            for name, size, layer in layers_of(key, tuple(value.size), prefix, where):
                self.entries[name], self._keys[name] = Entry(size, value.properties.dtype), (key, layer)
        sizes = {key: {tuple(c.offsets): tuple(c.sizes) for c in value.chunks} for key, value in tensors.items()}
        for index, info in metadata.storage_data.items():
            if index.fqn in tensors:
                offsets = tuple(index.offset or (0,) * len(tensors[index.fqn].size))
                piece = _Piece(offsets, sizes[index.fqn].get(offsets, (0,) * len(offsets)), info)
                self._pieces.setdefault(index.fqn, []).append(piece)
        problems = [*self._holes(tensors), *self._broken_files()]
        if problems:
            raise UserError(bounded(problems, where))
        self.held = {n: Held(str(e.dtype).removeprefix("torch."), e.shape) for n, e in self.entries.items()}
        used = {piece.info.relative_path for pieces in self._pieces.values() for piece in pieces}
        self.paths = sorted({files[name].path for name in (".metadata", *used)})

    def _holes(self, tensors: Mapping[str, TensorStorageMetadata]) -> Iterator[str]:
        for key, value in tensors.items():
            there, whole = sum(math.prod(piece.sizes) for piece in self._pieces.get(key, ())), math.prod(value.size)
            if there != whole:
                yield f"{self.where}: {key} has {there} of its {whole} elements; save the checkpoint again"

    def _broken_files(self) -> Iterator[str]:
        ends: dict[str, int] = {}
        for piece in (p for pieces in self._pieces.values() for p in pieces):
            name, end = piece.info.relative_path, piece.info.offset + piece.info.length
            ends[name] = max(end, ends.get(name, 0))
        for name, end in sorted(ends.items()):
            span = self._files.get(name)
            if Path(name).name != name:
                yield f"{self._files['.metadata']}: names a file outside its folder, {name}"
            elif span is None:
                yield f"{self.where / name}: not there, though .metadata names it; get the file again"
            elif span.size < end:
                yield f"{span}: {span.size} bytes, {end} by .metadata: cut short; get the file again"

    def read(self, name: str) -> Tensor:
        """One tensor, put together from its pieces."""
        key, layer = self._keys[name]
        entry = self.entries[name]
        start = (() if layer is None else (layer,)) + (0,) * len(entry.shape)
        size = (() if layer is None else (1,)) + entry.shape
        found = [piece for piece in self._pieces[key] if _overlap(piece, start, size)]
        if len(found) == 1 and (found[0].offsets, found[0].sizes) == (start, size):
            return self._load(key, found[0], entry.dtype).view(entry.shape)
        whole = torch.empty(size, dtype=entry.dtype)
        for piece in found:
            into, of = _overlap(piece, start, size) or ((), ())
            whole[into] = self._load(key, piece, entry.dtype)[of]
        return whole.view(entry.shape)

    def read_together(self, names: Sequence[str]) -> list[Tensor]:
        """Several tensors."""
        return [self.read(name) for name in names]

    def _load(self, key: str, piece: _Piece, dtype: torch.dtype) -> Tensor:
        span = self._files[piece.info.relative_path]
        try:
            with span.path.open("rb") as file:
                view = _create_file_view(file, span.start + piece.info.offset, piece.info.length)
                tensor = torch.load(view, map_location="cpu", weights_only=True)
            if tuple(tensor.shape) == piece.sizes and tensor.dtype == dtype:
                return tensor.detach()
            problem = "holds another tensor than .metadata says"
        except pickle.UnpicklingError:  # torch's text advises to load it all the same
            problem = "is no tensor alone, or is damaged"
        except PermissionError:
            raise
        except Exception as error:  # whatever broken bytes lead an unpickler to
            problem = f"cannot be read ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        raise UserError(f"{span}: the piece of {key} at byte {piece.info.offset} {problem}; get the file again")


def _overlap(piece: _Piece, start: Shape, size: Shape) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where a piece and the region (start, size) meet, as slices of the region and of the piece; None if nowhere."""
    into, of = [], []
    for p, n, s, m in zip(piece.offsets, piece.sizes, start, size, strict=True):
        low, high = max(p, s), min(p + n, s + m)
        if low >= high:
            return None
        into.append(slice(low - s, high - s))
        of.append(slice(low - p, high - p))
    return tuple(into), tuple(of)


class TorchDistWriter:
    """Fills a folder with a torch_dist checkpoint, in the order in which tensors come.

    `stacked`: one tensor for all layers, as a homogeneous model's. Keys begin with `prefix`. `objects` are keys of
    `extra_states`: each holds None, which Transformer Engine takes for nothing to restore. `data`: an open file that
    all tensors go into, in one lane, in place of files in `folder`.
    """

    #: The only file of tensors where there is one.
    ONE_FILE = "__0_0.distcp"

    def __init__(
        self,
        folder: Path,
        entries: Mapping[str, Entry],
        *,
        stacked: bool,
        prefix: str = "",
        objects: Sequence[str] = (),
        common: Mapping[str, Any] | None = None,
        data: Member | None = None,
    ):
        self.lanes = LANES if data is None else 1
        self._path, self._stacked, self._prefix = folder, stacked, prefix
        self._objects, self._common = tuple(objects), dict(common or {})
        self._left = dict(entries)
        self._layers = 1 + max((int(m[1]) for name in entries if (m := _LAYER.fullmatch(name))), default=-1)
        self._check_types(entries)
        self._whole: dict[str, tuple[Shape, torch.dtype]] = {}
        self._written: list[tuple[str, Shape, Shape, _StorageInfo]] = []
        folder.mkdir()
        self._names = [f"__0_{lane}.distcp" for lane in range(self.lanes)]
        self._files: list[Any] = [(folder / name).open("wb") for name in self._names] if data is None else [data]

    def _check_types(self, entries: Mapping[str, Entry]) -> None:
        types: dict[str, set[torch.dtype]] = {}
        for name, entry in entries.items():
            types.setdefault(self._place(name)[0], set()).add(entry.dtype)
        mixed = [
            f"{key}: its layers are of types {sorted(map(str, t))}; convert the checkpoint to one type first"
            for key, t in types.items()
            if len(t) > 1
        ]
        if mixed:
            raise UserError(bounded(mixed, self._path))

    def _place(self, name: str) -> tuple[str, int | None]:
        match = _LAYER.fullmatch(name)
        return (f"decoder.layers.{match[2]}", int(match[1])) if match and self._stacked else (name, None)

    def add(self, name: str, tensor: Tensor, lane: int = 0) -> None:
        """Append one tensor to the file of a lane, which one thread at a time may do; each tensor once."""
        del self._left[name]
        key, layer = self._place(name)
        size = tuple(tensor.shape)
        whole, offset = (
            (size, (0,) * len(size)) if layer is None else ((self._layers, *size), (layer, *(0,) * len(size)))
        )
        piece = tensor if layer is None else tensor.unsqueeze(0)
        self._whole[self._prefix + key] = whole, tensor.dtype
        self._written.append((self._prefix + key, offset, tuple(piece.shape), self._append(piece, lane)))

    def _append(self, value: Any, lane: int) -> _StorageInfo:
        if isinstance(value, Tensor) and (
            value.untyped_storage().nbytes() != value.nbytes or not value.is_contiguous()
        ):
            value = value.clone(memory_format=torch.contiguous_format)  # torch.save writes all of a view's storage
        file = self._files[lane]
        start = file.tell()
        # Readers of torch.save's archives leave the checksums alone, and to compute them takes as long as the writing.
        try:
            with config.patch("save.compute_crc32", False):
                torch.save(value, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # on a full disk torch itself says "unexpected pos"
                raise error.__context__ from None
            raise
        file.flush()
        begin_writing(file.fileno(), start, file.tell() - start)
        return _StorageInfo(self._names[lane], start, file.tell() - start)

    def stop(self) -> None:
        """Close the files as they are: all, though one cannot be written to its end."""
        with contextlib.ExitStack() as all_of_them:
            for file in self._files:
                all_of_them.callback(file.close)

    def close(self) -> None:
        """Write what describes the tensors. Raises RuntimeError where one was never given."""
        if self._left:
            raise RuntimeError(f"never written: {', '.join(self._left)}")
        described: dict[str, Any] = {
            key: TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(size), [])
            for key, (size, dtype) in sorted(self._whole.items())
        }
        names = {key: key for key in described}  # one object a key: what pickle writes depends on it
        places = {}
        for key, offset, size, info in sorted(self._written, key=lambda piece: piece[:2]):
            chunks = described[key].chunks
            places[MetadataIndex(names[key], torch.Size(offset), len(chunks))] = info
            chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(size)))
        for key in (self._prefix + name for name in self._objects):
            described[key] = BytesStorageMetadata()
            places[MetadataIndex(key)] = self._append([None], 0)
        self.stop()
        metadata = Metadata(described, {key: (key,) for key in described}, places)
        (self._path / ".metadata").write_bytes(pickle.dumps(metadata))
        kinds: dict[str, Any] = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        kinds |= {"common_backend": "torch", "common_backend_version": 1}
        (self._path / "metadata.json").write_text(json.dumps(kinds), encoding="utf-8")
        with (self._path / "common.pt").open(
            "wb"
        ) as file:  # by its path torch would say no more of a full disk than "iostream"
            torch.save(self._common, file)
