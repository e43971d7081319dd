"""What every stage of a run is doing: a fold over receipts, the attempts' events and heartbeats. Reads only.

A receipt beats everything; then the newest attempt of the planned fingerprint: its last event, or whether its
supervisor lives.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from launcher import store
from launcher.run_record import PlannedStage, RunRecord
from launcher.spec import SpecError, decode
from launcher.store import Owner, Receipt

State = Literal["done", "running", "failed", "stopped", "interrupted", "waiting"]


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


@dataclass(frozen=True)
class StageState:
    """A stage now. Times are seconds; `step` of `total` and `figures` are the worker's last heartbeat."""

    stage: str
    kind: str
    state: State
    inserted: bool
    attempt: str | None = None
    exit_class: str | None = None
    message: str = ""
    step: int | None = None
    total: int | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)
    started: float | None = None
    seconds: float | None = None
    folder: str | None = None


def stage_states(root: Path, record: RunRecord, done: Mapping[str, Receipt] | None = None) -> list[StageState]:
    """The state of every stage, in the plan's order; receipts in `done`, by stage, are not read again."""
    return [_stage_state(root, record.run, stage, (done or {}).get(stage.spec.stage)) for stage in record.stages]


def run_state(stages: list[StageState]) -> State:
    """One word for the run: what asks for attention first."""
    found = {s.state for s in stages}
    order: tuple[State, ...] = ("running", "failed", "stopped", "interrupted", "waiting")
    return next((state for state in order if state in found), "done")


def _stage_state(root: Path, run: str, stage: PlannedStage, known: Receipt | None) -> StageState:
    spec = stage.spec
    attempt = newest_attempt(root, run, stage)
    facts: dict[str, Any] = {"stage": spec.stage, "kind": spec.kind, "inserted": stage.inserted}
    if attempt is not None:
        facts |= _attempt_facts(attempt)
    receipt = known or store.read_receipt(root, spec.artifact)
    if receipt is not None:
        made = {"state": "done", "exit_class": "finished", "message": "", "seconds": receipt.seconds}
        return StageState(**{**facts, **made})
    return StageState(state="waiting" if attempt is None else _state(attempt), **facts)


def _state(attempt: Attempt) -> State:
    if attempt.end is None:
        return "running" if attempt.is_living else "interrupted"
    if attempt.end.get("class") in ("cancelled", "time-limit"):
        return "stopped"
    # An attempt that finished but whose artifact is gone or damaged counts for nothing.
    return "waiting" if attempt.end.get("class") == "finished" else "failed"


def _attempt_facts(attempt: Attempt) -> dict[str, Any]:
    beat, end = attempt.beat or {}, attempt.end or {}
    return {
        "attempt": attempt.name,
        "exit_class": end.get("class"),
        "message": end.get("message", "") if end else attempt.note,
        "step": beat.get("step"),
        "total": beat.get("total"),
        "figures": beat.get("figures", {}),
        "started": attempt.started,
        "seconds": end.get("seconds"),
        "folder": str(attempt.folder),
    }


# ----------------------------------------------------------------------------------------------------------- attempts


def attempts(root: Path, run: str, stage: str) -> list[tuple[Attempt, str]]:
    """Every attempt at a stage with its fingerprint, the oldest first."""
    found = [_read_attempt(p) for p in store.stage_dir(root, run, stage).glob("*/events.jsonl")]
    return sorted((f for f in found if f is not None), key=lambda f: f[0].started)


def newest_attempt(root: Path, run: str, stage: PlannedStage) -> Attempt | None:
    """The newest attempt at what is planned now; those of an earlier plan do not count."""
    found = [a for a, fingerprint in attempts(root, run, stage.spec.stage) if fingerprint == stage.spec.fingerprint]
    return found[-1] if found else None


def _read_attempt(path: Path) -> tuple[Attempt, str] | None:
    events = _read_events(path)
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
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [e for e in found if isinstance(e, dict) and "event" in e]


def _newest_beat(folder: Path) -> Mapping[str, Any] | None:
    beats = [store.read_json(p) for p in folder.glob("heartbeat.*.json")]
    return max((b for b in beats if b), key=lambda b: float(b["time"]), default=None)
