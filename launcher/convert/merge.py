"""A linear combination of checkpoints of one model, tensor by tensor, in the format of the first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launcher.convert import lanes, run_config
from launcher.convert.conversion import digest_of, torch_dist_writer
from launcher.convert.entry import Entry, checksum
from launcher.convert.files import in_folder, leave_cache
from launcher.convert.folders import Checkpoint, Reader, Writer, copy_side_files, model_alone, open_checkpoint
from launcher.convert.hf import HfReader, HfWriter
from launcher.convert.moving import Progress, Reporter, check_unchanged, check_written, is_finite, stamps
from launcher.convert.target import check_room
from launcher.convert.torch_dist import TorchDistReader
from launcher.errors import UserError, WorldError, bounded, listed
from launcher.models.checkpoints import CARRIED
from launcher.models.torch_dist import RELEASE, TRACKER

_ROOM_BESIDE = 64 << 20


def merge(
    sources: Sequence[Path],
    weights: Sequence[float],
    target: Path,
    verify: bool = True,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Fill the empty folder `target` with the sum of the checkpoints times their weights; returns the verification.

    Sums are made in fp32 and rounded once, to the first checkpoint's type, as are its config and tokenizer. Raises
    UserError where the checkpoints are not of one model and format, WorldError where the disk has no room or what was
    written is not what was computed.
    """
    if len(sources) != len(weights) or len(sources) < 2:
        raise UserError(
            f"merge: {len(sources)} checkpoints and {len(weights)} weights; one weight for each of two or more"
        )
    found = [open_checkpoint(path) for path in sources]
    _check(found)
    found = [model_alone(one) for one in found]
    _check_shapes(found)
    first = found[0]
    entries = first.reader.entries
    check_room(target, sum(e.nbytes + 4096 for e in entries.values()) + _ROOM_BESIDE)
    hf = first.format == "hf"
    writer: Writer = HfWriter(target, entries) if hf else torch_dist_writer(target, "megatron", entries, first.shape)
    if not hf:
        (target / TRACKER).write_text(RELEASE, encoding="utf-8")
        weights_type = entries["embedding.word_embeddings.weight"].dtype
        run_config.write(target / RELEASE, first.shape, weights_type, first.config)
    files = copy_side_files(first.side, target if hf else target / CARRIED)
    before = [stamps(one.reader) for one in found]
    sums, not_finite = _sum_all(found, weights, writer, verify, progress)
    for seen in before:
        check_unchanged(seen)
    if verify:
        leave_cache(target)
    place = target / RELEASE
    written: Reader = HfReader(target) if hf else TorchDistReader(place, in_folder(place))
    check_written(written, entries)
    wrong = sorted(name for name in entries if verify and checksum(written.read(name)) != sums[name])
    if wrong:
        raise WorldError(f"{written.where}: {listed(wrong)}: read back, not what was computed; merge again")
    return {
        "format": first.format,
        "family": first.shape.family,
        "weights": list(weights),
        "tensors_read": len(entries) * len(sources),
        "tensors_written": len(written.entries),
        "bytes_written": sum(e.nbytes for e in written.entries.values()),
        "files": files,
        "read_back": "the bytes that were computed" if verify else "not run",
        "sha256": digest_of(sums) if verify else None,
        "not_finite": not_finite,
        "notes": [*_notes(weights), *(f"{one.where}: {note}" for one in found for note in one.notes)],
        "versions": {"torch": torch.__version__},
    }


def _notes(weights: Sequence[float]) -> list[str]:
    total = math.fsum(weights)
    return [f"the weights add up to {total:g}, not 1"] if abs(total - 1) > 1e-6 else []


def _check(found: Sequence[Checkpoint]) -> None:
    first = found[0]
    problems = []
    if first.format == "nemo":
        problems.append(f"{first.where}: merge takes formats hf and megatron; convert it to hf first")
    for other in found[1:]:
        if other.format != first.format:
            problems.append(f"{other.where}: of format {other.format}, {first.where} is {first.format}")
        if other.shape != first.shape:
            problems.append(f"{other.where}: config.json describes another model than that of {first.where}")
    if problems:
        raise UserError(problems)


def _check_shapes(found: Sequence[Checkpoint]) -> None:
    first = found[0]
    differ = [
        f"{other.reader.where}: {name} is {list(other.reader.entries[name].shape)}, the first has {list(entry.shape)}"
        for other in found[1:]
        for name, entry in first.reader.entries.items()
        if other.reader.entries[name].shape != entry.shape
    ]
    if differ:
        raise UserError(bounded(differ, first.where))


def _sum_all(
    found: Sequence[Checkpoint], weights: Sequence[float], writer: Writer, verify: bool, progress: Progress
) -> tuple[dict[str, str], list[str]]:
    """Write every tensor; returns checksums of what was written and the names of those with nan or infinity."""
    entries: dict[str, Entry] = found[0].reader.entries
    report = Reporter(progress, sum(e.nbytes for e in entries.values()))
    sums: dict[str, str] = {}
    not_finite: list[str] = []

    def one(lane: int, name: str) -> None:
        tensor = combine([c.reader.read(name) for c in found], weights)
        writer.add(name, tensor, lane)
        if verify:
            sums[name] = checksum(tensor)
        if not is_finite(tensor):
            not_finite.append(name)
        report.add(entries[name].nbytes)

    def size(name: str) -> int:
        return entries[name].nbytes

    try:
        lanes.run(
            lanes.share_out(list(entries), size), one, lambda n: len(found) * size(n), 2 * max(map(size, entries))
        )
        writer.close()
    finally:
        writer.stop()
    return sums, sorted(not_finite)


#: Elements that are summed at a time, so that fp32 copies stay small whatever a tensor's size.
_PIECE = 1 << 20


def combine(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The sum of tensors of one shape times their weights, in fp32, rounded to the first one's type.

    It is made in the first tensor's place.
    """
    whole = tensors[0].reshape(-1)
    pieces = [t.reshape(-1).split(_PIECE) for t in tensors]
    wide = torch.float64 if whole.dtype is torch.float64 else torch.float32
    used = [i for i, weight in enumerate(weights) if weight]  # zero times infinity is no number: it has no say
    for parts in zip(*pieces, strict=True):
        terms = [parts[i].to(wide) * weights[i] for i in used]
        parts[0].copy_(sum(terms[1:], start=terms[0]) if terms else torch.zeros_like(parts[0]))
    return whole.view(tensors[0].shape)
