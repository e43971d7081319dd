"""The attempts at a stage as their files tell them: events, heartbeats. Reads only; standard library only.

What the files say is decoded here, once, into values with types: a damaged line or file costs what it would have said,
and is told as damage. The middle of very long events is passed over: what counts stands at both ends.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher import store
from launcher.errors import bounded
from launcher.spec import SpecError, StageSpec, decode
from launcher.store import Owner
from launcher.units import NO_TIME

EVENTS = "events.jsonl"
#: Bytes that are read at the beginning and at the end of a longer file of events.
_EDGE = 1 << 20


@dataclass(frozen=True)
class Beat:
    """A heartbeat: `step` of `total` done. `first_step` and `first_time` are those of the attempt's first heartbeat."""

    time: float
    step: int
    total: int = 0
    figures: Mapping[str, float | int | str] = field(default_factory=dict)
    first_step: int | None = None
    first_time: float | None = None

    def get(self, name: str, default: Any = None) -> Any:
        """A figure of the heartbeat by its name, `step`, `total` and `time` among them."""
        own = {"step": self.step, "total": self.total, "time": self.time}
        return own.get(name, self.figures.get(name, default))


@dataclass(frozen=True)
class End:
    """How an attempt ended, in its supervisor's words. `log` is the name of a file in the attempt's folder."""

    time: float
    exit_class: str
    message: str = ""
    action: str = "stop"
    seconds: float | None = None
    excluded: tuple[str, ...] = ()
    suspect: tuple[str, ...] = ()
    log: str | None = None
    tail: tuple[str, ...] = ()


@dataclass(frozen=True)
class Attempt:
    """One attempt as its files tell it. `end` is its last word where it has ended; `beat` the newest heartbeat.

    `number` counts the stage's attempts, from 1; None in stores of before it was written down.
    """

    name: str
    folder: Path
    started: float
    owner: Owner | None
    end: End | None
    beat: Beat | None
    note: str = ""
    number: int | None = None

    @property
    def job(self) -> str:
        """The Slurm job that it is a life of; `local` outside Slurm."""
        return self.name.partition(".")[0]

    @property
    def is_living(self) -> bool:
        """Whether its supervisor lives, as far as this machine can tell."""
        return self.end is None and self.owner is not None and store.is_alive(self.owner) is not False

    @property
    def wants_another(self) -> bool:
        """Whether it ended with another life to come."""
        return self.end is not None and self.end.action == "again"


def attempts(root: Path, run: str, stage: str) -> list[tuple[Attempt, str]]:
    """Every attempt at a stage with its fingerprint, the oldest first."""
    return read_attempts(root, run, stage)[0]


def read_attempts(root: Path, run: str, stage: str) -> tuple[list[tuple[Attempt, str]], list[str]]:
    """Every attempt at a stage with its fingerprint, the oldest first; and what is damaged, each with its path."""
    damage: list[str] = []
    folder = store.stage_dir(root, run, stage)
    paths = sorted(folder.glob(f"*/{EVENTS}"))
    found = [attempt for path in paths if (attempt := _read_attempt(path, damage)) is not None]
    return _in_order(found), bounded(damage, folder, "more damaged files")


def attempts_at(root: Path, spec: StageSpec) -> list[Attempt]:
    """The attempts at what is planned now, the oldest first; those of an earlier plan do not count."""
    return [a for a, fingerprint in attempts(root, spec.run, spec.stage) if fingerprint == spec.fingerprint]


def newest_attempt(root: Path, spec: StageSpec) -> Attempt | None:
    """The newest attempt at what is planned now."""
    found = attempts_at(root, spec)
    return found[-1] if found else None


def next_number(root: Path, spec: StageSpec) -> int:
    """The number of an attempt that begins now."""
    known = attempts(root, spec.run, spec.stage)
    return 1 + max((attempt.number or place for place, (attempt, _) in enumerate(known, 1)), default=0)


def step_of(attempt: Attempt) -> int:
    """The step that an attempt had got to by its last heartbeat."""
    return attempt.beat.step if attempt.beat else 0


def _in_order(found: Sequence[tuple[Attempt, str]]) -> list[tuple[Attempt, str]]:
    """The oldest first, by what attempts say of one another: clocks are set back, and differ between nodes.

    Those without a number are older than all that have one. They stand by time, but the lives of one job, and local
    attempts, by the numbers in their names.
    """
    unnumbered = sorted((f for f in found if f[0].number is None), key=lambda f: f[0].started)
    lives: dict[str, list[tuple[Attempt, str]]] = {}
    for one in sorted(unnumbered, key=lambda f: _lives_before(f[0])):
        lives.setdefault(one[0].job, []).append(one)
    older = [lives[attempt.job].pop(0) for attempt, _ in unnumbered]
    numbered = (f for f in found if f[0].number is not None)
    return older + sorted(numbered, key=lambda f: (f[0].number, f[0].started, _lives_before(f[0])))


def _lives_before(attempt: Attempt) -> tuple[int, ...]:
    return tuple(int(word) if word.isdecimal() else -1 for word in attempt.name.split(".")[1:])


# ----------------------------------------------------------------------------------------------------------- decoding


class _Damaged(Exception):
    """What stands there is not what it should be."""


