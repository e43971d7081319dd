"""`run.json`: what a run is. Written by the login side alone, read by status and report. Standard library only."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from launcher import store
from launcher.configs import Component, Resources
from launcher.errors import UserError
from launcher.spec import SpecError, StageSpec, decode, encode


@dataclass(frozen=True)
class PlannedStage:
    """A stage of a plan: its spec, the stages it waits for, what it asks of the cluster, whether the plan added it.

    `part_of` names the stage of the recipe that was fanned out into this one and others like it; `not_built` says why
    this version plans and renders the stage but cannot run it; `absent` lists what it reads that was not there when it
    was planned, so that its fingerprint is not the one that it will run with.
    """

    spec: StageSpec
    depends: tuple[str, ...]
    resources: Resources
    inserted: bool = False
    part_of: str | None = None
    not_built: str | None = None
    absent: tuple[str, ...] = ()

    @property
    def obstacles(self) -> tuple[str, ...]:
        """Why the stage cannot be run as it was planned; none for most."""
        more = f" and {len(self.absent) - 2} more" if len(self.absent) > 2 else ""
        unseen = f"not there when this was planned: {', '.join(self.absent[:2])}{more}"
        return (*([f"not built yet: {self.not_built}"] if self.not_built else []), *([unseen] if self.absent else []))

    @property
    def job_parts(self) -> Mapping[str | None, Resources]:
        """What each part of the stage's job asks for: the main program's, under None, and those of components that are
        parts of a heterogeneous job."""
        asked, steps = self.resources, self.spec.steps
        main = [s for s in steps if not s.het_group]
        parts: dict[str | None, Resources] = {None: replace(asked, nodes=max(s.first_node + s.nodes for s in main))}
        for step in (s for s in steps if s.het_group):
            own = replace(asked.components.get(step.name, Component()), nodes=step.nodes)
            values: dict[str, Any] = {f.name: getattr(own, f.name) for f in fields(own)}
            parts[step.name] = replace(asked, **values, components={}, placement="shared")
        return parts

    def path_of(self, part: str | None, key: str) -> str:
        """Where a recipe says what a part of the job asks for."""
        own = f"components.{part}"  # which has no key for what it shares with the stage
        inner = (f"{own}.{key}" if key in {f.name for f in fields(Component)} else own) if part else key
        return f"stages.{self.part_of or self.spec.stage}.resources.{inner}"

    @property
    def gpus(self) -> int:
        """GPUs that the whole job holds, those of components included."""
        return sum(part.nodes * part.gpus_per_node for part in self.job_parts.values())

    @property
    def cores(self) -> int:
        """Cores that the whole job holds, those of components included."""
        return sum(part.nodes * part.ntasks_per_node * part.cpus_per_task for part in self.job_parts.values())


@dataclass(frozen=True)
class RunRecord:
    """A run: the recipe as resolved and its plan, in an order in which it can be executed.

    `notes` say what lies beside its inputs and is not read.
    """

    run: str
    recipe: str
    overrides: tuple[str, ...]
    cluster: str
    resolved: Mapping[str, Any]
    stages: tuple[PlannedStage, ...]
    created: float
    versions: Mapping[str, str]
    git: str | None = None
    notes: tuple[str, ...] = ()
    schema: int = 1

    def stage(self, name: str) -> PlannedStage:
        """The stage of this name. Raises UserError with the names there are."""
        for stage in self.stages:
            if stage.spec.stage == name:
                return stage
        names = ", ".join(s.spec.stage for s in self.stages)
        raise UserError(f"run {self.run}: no stage {name}; there is {names}")


def refuse_unbuilt(records: Iterable[RunRecord]) -> None:
    """Raises UserError with every stage that is planned and rendered but cannot be run, each with the reasons."""
    problems = obstacles_of(records)
    if problems:
        raise UserError(problems)


def obstacles_of(records: Iterable[RunRecord]) -> list[str]:
    """Why stages cannot be run, a line each."""
    found = [
        f"stages.{stage.part_of or stage.spec.stage}: {why}"
        for record in records
        for stage in record.stages
        for why in stage.obstacles
    ]
    return list(dict.fromkeys(found))


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
def claimed(root: Path, run: str, patience_s: float = 0.0) -> Iterator[None]:
    """Hold the claim on a run. Raises UserError where another process has it and keeps it for `patience_s`."""
    owner, folder = store.this_process(), store.driver_claim(root, run)
    end = time.monotonic() + patience_s
    while (holder := store.claim(folder, owner)) is not None and time.monotonic() < end:
        time.sleep(0.2)
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
