"""For how long no heartbeat came, at a cost that hardly grows with the ranks; and the clock that measures limits."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from launcher.spec import StageSpec

#: The longest gap between two looks at the clock that counts as time that passed.
_GAP_S = 1.0


class RunningTime:
    """Seconds for which this process ran, as far as its looks tell.

    A longer gap means that it was stopped (a suspended job, a stopped process group) or stuck in a call (a file system
    that stalls): so were those that it watches, and it gives the time back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._last, self._ran = clock, clock(), 0.0

    def __call__(self) -> float:
        """Seconds since it was made."""
        now = self._clock()
        self._ran += min(now - self._last, _GAP_S)
        self._last = now
        return self._ran


class Heartbeats:
    """The heartbeats of an attempt: rank 0 of each step is looked at often, all ranks where those are silent."""

    def __init__(self, spec: StageSpec, folder: Path, now: float):
        self.folder, self.hang_s = folder, spec.limits.hang_s
        self.firsts = [f"heartbeat.{step.name}.0.json" for step in spec.steps]
        self.seen = self.looked = self.looked_at_all = now
        self.newest: dict[str, int] = {}
        self.all: dict[str, int] | None = None

    def silence(self, now: float) -> float:
        """Seconds since the last heartbeat by a clock whose `now` is given; looks at the files only when it is time."""
        if now - self.looked < self.hang_s / 200:
            return now - self.seen
        try:
            found = {name: beaten for name in self.firsts if (beaten := _written(self.folder / name))}
            if found != self.newest or self._others_beat(now):
                self.newest, self.seen = found, now
        except OSError:  # a file system that is away: nobody can write there either
            self.seen += now - self.looked
        self.looked = now
        return now - self.seen

    def _others_beat(self, now: float) -> bool:
        """Whether any rank has beaten since the look before; the first of a silence only looks."""
        if now - self.seen < self.hang_s / 4 or now - self.looked_at_all < self.hang_s / 10:
            return False
        is_first = self.looked_at_all < self.seen
        self.looked_at_all, before = now, self.all
        self.all = {p.name: _written(p) for p in self.folder.glob("heartbeat.*.json")}
        return not is_first and self.all != before


def _written(path: Path) -> int:
    """When a file was replaced last, in its file system's own time; 0 where it is not there."""
    try:
        return os.stat(path).st_mtime_ns
    except FileNotFoundError:
        return 0
