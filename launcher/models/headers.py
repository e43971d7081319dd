"""What the files of a Hugging Face folder say of themselves, read before any tensor is: config.json, the index, the
headers of safetensors. Standard library only, bounded in memory, and the one reader of `check` and of the jobs.

The format of safetensors: eight bytes with the header's length, the header as JSON, the tensors' bytes
(https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import UserError, bounded
from launcher.files import link_to_nothing, pointer, pointer_at
from launcher.models.families import shape_of
from launcher.models.shape import ModelShape
from launcher.models.tensors import Shape
from launcher.user_json import decode, parse

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
#: safetensors' names of the types that are covered, and torch's.
COVERED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
#: Bits of an element of other types, which only tensors beside the model may have.
_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16}
_BITS |= {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8}
#: Bytes beyond which no model has a config, and none a header or an index.
MOST_CONFIG, _MOST_HEADER = 16 << 20, 64 << 20


@dataclass(frozen=True)
class Held:
    """A tensor as a file describes it: torch's name of its type where that is covered, else the file's own word."""

    dtype: str
    shape: Shape
    file: str = ""
    start: int = 0

    def __str__(self) -> str:
        return f"{list(self.shape)} {self.dtype}"


# ------------------------------------------------------------------------------------------------------------- config


def read_config(path: Path) -> dict[str, Any]:
    """A config.json, or that of a folder. Raises UserError."""
    path = path / "config.json" if path.is_dir() else path
    return parse_config(_read_small(path, MOST_CONFIG, "put the model's config.json there"), path)


def parse_config(content: bytes, path: Path) -> dict[str, Any]:
    """The content of a config.json; a byte-order mark before it does no harm. Raises UserError."""
    config = parse(decode(content, str(path)), str(path)) if len(content) <= MOST_CONFIG else None
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a config.json of a model; get the file again")
    return config


def shape_in(config: Mapping[str, Any], path: Path) -> ModelShape:
    """The shape that a config.json describes, `path` being its name in messages. Raises UserError."""
    try:
        return shape_of(config)
    except UserError as error:
        raise UserError(f"{path}: {problem}" for problem in error.problems) from None


def _read_small(path: Path, most: int, mend: str) -> bytes:
    """A file of which a bounded part is read: no pipe or device, which would never end. Raises UserError."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path}: not a regular file; {mend}")
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {mend}") from None
    if len(content) > most:
        raise UserError(f"{path}: more than {most >> 20} MiB, which no such file has; get the file again")
    return content


# ------------------------------------------------------------------------------------------------------------ tensors


def read_headers(folder: Path) -> dict[str, Held]:
    """Every tensor that a Hugging Face folder holds. Raises UserError with all problems."""
    index = read_index(folder)
    files = dict.fromkeys(index.values()) if index else [_single(folder)]
    if SINGLE not in files and (folder / SINGLE).exists():
        raise UserError(
            f"{folder}: holds {SINGLE}, which transformers loads, and {INDEX}, by which others load other files; "
            "remove the one that is not the model"
        )
    headers = {name: read_header(folder / name) for name in files}
    problems = [
        f"{folder / name}: {key} is not there, though {INDEX} says so"
        for key, name in index.items()
        if key not in headers[name]
    ]
    problems += [  # one that the index leaves out is loaded by transformers like the others
        f"{folder / name}: {key} is there, though {INDEX} names {index[key]} for it; save the checkpoint again"
        for name, header in headers.items()
        for key in header
        if index.get(key, name) != name
    ]
    if problems:
        raise UserError(bounded(problems, folder))
    return {key: held for header in headers.values() for key, held in header.items()}


def read_index(folder: Path) -> dict[str, str]:
    """Tensor name to file name, from the folder's index; empty where there is none. Raises UserError."""
    path = folder / INDEX
    if nowhere := link_to_nothing(path):
        raise UserError(f"{path}: {nowhere}")
    if not path.exists():
        return {}
    content = _read_small(path, _MOST_HEADER, "get the checkpoint again")
    if instead := pointer(content):
        raise UserError(f"{path}: {instead}")
    try:
        places = json.loads(content)["weight_map"]
        names = set(places.values())
        wrong = sorted(name for name in names if Path(name).name != name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: not an index of safetensors files; get the checkpoint again") from None
    if wrong:
        raise UserError(f"{path}: names files outside the folder, such as {wrong[0]}")
    gone = [
        f"{folder / name}: {_absent(folder / name)}, though {INDEX} names it; get the file again"
        for name in sorted(names)
        if not (folder / name).is_file()
    ]
    if gone:
        raise UserError(bounded(gone, path))
    return dict(places)


def _absent(path: Path) -> str:
    """What is at a path that leads to no file: the caches of Hugging Face are full of links."""
    return f"a link to {path.readlink()}, which is not there" if path.is_symlink() else "not there"


def _single(folder: Path) -> str:
    """The name of the one file of a checkpoint without an index."""
    if (folder / SINGLE).is_file():
        return SINGLE
    if (folder / SINGLE).is_symlink():
        raise UserError(f"{folder / SINGLE}: {_absent(folder / SINGLE)}; get the file again")
    if adapter := adapter_problem(folder):
        raise UserError(adapter)
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder / pickles[0]}: a pickle, which runs whatever code it holds and is never loaded; "
            "save the checkpoint again as safetensors"
        )
    raise UserError(f"{folder}: neither {SINGLE} nor {INDEX} is there; a Hugging Face checkpoint is wanted")


def adapter_problem(folder: Path) -> str | None:
    """Of a folder that holds an adapter of PEFT and no model: that, and how to make a model of it."""
    if not (folder / ADAPTER).is_file():
        return None
    return (
        f"{folder}: an adapter ({ADAPTER}) and no whole model; merge it into its base first: in Python, "
        "PeftModel.from_pretrained(BASE, FOLDER).merge_and_unload().save_pretrained(NEW), and the tokenizer likewise"
    )


def read_header(path: Path) -> dict[str, Held]:
    """The tensors of one safetensors file by its header; its size is compared. Raises UserError."""
    try:
        size = path.stat().st_size
        if instead := pointer_at(path):
            raise UserError(f"{path}: {instead}")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError("its header does not fit into it")
            if length > _MOST_HEADER:
                raise ValueError(f"its header is of {length} bytes")
            header = json.loads(file.read(length))
        return _described(header, path.name, 8 + length, size)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); get the file again") from None


def _described(header: dict[str, Any], file: str, base: int, size: int) -> dict[str, Held]:
    header.pop("__metadata__", None)
    found, ends = {}, []
    for key, value in header.items():
        shape, (start, end), dtype = tuple(value["shape"]), value["data_offsets"], value["dtype"]
        numbers = (*shape, start, end)
        if len(numbers) > 16 or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers) or type(dtype) is not str:
            raise ValueError(f"it describes {key[:100]} wrongly")
        if dtype in _BITS and math.prod(shape) * _BITS[dtype] != 8 * (end - start):
            raise ValueError(f"{key[:100]} has {end - start} bytes, not those of {list(shape)} {dtype}")
        found[key] = Held(COVERED.get(dtype, dtype), shape, file, base + start)
        ends.append((start, end))
    place = 0
    for start, end in sorted(ends):
        if start != place or end < start:
            raise ValueError("its tensors overlap, or leave gaps")
        place = end
    if base + place != size:
        raise ValueError(f"{size} bytes, {base + place} by its header")
    return found
