"""One conversion: check that source and model fit, move the tensors, read the written files back and compare."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from launcher.convert.entry import Entry, checksum
from launcher.convert.folders import CARRIED, check_room, copy_side_files, read_shape, side_folder
from launcher.convert.hf import HfReader, HfWriter
from launcher.convert.links import Link, Target, links
from launcher.convert.torch_dist import TorchDistReader, TorchDistWriter
from launcher.errors import UserError, WorldError
from launcher.models.shape import ModelShape

#: Called with the tensors that are done and all that there are, those to verify included.
Progress = Callable[[int, int], None]
#: Bytes beside a tensor's own in either format, at most, and of the files around them.
_TENSOR_OVERHEAD, _FOLDER_OVERHEAD = 4096, 64 << 20


class Reader(Protocol):
    """Named tensors in files."""

    where: Path
    entries: dict[str, Entry]

    def read(self, name: str) -> Tensor:
        """One tensor."""


def convert(
    source: Path, target: Path, to: Target, verify: bool = True, progress: Progress = lambda *_: None
) -> dict[str, Any]:
    """Fill the empty folder `target` with the checkpoint `source` in the format `to`; returns the verification.

    Raises UserError where the source is no checkpoint that can be converted, before anything is written, and
    WorldError where the disk has no room or what was written is not what was read.
    """
    side = side_folder(source, to)
    shape = read_shape(side)
    table = links(shape, to)
    reader: Reader = HfReader(source) if to == "megatron" else TorchDistReader(source)
    _check_source(reader, table)
    wanted = _target_entries(reader, table)
    check_room(target, sum(e.nbytes + _TENSOR_OVERHEAD for e in wanted.values()) + _FOLDER_OVERHEAD)
    writer = _writer(target, to, wanted, shape, reader.where)
    total = len(table) * (2 if verify else 1)
    sums: dict[str, str] = {}
    for number, link in enumerate(table):
        progress(number, total)
        sums |= _move(link, reader, writer, verify)
    writer.close()
    files = copy_side_files(side, target / CARRIED if to == "megatron" else target)
    written: Reader = TorchDistReader(target) if to == "megatron" else HfReader(target)
    _check_target(written, wanted)
    if verify:
        _compare(written, table, sums, lambda number: progress(len(table) + number, total))
    return _record(to, reader, written, sums, files)


def _check_source(reader: Reader, table: tuple[Link, ...]) -> None:
    """Every tensor of the model is there with a shape that fits, once, and nothing else is."""
    shapes = {name: fit for link in table for name, fit in zip(link.sources, link.source_shapes, strict=True)}
    there = reader.entries
    problems = [
        f"{reader.where}: {name} {list(fit[0])} is missing; is config.json that of this checkpoint?"
        for name, fit in shapes.items()
        if name not in there
    ]
    problems += [
        f"{reader.where}: {name} {there[name]} is no tensor of this model; is config.json that of this checkpoint?"
        for name in there
        if name not in shapes
    ]
    problems += [
        f"{reader.where}: {name} is {list(there[name].shape)}, config.json makes it {list(fit[0])}"
        for name, fit in shapes.items()
        if name in there and there[name].shape not in fit
    ]
    for link in table:
        types = {str(there[name].dtype) for name in link.sources if name in there}
        if len(types) > 1:
            problems.append(f"{reader.where}: {', '.join(link.sources)} differ in type: {', '.join(sorted(types))}")
    if len(shapes) != sum(len(link.sources) for link in table):
        raise RuntimeError("the family's table uses a tensor twice")
    if problems:
        shown = problems[:20]
        raise UserError(shown + [f"{reader.where}: {len(problems) - 20} more"] * (len(problems) > 20))


def _target_entries(reader: Reader, table: tuple[Link, ...]) -> dict[str, Entry]:
    """What will be written: the table's shapes, the source's types."""
    return {
        name: Entry(shape, reader.entries[link.sources[0]].dtype)
        for link in table
        for name, shape in zip(link.targets, link.target_shapes, strict=True)
    }


def _writer(target: Path, to: Target, wanted: Mapping[str, Entry], shape: ModelShape, source: Path) -> Any:
    if to == "hf":
        return HfWriter(target, wanted)
    try:
        return TorchDistWriter(target, wanted, stacked=shape.hybrid_override_pattern is None)
    except UserError as error:
        raise UserError(f"{source}: {problem}" for problem in error.problems) from None


def _move(link: Link, reader: Reader, writer: Any, verify: bool) -> dict[str, str]:
    """Convert one row of the table; returns the checksums of its source tensors."""
    tensors = [reader.read(name) for name in link.sources]
    for name, tensor in zip(link.targets, link.forward(tensors), strict=True):
        writer.add(name, tensor)
    return _checksums(link, tensors) if verify else dict.fromkeys(link.sources, "")


def _checksums(link: Link, tensors: list[Tensor]) -> dict[str, str]:
    return {name: checksum(link.content(tensor)) for name, tensor in zip(link.sources, tensors, strict=True)}


def _check_target(written: Reader, wanted: Mapping[str, Entry]) -> None:
    wrong = sorted(name for name in {*written.entries, *wanted} if written.entries.get(name) != wanted.get(name))
    if wrong:
        raise WorldError(f"{written.where}: {', '.join(wrong)}: not as they should be after writing; convert again")


def _compare(
    written: Reader, table: tuple[Link, ...], sums: Mapping[str, str], progress: Callable[[int], None]
) -> None:
    """Turn what was written back into source tensors. Raises WorldError naming those that are not the same bytes."""
    wrong = []
    for number, link in enumerate(table):
        progress(number)
        tensors = [written.read(name) for name in link.targets]
        found = _checksums(link, link.back(tensors))
        wrong += [name for name, digest in found.items() if digest != sums[name]]
        wrong += [
            name for name, t in zip(link.targets, tensors, strict=True) if link.rows and t[link.rows :].count_nonzero()
        ]
    if wrong:
        raise WorldError(
            f"{written.where}: {', '.join(wrong)}: read back, not the bytes that were converted; convert again"
        )


def _record(to: Target, reader: Reader, written: Reader, sums: Mapping[str, str], files: list[str]) -> dict[str, Any]:
    verified = all(sums.values())
    whole = hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in sorted(sums.items())).encode())
    return {
        "from": "hf" if to == "megatron" else "megatron",
        "to": to,
        "tensors_read": len(sums),
        "tensors_in_source": len(reader.entries),
        "tensors_written": len(written.entries),
        "bytes_written": sum(e.nbytes for e in written.entries.values()),
        "types": sorted({str(e.dtype).removeprefix("torch.") for e in written.entries.values()}),
        "files": files,
        "round_trip": "bit-exact" if verified else "not run",
        "source_sha256": whole.hexdigest() if verified else None,
        "versions": {"torch": torch.__version__, "safetensors": version("safetensors")},
    }
