"""Named tensors in safetensors files, one file or shards with an index, read lazily and written in place.

What the files say of themselves is read by `launcher.models.headers`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from launcher.convert.entry import Entry, raw_bytes
from launcher.convert.files import read_into, write_all
from launcher.convert.lanes import LANES
from launcher.errors import UserError
from launcher.models.headers import COVERED, INDEX, SINGLE, Held, read_headers

#: Bytes of tensors above which a file is split, as transformers does.
SHARD_BYTES = 5_000_000_000
_TYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in COVERED.values()}
_NAMES: dict[torch.dtype, str] = {getattr(torch, name): code for code, name in COVERED.items()}


class HfReader:
    """The tensors of a Hugging Face folder: `entries` by name, `read` one at a time. Raises UserError.

    `held` are all that the files describe; `entries` those of types that are covered.
    """

    def __init__(self, folder: Path):
        self.where = folder
        self.held: Mapping[str, Held] = read_headers(folder)
        self.paths = [folder / name for name in dict.fromkeys(held.file for held in self.held.values())]
        self.entries = {n: Entry(h.shape, _TYPES[h.dtype]) for n, h in self.held.items() if h.dtype in _TYPES}

    def read(self, name: str) -> Tensor:
        """One tensor."""
        return self.read_together((name,))[0]

    def read_together(self, names: Sequence[str]) -> list[Tensor]:
        """Tensors of one type, one behind the other in memory: what joins them then has nothing to do."""
        sizes = [math.prod(self.entries[name].shape) for name in names]
        parts = torch.empty(sum(sizes), dtype=self.entries[names[0]].dtype).split(sizes)
        for name, part in zip(names, parts, strict=True):
            held = self.held[name]
            with (self.where / held.file).open("rb", buffering=0) as opened:
                there = read_into(opened, raw_bytes(part), held.start)
            if there < part.nbytes:
                raise UserError(f"{self.where / held.file}: {name} is cut short; get the file again")
        return [part.view(self.entries[name].shape) for name, part in zip(names, parts, strict=True)]


class HfWriter:
    """Writes safetensors: the layout is fixed by `entries`, then each tensor goes to its place, in any order."""

    lanes = LANES

    def __init__(self, folder: Path, entries: Mapping[str, Entry], shard_bytes: int = SHARD_BYTES):
        self._open: dict[Path, BinaryIO] = {}
        self._places: dict[str, tuple[BinaryIO, int]] = {}
        shards = _shards(entries, shard_bytes)
        names = (
            [SINGLE]
            if len(shards) == 1
            else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        )
        for name, shard in zip(names, shards, strict=True):
            self._start(folder / name, shard)
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(e.nbytes for e in entries.values())},
                "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
            }
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _start(self, path: Path, entries: Mapping[str, Entry]) -> None:
        # Wider types first, as safetensors itself orders them, so that every tensor lies at a multiple of its width.
        order = sorted(entries, key=lambda key: (-entries[key].dtype.itemsize, key))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for key in order:
            start, end = end, end + entries[key].nbytes
            header[key] = {
                "dtype": _NAMES[entries[key].dtype],
                "shape": entries[key].shape,
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = path.open("wb", buffering=0)
        file.write(len(text).to_bytes(8, "little") + text)
        self._open[path] = file
        self._places |= {key: (file, 8 + len(text) + header[key]["data_offsets"][0]) for key in order}

    def add(self, name: str, tensor: Tensor, lane: int = 0) -> None:
        """Put one tensor in its place; each once, from any thread."""
        file, offset = self._places.pop(name)
        write_all(file.fileno(), raw_bytes(tensor), offset)

    def stop(self) -> None:
        """Close the files as they are."""
        for file in self._open.values():
            file.close()

    def close(self) -> None:
        """Finish the files. Raises RuntimeError where a tensor was never given."""
        self.stop()
        if self._places:
            raise RuntimeError(f"never written: {', '.join(self._places)}")


def _shards(entries: Mapping[str, Entry], limit: int) -> list[dict[str, Entry]]:
    shards: list[dict[str, Entry]] = [{}]
    size = 0
    for key, entry in entries.items():
        if shards[-1] and size + entry.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][key] = entry
        size += entry.nbytes
    return shards
