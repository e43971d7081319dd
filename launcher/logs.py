"""The logs of a stage: one a component and rank in each attempt's folder, and the supervisor's own. Reads only.

ATTEMPT/COMPONENT.RANK.log     a component's output
ATTEMPT/supervisor.log         the supervisor's, on this machine
STAGE/JOB_0_log.out            the supervisor's, under Slurm: the job's batch log, of all its lives; of an element of
                               a job array, in the folder of the stage that was fanned out
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launcher import store
from launcher.attempts import Attempt
from launcher.errors import UserError
from launcher.spec import StageSpec

SUPERVISOR = "supervisor"


class NoLogYet(Exception):
    """There is no such log, but while the stage goes on there may be one."""


#: Bytes of a log's end in which its last lines are looked for.
_TAIL = 1 << 20
_NAME = re.compile(r"(?P<component>.+)\.(?P<rank>\d+)\.log")


def component_logs(folder: Path) -> dict[tuple[str, int], Path]:
    """Every component's log in an attempt's folder, by component and rank."""
    found = ((match, path) for path in sorted(folder.glob("*.log")) if (match := _NAME.fullmatch(path.name)))
    return {(match["component"], int(match["rank"])): path for match, path in found}


def supervisor_log(attempt: Attempt) -> Path:
    """The supervisor's own log of an attempt."""
    return _batch_log(attempt.folder.parent, attempt.job) or attempt.folder / "supervisor.log"


def _batch_log(stage: Path, job: str) -> Path | None:
    own = stage / f"{job}_0_log.out"
    return own if own.exists() else next(stage.parent.glob(f"*/{job}_0_log.out"), None)


def main_log(spec: StageSpec, attempt: Attempt) -> Path:
    """Where to look first: rank 0 of the stage's main component; the supervisor where that was not started."""
    found = component_logs(attempt.folder)
    names = [s.name for s in sorted(spec.steps, key=lambda s: s.role != "main")]
    first = next((found[name, 0] for name in names if (name, 0) in found), None)
    return first or next(iter(found.values()), supervisor_log(attempt))


def find_log(spec: StageSpec, attempt: Attempt, component: str | None, rank: int | None) -> Path:
    """The log that is asked for. Raises UserError where there is no such component, NoLogYet with those there are."""
    if component == SUPERVISOR:
        return supervisor_log(attempt)
    if component is None and rank is None:
        return main_log(spec, attempt)
    names = [s.name for s in sorted(spec.steps, key=lambda s: s.role != "main")]
    if component is not None and component not in names:
        listed = ", ".join([*names, SUPERVISOR])
        raise UserError(f"stage {spec.stage}: no component {component}; there is {listed}")
    name, found = component or names[0], component_logs(attempt.folder)
    if (name, rank or 0) not in found:
        raise NoLogYet(f"{attempt.folder}: no log of component {name}, rank {rank or 0}; {_known(found)}")
    return found[name, rank or 0]


def _known(found: dict[tuple[str, int], Path]) -> str:
    ranks: dict[str, list[int]] = {}
    for component, rank in found:
        ranks.setdefault(component, []).append(rank)
    listed = [f"{name} (rank {min(r)}{f' to {max(r)}' if len(r) > 1 else ''})" for name, r in ranks.items()]
    return f"there is {', '.join([*listed, SUPERVISOR])}"


def batch_log(root: Path, spec: StageSpec, job: str) -> Path | None:
    """What a job's batch script left, also where no supervisor began; None where there is nothing."""
    return _batch_log(store.stage_dir(root, spec.run, spec.stage), job)


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a file, however long it is."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            return file.read().decode(errors="replace").splitlines()[-lines:]
    except OSError:
        return []


@dataclass(frozen=True)
class Look:
    """Where a stage's log is now, and whether more may come."""

    path: Path | None
    goes_on: bool


def follow(look: Callable[[], Look], lines: int, poll_s: float) -> None:
    """Print the last lines of a log and what is appended to it, into the next attempt's log, until the stage ends.

    The place of each log is said on standard error.
    """
    path: Path | None = None
    place = 0
    while True:
        now = look()
        if path is not None:
            place = _print_from(path, place)
        if now.path is not None and now.path != path:
            first, path = path is None, now.path
            print(f"==> {path} <==", file=sys.stderr, flush=True)
            place = _start_of(path, lines) if first else 0
            place = _print_from(path, place)
        if not now.goes_on:
            return
        time.sleep(poll_s)


def _start_of(path: Path, lines: int) -> int:
    """The byte at which the last lines begin."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - _TAIL))
        kept = b"".join(file.read().splitlines(keepends=True)[-lines:])
    return size - len(kept)


def _print_from(path: Path, place: int) -> int:
    """Print what the file holds from byte `place` on; returns where it ends."""
    try:
        with path.open("rb") as file:
            file.seek(place)
            piece = file.read()
    except OSError:
        return place
    if piece:
        sys.stdout.write(piece.decode(errors="replace"))
        sys.stdout.flush()
    return place + len(piece)