def _read_attempt(path: Path, damage: list[str]) -> tuple[Attempt, str] | None:
    events = _read_events(path, damage)
    start = next((e for e in events if e.get("event") == "start"), None)
    if start is None:
        if events:
            damage.append(f"{path}: its start cannot be read, so this attempt does not count")
        return None
    try:
        started, fingerprint = _time(start.get("time")), _text(start.get("fingerprint"))
    except _Damaged as error:
        damage.append(f"{path}: its start cannot be read ({error}), so this attempt does not count")
        return None
    last, end = _last_word(path, events, damage)
    attempt = Attempt(
        name=path.parent.name,
        folder=path.parent,
        started=started,
        owner=_owner(start.get("owner")),
        end=end,
        beat=_newest_beat(path.parent, damage),
        note=_text(last.get("message")),
        number=_count(start.get("number")),
    )
    return attempt, fingerprint


def _last_word(path: Path, events: Sequence[dict[str, Any]], damage: list[str]) -> tuple[Mapping[str, Any], End | None]:
    """The last event that can be read, and the end that it tells of."""
    for event in reversed(events):
        if event.get("event") != "end":
            return event, None
        try:
            return event, _end(event)
        except _Damaged as error:
            damage.append(f"{path}: its end cannot be read ({error})")
    return {}, None


def _read_events(path: Path, damage: list[str]) -> list[dict[str, Any]]:
    """The events at both ends of the file, but those of the hook, whose trouble says nothing of the work.

    A killed supervisor may have left half a line, which is no damage.
    """
    try:
        lines = _lines_at_both_ends(path)
    except FileNotFoundError:  # removed meanwhile
        return []
    except OSError as error:
        damage.append(f"{path}: {error.strerror or error}")
        return []
    found, broken = [], 0
    for line in lines:
        event = _json(line)
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            found.append(event)
        elif line.endswith(b"\n"):
            broken += 1
    if broken:
        damage.append(f"{path}: {broken} {'line is' if broken == 1 else 'lines are'} damaged and passed over")
    return [e for e in found if e["event"] != "notify"]


def _lines_at_both_ends(path: Path) -> list[bytes]:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= 2 * _EDGE:
            return file.read(2 * _EDGE).splitlines(keepends=True)
        head = file.read(_EDGE).splitlines(keepends=True)
        file.seek(size - _EDGE)
        return [*head[:-1], *file.read(_EDGE).splitlines(keepends=True)[1:]]


def _json(text: bytes) -> Any:
    """The value that stands there; None where there is none, or one that nests too deep."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _read_small(path: Path) -> Any:
    with path.open("rb") as file:
        return _json(file.read(_EDGE))


def _newest_beat(folder: Path, damage: list[str]) -> Beat | None:
    """The newest heartbeat of those ranks that write the most; of all, where those wrote none that can be read."""
    firsts = sorted(folder.glob("heartbeat.*.0.json"))
    newest = _newest(firsts, damage)
    return newest or _newest(sorted(set(folder.glob("heartbeat.*.json")) - set(firsts)), damage)


def _newest(paths: Iterable[Path], damage: list[str]) -> Beat | None:
    found = []
    for path in paths:
        try:
            found.append(_beat(_read_small(path)))
        except FileNotFoundError:
            continue
        except OSError as error:
            damage.append(f"{path}: {error.strerror or error}")
        except _Damaged as error:
            damage.append(f"{path}: is no heartbeat ({error})")
    return max(found, key=lambda beat: beat.time, default=None)


def _beat(data: Any) -> Beat:
    if not isinstance(data, dict):
        raise _Damaged("not an object")
    step = _count(data.get("step"))
    if step is None:
        raise _Damaged("no step")
    first = data.get("first")
    first = first if isinstance(first, dict) else {}
    return Beat(
        time=_time(data.get("time")),
        step=step,
        total=_count(data.get("total")) or 0,
        figures=_figures(data.get("figures")),
        first_step=_count(first.get("step")),
        first_time=_number(first.get("time")),
    )


def _end(event: Mapping[str, Any]) -> End:
    exit_class, log = event.get("class"), _text(event.get("log"))
    if not isinstance(exit_class, str):
        raise _Damaged("no class")
    return End(
        time=_time(event.get("time")),
        exit_class=exit_class,
        message=_text(event.get("message")),
        action=_text(event.get("action")) or "stop",
        seconds=_number(event.get("seconds")),
        excluded=_texts(event.get("excluded")),
        suspect=_texts(event.get("suspect")),
        log=log if log and "/" not in log and "\0" not in log else None,  # nothing outside the attempt's folder
        tail=_texts(event.get("tail")),
    )


def _owner(data: Any) -> Owner | None:
    try:
        return decode(Owner, data)
    except SpecError:
        return None


def _figures(data: Any) -> Mapping[str, float | int | str]:
    known = data.items() if isinstance(data, dict) else ()
    return {_text(k): _text(v) if isinstance(v, str) else v for k, v in known if _is_figure(v)}


def _is_figure(value: Any) -> bool:
    return isinstance(value, (str, float)) or _is_whole(value)


def _time(value: Any) -> float:
    number = _number(value)
    if number is None or not 0 <= number < NO_TIME:
        raise _Damaged("no time")
    return number


def _number(value: Any) -> float | None:
    if _is_whole(value) or (isinstance(value, float) and math.isfinite(value)):
        return float(value)
    return None


def _count(value: Any) -> int | None:
    return int(value) if _is_whole(value) and value >= 0 else None


def _is_whole(value: Any) -> bool:
    """Whether it is a whole number that every other reader takes too."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63


def _text(value: Any) -> str:
    """The text, as UTF-8 can hold it."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else ""


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(_text(v) for v in value if isinstance(v, str)) if isinstance(value, list) else ()


# ---------------------------------------------------------------------------------------------------------------- logs


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
