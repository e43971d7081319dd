"""Named tensors in safetensors files, one file or shards with an index, read lazily and written in place.

The format: eight bytes with the header's length, the header as JSON, the tensors' bytes
(https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from launcher.convert.entry import Entry, raw_bytes
from launcher.convert.files import read_into, write_all
from launcher.convert.lanes import LANES
from launcher.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
#: Bytes of tensors above which a file is split, as transformers does.
SHARD_BYTES = 5_000_000_000
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class HfReader:
    """The tensors of a Hugging Face folder: `entries` by name, `read` one at a time. Raises UserError."""

    def __init__(self, folder: Path):
        self.where = folder
        index = read_index(folder)
        files = dict.fromkeys(index.values()) if index else [_single(folder)]
        headers = {name: _read_header(folder / name) for name in files}
        self._places = {key: (name, start) for name, h in headers.items() for key, (start, _) in h.items()}
        problems = [
            f"{folder / name}: {key} is not there, though {INDEX} says so"
            for key, name in index.items()
            if key not in headers[name]
        ]
        problems += [
            f"{folder / name}: {key} is there, though {INDEX} does not say so"
            for name, header in headers.items()
            for key in header
            if index and index.get(key) != name
        ]
        problems += [
            f"{folder / name}: {key} is of type {entry}; "
            f"only {', '.join(_DTYPES)} are covered: use the checkpoint that is not quantised"
            for name, header in headers.items()
            for key, (_, entry) in header.items()
            if isinstance(entry, str)
        ]
        if problems:
            raise UserError(problems)
        self.paths = [folder / name for name in files]
        self.entries: dict[str, Entry] = {k: e for h in headers.values() for k, (_, e) in h.items()}  # type: ignore[misc]

    def read(self, name: str) -> Tensor:
        """One tensor."""
        return self.read_together((name,))[0]

    def read_together(self, names: Sequence[str]) -> list[Tensor]:
        """Tensors of one type, one behind the other in memory: what joins them then has nothing to do."""
        sizes = [math.prod(self.entries[name].shape) for name in names]
        parts = torch.empty(sum(sizes), dtype=self.entries[names[0]].dtype).split(sizes)
        for name, part in zip(names, parts, strict=True):
            file, start = self._places[name]
            with (self.where / file).open("rb", buffering=0) as opened:
                there = read_into(opened, raw_bytes(part), start)
            if there < part.nbytes:
                raise UserError(f"{self.where / file}: {name} is cut short; get the file again")
        return [part.view(self.entries[name].shape) for name, part in zip(names, parts, strict=True)]


def _single(folder: Path) -> str:
    """The name of the one file of a checkpoint without an index."""
    if (folder / SINGLE).is_file():
        return SINGLE
    if (folder / SINGLE).is_symlink():
        raise UserError(f"{folder / SINGLE}: {_absent(folder / SINGLE)}; get the file again")
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder / pickles[0]}: a pickle, which runs whatever code it holds and is never loaded; "
            "save the checkpoint again as safetensors"
        )
    raise UserError(f"{folder}: neither {SINGLE} nor {INDEX} is there; a Hugging Face checkpoint is wanted")


def read_index(folder: Path) -> dict[str, str]:
    """Tensor name to file name, from the folder's index; empty where there is none. Raises UserError."""
    path = folder / INDEX
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        wrong = [name for name in places.values() if Path(name).name != name]
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: not an index of safetensors files; get the checkpoint again") from None
    if wrong:
        raise UserError(f"{path}: names files outside the folder, such as {wrong[0]}")
    gone = sorted({name for name in places.values() if not (folder / name).is_file()})
    if gone:
        raise UserError(
            f"{folder / name}: {_absent(folder / name)}, though {INDEX} names it; get the file again" for name in gone
        )
    return places


def _absent(path: Path) -> str:
    """What is at a path that leads to no file: the caches of Hugging Face are full of links."""
    return f"a link to {path.readlink()}, which is not there" if path.is_symlink() else "not there"


def _read_header(path: Path) -> dict[str, tuple[int, Entry | str]]:
    """Tensor name to its place in the file and what it is, or the name of a type that is not covered."""
    path.open("rb").close()  # of a file that may not be read safetensors says that there is none
    try:
        # Checks the header and the file's size. For torch it would map the file as memory of the process's own, which
        # the kernel refuses for one file larger than memory.
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); get the file again") from None
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {
        key: (
            8 + size + value["data_offsets"][0],
            Entry(tuple(value["shape"]), _DTYPES[value["dtype"]]) if value["dtype"] in _DTYPES else value["dtype"],
        )
        for key, value in header.items()
    }


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
