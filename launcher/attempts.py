"""The attempts at a stage as their files tell them: events, heartbeats. Reads only; standard library only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import store
from launcher.spec import SpecError, StageSpec, decode
from launcher.store import Owner


@dataclass(frozen=True)
class Attempt:
    """One attempt as its files tell it. `end` is its last event where it has ended; `beat` the newest heartbeat."""

    name: str
    folder: Path
    started: float
    owner: Owner | None
    end: Mapping[str, Any] | None
    beat: Mapping[str, Any] | None
    note: str = ""

    @property
    def is_living(self) -> bool:
        """Whether its supervisor lives, as far as this machine can tell."""
        return self.end is None and self.owner is not None and store.is_alive(self.owner) is not False


def attempts(root: Path, run: str, stage: str) -> list[tuple[Attempt, str]]:
    """Every attempt at a stage with its fingerprint, the oldest first."""
    found = [_read_attempt(p) for p in store.stage_dir(root, run, stage).glob("*/events.jsonl")]
    return sorted((f for f in found if f is not None), key=lambda f: f[0].started)


def attempts_at(root: Path, spec: StageSpec) -> list[Attempt]:
    """The attempts at what is planned now, the oldest first; those of an earlier plan do not count."""
    return [a for a, fingerprint in attempts(root, spec.run, spec.stage) if fingerprint == spec.fingerprint]


def newest_attempt(root: Path, spec: StageSpec) -> Attempt | None:
    """The newest attempt at what is planned now."""
    found = attempts_at(root, spec)
    return found[-1] if found else None


def _read_attempt(path: Path) -> tuple[Attempt, str] | None:
    events = [e for e in _read_events(path) if e["event"] != "notify"]  # a hook's trouble says nothing of the work
    if not events or events[0].get("event") != "start":
        return None
    first, last = events[0], events[-1]
    try:
        owner: Owner | None = decode(Owner, first.get("owner"))
    except SpecError:
        owner = None
    attempt = Attempt(
        name=path.parent.name,
        folder=path.parent,
        started=float(first["time"]),
        owner=owner,
        end=last if last["event"] == "end" else None,
        beat=_newest_beat(path.parent),
        note=str(last.get("message", "")),
    )
    return attempt, str(first.get("fingerprint", ""))


def _read_events(path: Path) -> list[dict[str, Any]]:
    """The events that are whole lines; a killed supervisor may have left half of one."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [e for e in found if isinstance(e, dict) and "event" in e]


def _newest_beat(folder: Path) -> Mapping[str, Any] | None:
    beats = [store.read_json(p) for p in folder.glob("heartbeat.*.json")]
    return max((b for b in beats if b), key=lambda b: float(b["time"]), default=None)


def last_words(folder: Path, step: str, rank: int, lines: int = 5) -> dict[str, Any]:
    """Name and last lines of a rank's log; of its srun's, or nothing, where the rank said nothing."""
    for name in (f"{step}.{rank}.log", f"{step}.srun.log"):
        tail = tail_of(folder / name, lines)
        if tail:
            return {"log": name, "tail": tail}
    return {}


def tail_of(path: Path, lines: int) -> list[str]:
    """The last lines of a file that are not empty, each cut to 500 characters; none where there is no file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 64 * 1024))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line.rstrip()[:500] for line in text.splitlines() if line.strip()][-lines:]


def step_of(attempt: Attempt) -> int:
    """The step that an attempt had got to by its last heartbeat."""
    return int((attempt.beat or {}).get("step", 0))
