"""Named tensors in megatron-core's torch_dist format, read and written one at a time, without megatron-core.

    latest_checkpointed_iteration.txt    the iteration, or `release` for a checkpoint that no training wrote
    iter_NNNNNNN/ or release/            .metadata (a pickle), *.distcp (one torch.save after another), metadata.json,
                                         common.pt

A homogeneous GPT model has one tensor for all layers, `decoder.layers.mlp.linear_fc2.weight`, with a leading layer
axis; here it is one tensor a layer, `decoder.layers.3.mlp.linear_fc2.weight`, as in files that have it so.
"""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from launcher.convert.entry import Entry, Shape
from launcher.convert.metadata import read_metadata
from launcher.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
#: Megatron-LM takes no iteration 0; a checkpoint to start training from is a `release`.
RELEASE = "release"
_STACKED = re.compile(r"decoder\.layers\.(?!\d)(.+)")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
#: What a training run saves besides the model.
_NOT_WEIGHTS = ("optimizer.", "chained_")


@dataclass(frozen=True)
class _Piece:
    """A part of a tensor, by offsets and sizes, and where it lies."""

    offsets: Shape
    sizes: Shape
    info: _StorageInfo


class TorchDistReader:
    """The tensors of a folder of format `megatron`: `entries` by name, `read` one at a time. Raises UserError."""

    def __init__(self, folder: Path):
        self.where = checkpoint_dir(folder)
        self.entries: dict[str, Entry] = {}
        self._keys: dict[str, tuple[str, int | None]] = {}
        self._pieces: dict[str, list[_Piece]] = {}
        metadata = read_metadata(self.where / ".metadata")
        tensors = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata) and not key.startswith(_NOT_WEIGHTS)
        }
        for key, value in tensors.items():
            self._name(key, tuple(value.size), value.properties.dtype)
        for index, info in metadata.storage_data.items():
            if index.fqn in tensors:
                self._pieces.setdefault(index.fqn, []).append(_piece(tensors[index.fqn], index, info))
        problems = [*self._holes(tensors), *self._broken_files()]
        if problems:
            raise UserError(problems)

    def _name(self, key: str, size: Shape, dtype: torch.dtype) -> None:
        stacked = _STACKED.fullmatch(key)
        if not stacked:
            self.entries[key], self._keys[key] = Entry(size, dtype), (key, None)
            return
        for layer in range(size[0]):
            name = f"decoder.layers.{layer}.{stacked[1]}"
            self.entries[name], self._keys[name] = Entry(size[1:], dtype), (key, layer)

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
            path = self.where / name
            if Path(name).name != name:
                yield f"{self.where / '.metadata'}: names a file outside its folder, {name}"
            elif not path.is_file():
                yield f"{path}: not there, though .metadata names it; get the file again"
            elif path.stat().st_size < end:
                yield f"{path}: {path.stat().st_size} bytes, {end} by .metadata: cut short; get the file again"

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

    def _load(self, key: str, piece: _Piece, dtype: torch.dtype) -> Tensor:
        path = self.where / piece.info.relative_path
        try:
            with path.open("rb") as file:
                view = _create_file_view(file, piece.info.offset, piece.info.length)
                tensor = torch.load(view, map_location="cpu", weights_only=True)
            if tuple(tensor.shape) == piece.sizes and tensor.dtype == dtype:
                return tensor.detach()
            problem = "holds another tensor than .metadata says"
        except (RuntimeError, ValueError, EOFError, AttributeError, pickle.UnpicklingError) as error:
            problem = f"cannot be read ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        raise UserError(f"{path}: the piece of {key} at byte {piece.info.offset} {problem}; get the file again")


def _piece(value: TensorStorageMetadata, index: MetadataIndex, info: _StorageInfo) -> _Piece:
    """The piece of a tensor that `index` means; its size stands in the tensor's list of chunks."""
    offsets = tuple(index.offset or (0,) * len(value.size))
    sizes = next((tuple(c.sizes) for c in value.chunks if tuple(c.offsets) == offsets), ())
    return _Piece(offsets, sizes, info)


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


def checkpoint_dir(folder: Path) -> Path:
    """The folder of the newest checkpoint, which the tracker file names. Raises UserError."""
    tracker = folder / TRACKER
    try:
        text = tracker.read_text().strip()
    except OSError:
        raise UserError(f"{folder}: no {TRACKER}; a checkpoint of format megatron is wanted") from None
    if text != RELEASE and not text.isdecimal():
        raise UserError(f"{tracker}: neither an iteration nor `{RELEASE}`")
    path = folder / (RELEASE if text == RELEASE else f"iter_{int(text):07d}")
    if not (path / ".metadata").is_file():
        raise UserError(f"{path}: named by {TRACKER}, but no torch_dist checkpoint is there")
    return path


class TorchDistWriter:
    """Writes a folder of format `megatron`, in the order in which tensors come; `stacked` for a homogeneous model."""

    def __init__(self, folder: Path, entries: Mapping[str, Entry], stacked: bool):
        self._root, self._path, self._stacked = folder, folder / RELEASE, stacked
        self._left = dict(entries)
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}
        self._layers = 1 + max((int(m[1]) for name in entries if (m := _LAYER.fullmatch(name))), default=-1)
        self._check_types(entries)
        self._path.mkdir()
        self._file: BinaryIO = (self._path / "__0_0.distcp").open("wb")

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
            raise UserError(mixed)

    def _place(self, name: str) -> tuple[str, int | None]:
        match = _LAYER.fullmatch(name)
        return (f"decoder.layers.{match[2]}", int(match[1])) if match and self._stacked else (name, None)

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor; each once."""
        del self._left[name]
        key, layer = self._place(name)
        size = tuple(tensor.shape)
        whole, offset = (
            (size, (0,) * len(size)) if layer is None else ((self._layers, *size), (layer, *(0,) * len(size)))
        )
        piece = tensor if layer is None else tensor.unsqueeze(0)
        if piece.untyped_storage().nbytes() != piece.nbytes or not piece.is_contiguous():
            piece = piece.clone(memory_format=torch.contiguous_format)  # torch.save writes all of a view's storage
        value = self._tensors.setdefault(
            key, TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), torch.Size(whole), [])
        )
        start = self._file.tell()
        torch.save(piece, self._file)
        index = MetadataIndex(key, torch.Size(offset), len(value.chunks))
        value.chunks.append(ChunkStorageMetadata(torch.Size(offset), piece.shape))
        self._storage[index] = _StorageInfo("__0_0.distcp", start, self._file.tell() - start)

    def close(self) -> None:
        """Write what describes the tensors. Raises RuntimeError where one was never given."""
        self._file.close()
        if self._left:
            raise RuntimeError(f"never written: {', '.join(self._left)}")
        metadata = Metadata(self._tensors, {key: (key,) for key in self._tensors}, self._storage)
        (self._path / ".metadata").write_bytes(pickle.dumps(metadata))
        kinds: dict[str, Any] = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        kinds |= {"common_backend": "torch", "common_backend_version": 1}
        (self._path / "metadata.json").write_text(json.dumps(kinds))
        common = {"iteration": 0, "checkpoint_version": 3.0, "content_metadata": {"singleton_local_shards": False}}
        torch.save(common, self._path / "common.pt")
        (self._root / TRACKER).write_text(RELEASE)
