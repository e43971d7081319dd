"""Moving a table's tensors from a reader to a writer, and comparing what was written with what was read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from launcher.convert import lanes
from launcher.convert.entry import Entry, checksum
from launcher.convert.folders import Reader, Writer
from launcher.convert.links import Link
from launcher.errors import WorldError, listed

#: Called with the bytes of tensors that are done and all that there are, those to verify included.
Progress = Callable[[int, int], None]


def target_entries(reader: Reader, table: Sequence[Link]) -> dict[str, Entry]:
    """What will be written: the table's shapes, the source's types."""
    return {
        name: Entry(shape, link.dtype or reader.entries[link.sources[0]].dtype)
        for link in table
        for name, shape in zip(link.targets, link.target_shapes, strict=True)
    }


class Job:
    """The moving of a table's tensors, and their comparison: what was seen on the way."""

    def __init__(self, table: Sequence[Link], reader: Reader, progress: Progress, verify: bool):
        self.table, self.reader, self.verify = table, reader, verify
        self.source_sums: dict[str, str] = {}
        self.target_sums: dict[str, str] = {}
        self.rounded: list[str] = []
        self.not_finite: list[str] = []
        self.seconds: dict[str, float] = {}
        self._stamps = stamps(reader)
        total = sum(self._bytes(link) for link in table)
        self._report = Reporter(progress, total * (2 if verify else 1))
        largest = max((e.nbytes for e in reader.entries.values()), default=0)
        outputs = (e.nbytes for e in target_entries(reader, table).values())
        self._most = 2 * max(largest, *outputs)

    def _bytes(self, link: Link) -> int:
        return sum(self.reader.entries[name].nbytes for name in link.sources)

    def _cost(self, link: Link) -> int:
        wide = 3 if link.dtype is torch.float32 else 1
        return self._bytes(link) * (2 if link.copies else 1) * wide

    def move(self, writer: Writer) -> None:
        """Convert every row of the table into the writer, and close it. Raises WorldError where the source changed."""
        began = time.monotonic()
        shares = lanes.share_out(self.table, self._bytes, writer.lanes)
        try:
            lanes.run(shares, lambda lane, link: self._move(lane, link, writer), self._cost, self._most)
            writer.close()
        finally:
            writer.stop()
        check_unchanged(self._stamps)
        self.seconds["move"] = time.monotonic() - began

    def _move(self, lane: int, link: Link, writer: Writer) -> None:
        tensors = self.reader.read_together(link.sources)
        made = link.forward(tensors)
        for name, tensor in zip(link.targets, made, strict=True):
            writer.add(name, tensor, lane)
        if self.verify:
            self.source_sums |= self._sums(link, tensors)
            self.target_sums |= {n: checksum(t) for n, t in zip(link.targets, made, strict=True)} if link.dtype else {}
            self.not_finite += [n for n, t in zip(link.sources, tensors, strict=True) if not is_finite(t)]
        self._report.add(self._bytes(link))

    @staticmethod
    def _sums(link: Link, tensors: Sequence[Tensor]) -> dict[str, str]:
        return {name: checksum(link.content(tensor)) for name, tensor in zip(link.sources, tensors, strict=True)}

    def compare(self, written: Reader, exact: bool) -> None:
        """Turn what was written back into source tensors. Raises WorldError naming those that are not the same bytes.

        Not `exact`: what was written may be rounded, so it is compared with what was to be written, and `rounded` gets
        the source tensors whose bytes it does not give back.
        """
        began = time.monotonic()
        wrong: list[str] = []

        def one(_: int, link: Link) -> None:
            tensors = written.read_together(link.targets)
            if not exact:
                pairs = zip(link.targets, tensors, strict=True)
                wrong.extend(name for name, t in pairs if checksum(t) != self.target_sums[name])
            found = self._sums(link, link.back(tensors))
            differ = [name for name, digest in found.items() if digest != self.source_sums[name]]
            (wrong if exact else self.rounded).extend(differ)
            padding = ((n, t[link.rows :]) for n, t in zip(link.targets, tensors, strict=True) if link.rows)
            wrong.extend(name for name, rows in padding if rows.count_nonzero())
            self._report.add(self._bytes(link))

        lanes.run(lanes.share_out(self.table, self._bytes), one, self._cost, self._most)
        self.seconds["verify"] = time.monotonic() - began
        if wrong:
            raise WorldError(
                f"{written.where}: {listed(sorted(wrong))}: read back, not the bytes that were converted; convert again"
            )


def stamps(reader: Reader) -> dict[Path, tuple[int, int, int]]:
    """Which file each name of a reader means now, its size and when it was written."""
    return {path: _stamp(path) for path in reader.paths}


def _stamp(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def check_unchanged(before: Mapping[Path, tuple[int, int, int]]) -> None:
    """Raise WorldError where a file is not the one that it was when the reading began."""
    changed = [path for path in before if not path.exists() or _stamp(path) != before[path]]
    if changed:
        raise WorldError(f"{changed[0]}: changed while it was read; convert again once nothing writes to it")


class Reporter:
    """Adds up bytes from several threads."""

    def __init__(self, progress: Progress, total: int):
        self._progress, self._total, self._done = progress, total, 0
        self._lock = threading.Lock()
        progress(0, total)

    def add(self, size: int) -> None:
        """So many more bytes are done."""
        with self._lock:
            self._done += size
            self._progress(self._done, self._total)


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is nan or infinite: the extremes tell, for a tenth of what a look at each takes."""
    return not tensor.numel() or all(bool(x.isfinite()) for x in torch.aminmax(tensor))


def check_written(written: Reader, wanted: Mapping[str, Entry]) -> None:
    """Raise WorldError unless exactly the tensors wanted are there."""
    wrong = sorted(name for name in {*written.entries, *wanted} if written.entries.get(name) != wanted.get(name))
    if wrong:
        raise WorldError(f"{written.where}: {listed(wrong)}: not as they should be after writing; convert again")
