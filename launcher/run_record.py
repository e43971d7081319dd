"""`run.json`: what a run is. Written by the login side alone, read by status and report. Standard library only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher import store
from launcher.configs import Resources
from launcher.errors import UserError
from launcher.spec import SpecError, StageSpec, decode, encode


@dataclass(frozen=True)
class PlannedStage:
    """A stage of a plan: its spec, the stages it waits for, what it asks of the cluster, whether the plan added it.

    `part_of` names the stage of the recipe that was fanned out into this one and others like it; `not_built` says why
    this version plans and renders the stage but cannot run it.
    """

    spec: StageSpec
    depends: tuple[str, ...]
    resources: Resources
    inserted: bool = False
    part_of: str | None = None
    not_built: str | None = None


@dataclass(frozen=True)
class RunRecord:
    """A run: the recipe as resolved and its plan, in an order in which it can be executed."""

    run: str
    recipe: str
    overrides: tuple[str, ...]
    cluster: str
    resolved: Mapping[str, Any]
    stages: tuple[PlannedStage, ...]
    created: float
    versions: Mapping[str, str]
    git: str | None = None
    schema: int = 1

    def stage(self, name: str) -> PlannedStage:
        """The stage of this name. Raises UserError with the names there are."""
        for stage in self.stages:
            if stage.spec.stage == name:
                return stage
        names = ", ".join(s.spec.stage for s in self.stages)
        raise UserError(f"run {self.run}: no stage {name}; there is {names}")


def write_run(root: Path, record: RunRecord) -> None:
    """Write `run.json`, atomically."""
    store.write_json(store.run_dir(root, record.run) / "run.json", encode(record))


def read_run(root: Path, run: str) -> RunRecord:
    """Read a run, which is called as its folder is now. Raises UserError where there is none or of another version."""
    path = store.run_dir(root, run) / "run.json"
    data = store.read_json(path)
    if data is None:
        if path.exists():
            raise UserError(f"{path}: damaged, not whole JSON; `prism-launch run RECIPE` writes it anew")
        known = ", ".join(list_runs(root)) or "none"
        raise UserError(f"{path}: no such run; runs under this root: {known}")
    try:
        record = decode(RunRecord, data)
    except SpecError as error:
        raise UserError(f"{path}: not readable by this version of prism-launch: {error}") from None
    return record if record.run == run else _renamed(record, run)


def _renamed(record: RunRecord, run: str) -> RunRecord:
    """The record of a run whose folder has been moved to another name."""
    stages = tuple(replace(stage, spec=replace(stage.spec, run=run)) for stage in record.stages)
    return replace(record, run=run, stages=stages)


def list_runs(root: Path) -> list[str]:
    """Names of the runs under a root, the latest written first."""
    found = list((root / "runs").glob("*/run.json"))
    return [p.parent.name for p in sorted(found, key=lambda p: p.stat().st_mtime, reverse=True)]


@contextlib.contextmanager
def claimed(root: Path, run: str) -> Iterator[None]:
    """Hold the claim on a run. Raises UserError where another process has it."""
    owner, folder = store.this_process(), store.driver_claim(root, run)
    holder = store.claim(folder, owner)
    if holder is not None:
        gone = f"; if {holder.host} is gone, remove {folder}" if store.is_alive(holder) is None else ""
        at = f"{run} --root {root}"
        raise UserError(
            f"{store.run_dir(root, run)}: process {holder.pid} on {holder.host} is running it; follow it with "
            f"`prism-launch watch {at}`, stop it with `prism-launch cancel {at}`, or choose another --name{gone}"
        )
    try:
        yield
    finally:
        store.release(folder, owner)
