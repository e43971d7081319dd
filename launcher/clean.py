"""Freeing what nothing needs any more: found first, with sizes and reasons, then removed. Careful before thorough.

Nothing is waste that a living process or a job in the queue has a claim on, or may need: `busy` names the runs of which
that has to be assumed. Where a run's record cannot be read, nothing that it might name is touched.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from launcher import store
from launcher.attempts import attempts, attempts_at
from launcher.errors import UserError
from launcher.run_record import RunRecord, claimed, read_run
from launcher.spec import SpecError, StageSpec, read_stage
from launcher.store import Owner

#: Of a finished stage, the newest attempts whose logs stay.
KEPT_LOGS = 2
_ASIDE = ".removed."
_YOUNG_S = 3600.0
#: What `store` and `progress` call a file or claim before it gets its name, and `_remove` a folder that it removes.
_HALF_WRITTEN = re.compile(r"\.(?!told\.).+\.([a-z0-9_]{8}|\d+)")


@dataclass(frozen=True)
class Waste:
    """A folder or file that can go: its bytes, why, and the artifact (relative to the root) that it belongs to."""

    path: Path
    bytes: int
    why: str
    artifact: str | None = None


@dataclass(frozen=True)
class Store:
    """The runs under a root as far as they can be read; `unreadable` are those whose record cannot be.

    `by_hand` are stages of runs that have no record, since their jobs were submitted by a rendered `submit.sh`.
    """

    root: Path
    runs: tuple[RunRecord, ...]
    by_hand: tuple[StageSpec, ...]
    unreadable: tuple[str, ...]

    @property
    def named(self) -> Set[str]:
        """Every artifact that a run makes or reads, relative to the root."""
        specs = [*self.by_hand, *(s.spec for run in self.runs for s in run.stages)]
        read = {i.path for spec in specs for i in spec.inputs.values()}
        inside = {"/".join(path.split("/")[:3]) for path in read if not path.startswith("/")}
        return inside | {spec.artifact for spec in specs}


def read_store(root: Path) -> Store:
    """Every run under the root."""
    runs, by_hand, unreadable = [], [], []
    for folder in sorted(p for p in (root / "runs").glob("*") if p.is_dir()):
        try:
            if (folder / "run.json").exists():
                runs.append(read_run(root, folder.name))
            else:
                by_hand += [read_stage(path) for path in sorted(folder.glob("stages/*/stage.json"))]
        except (UserError, SpecError, OSError, ValueError):
            unreadable.append(folder.name)
    return Store(root, tuple(runs), tuple(by_hand), tuple(unreadable))


def find_waste(found: Store, busy: Set[str], run: str | None = None, artifacts: bool = False) -> list[Waste]:
    """What can go, of the whole store or of one run."""
    waste = [w for record in found.runs if run in (None, record.run) for w in _of_run(found.root, record, busy)]
    if run is None:
        waste += _of_artifacts(found, artifacts)
        waste += _of_snapshots(found, busy)
        waste += _litter(found.root)
    return waste


def _litter(root: Path) -> Iterator[Waste]:
    """Files and claims that were being written when their process was killed. Writing takes no hour."""
    for folder in ("artifacts/*", "runs", "runs/*", "runs/*/snapshot", "runs/*/stages/*", "runs/*/stages/*/*"):
        for path in sorted(root.glob(f"{folder}/.*")):
            aside = folder == "artifacts/*" and path.name.startswith(_ASIDE)
            if _HALF_WRITTEN.fullmatch(path.name) and not aside and _is_old(path):
                yield Waste(path, size_of(path), "half written by a process that was cut off")


def _is_old(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):  # whole by now
        return time.time() - path.lstat().st_mtime > _YOUNG_S
    return False


# -------------------------------------------------------------------------------------------------------------- uses


@dataclass(frozen=True)
class Uses:
    """Who may still need something: the names of `busy` runs, and whether the owner of a claim lives."""

    busy: Set[str]
    active: Set[str] | None

    def lives(self, owner: Owner) -> bool | None:
        """By its process on this machine, by its job elsewhere; None where that cannot be told."""
        return _lives(owner, self.active)


def _lives(owner: Owner, active: Set[str] | None) -> bool | None:
    alive = store.is_alive(owner)
    if alive is None and owner.job is not None and active is not None:
        return owner.job in active
    return alive


def owners(root: Path) -> list[Owner]:
    """Everybody who has a claim on an artifact."""
    found = (store.claim_holder(path) for path in (root / "artifacts").glob("*/*.claim"))
    return [owner for owner in found if owner is not None]


def uses(root: Path, submitted: Mapping[str, Set[str]], active: Set[str] | None) -> Uses:
    """The uses of what lies under a root.

    `submitted` maps every run to its jobs, `active` are the jobs that wait or run; None where Slurm does not answer.
    """
    busy = {
        run
        for run, jobs in submitted.items()
        if (jobs if active is None else jobs & active) or _is_driven(root, run) or _has_living(root, run, active)
    }
    return Uses(busy, active)


def _is_driven(root: Path, run: str) -> bool:
    driver = store.claim_holder(store.driver_claim(root, run))
    return driver is not None and store.is_alive(driver) is not False


def _has_living(root: Path, run: str, active: Set[str] | None) -> bool:
    found = [a for p in store.run_dir(root, run).glob("stages/*") for a, _ in attempts(root, run, p.name)]
    return any(a.end is None and a.owner is not None and _lives(a.owner, active) is not False for a in found)


# -------------------------------------------------------------------------------------------------------------- runs


def _of_run(root: Path, record: RunRecord, busy: Set[str]) -> Iterator[Waste]:
    """Logs of old attempts at finished stages; their events stay, from which the report knows what they cost."""
    if record.run in busy:
        return
    for stage in record.stages:
        if store.read_receipt(root, stage.spec.artifact) is None:
            continue
        for attempt in attempts_at(root, stage.spec)[:-KEPT_LOGS]:
            for path in sorted(attempt.folder.glob("*.log")):
                yield Waste(path, size_of(path), f"log of an attempt before the last {KEPT_LOGS} at a finished stage")


def _of_snapshots(found: Store, busy: Set[str]) -> Iterator[Waste]:
    """Code that no stage of its run uses or has used, and of runs that are gone.

    A young one may be of a run that is being submitted: it is there before the run's record.
    """
    for folder in sorted((found.root / "runs").glob("*/snapshot/*")):
        run = folder.parent.parent
        if run.name in busy or run.name in found.unreadable or time.time() - folder.stat().st_mtime < _YOUNG_S:
            continue
        planned = [s.spec for record in found.runs if record.run == run.name for s in record.stages]
        try:
            begun = [read_stage(path) for path in run.glob("stages/*/stage.json")]
        except (SpecError, OSError, ValueError):
            continue
        if folder.name not in {Path(spec.snapshot).name for spec in (*planned, *begun) if spec.snapshot}:
            yield Waste(folder, size_of(folder), "code that no stage of its run uses")


# ---------------------------------------------------------------------------------------------------------- artifacts


def _of_artifacts(found: Store, whole: bool) -> Iterator[Waste]:
    for path in sorted((found.root / "artifacts").glob("*/*")):
        if path.name.startswith(_ASIDE):
            yield Waste(path, size_of(path), "left by a `clean` that was cut off")
        name, _, suffix = path.name.partition(".")
        artifact = f"artifacts/{path.parent.name}/{name}"
        why = _why(found, artifact, suffix, whole)
        if why is not None and name and path.is_dir():
            yield Waste(path, size_of(path), why, artifact)
        progress = path / store.PROGRESS
        if not suffix and name and progress.is_dir() and store.read_receipt(found.root, artifact) is not None:
            yield Waste(progress, size_of(progress), "progress of a finished artifact", artifact)


def _why(found: Store, artifact: str, suffix: str, whole: bool) -> str | None:
    """Why a folder of an artifact is waste; None where it is not."""
    finished = store.read_receipt(found.root, artifact) is not None
    needed = bool(found.unreadable) or artifact in found.named
    if suffix == "partial":
        if finished:
            return "left over beside the finished artifact"
        return None if needed else "unfinished, and no run plans it any more"
    if suffix.startswith("damaged"):
        return "damaged, and made anew since" if finished else None
    return "no run names it" if not suffix and whole and finished and not needed else None


# ------------------------------------------------------------------------------------------------------------ removing


def remove(
    found: Iterable[Waste], root: Path, still: Callable[[], Iterable[Waste]], lives: Callable[[Owner], bool | None]
) -> tuple[list[Waste], list[Waste]]:
    """Remove what is still waste once it is claimed; returns what has gone, and what another process holds.

    The claims come first and the second look after them, so that what a run began to need meanwhile stays.
    """
    owner, held, taken = store.this_process(), set(), {}
    waste = list(found)
    try:
        for artifact in {w.artifact for w in waste if w.artifact}:
            folder = store.claim_dir(root, artifact)
            if store.claim(folder, owner, lives) is None:
                taken[artifact] = folder
            else:
                held.add(artifact)
        again = {w.path for w in still()}
        gone = [w for w in waste if w.path in again and w.artifact not in held]
        for one in gone:
            _remove(one.path)
        return gone, [w for w in waste if w.artifact in held]
    finally:
        for folder in taken.values():
            store.release(folder, owner)


def _remove(path: Path) -> None:
    """Out of the way at once, then away: whatever interrupts it, no half of it stands under its name."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    aside = Path(tempfile.mkdtemp(prefix=_ASIDE, dir=path.parent))
    os.rename(path, aside / path.name)
    shutil.rmtree(aside)


def run_as_waste(root: Path, run: str, busy: Set[str]) -> Waste:
    """The record of a run. Raises UserError where it is still in use."""
    if run in busy:
        raise UserError(
            f"run {run} is still in use, or its jobs cannot be asked after: `prism-launch cancel {run}` first"
        )
    folder = store.run_dir(root, run)
    return Waste(folder, size_of(folder), "record of the run, with its logs and report")


def forget(root: Path, waste: Waste) -> None:
    """Remove the record of a run, in its claim. Raises UserError where another process has that."""
    with claimed(root, waste.path.name):
        _remove(waste.path)


def size_of(path: Path) -> int:
    """Bytes of a file or of all files in a folder, links not followed."""
    files = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
    total = 0
    for file in files:
        with contextlib.suppress(OSError):
            stat = file.lstat()
            total += 0 if file.is_dir() and not file.is_symlink() else stat.st_size
    return total
