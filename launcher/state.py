"""What every stage of a run is doing: a fold over receipts, the attempts' events and heartbeats. Reads only.

A receipt beats everything; then the newest attempt of the planned fingerprint: its last event, or whether its
supervisor lives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from launcher import store
from launcher.attempts import Attempt, newest_attempt
from launcher.run_record import PlannedStage, RunRecord
from launcher.store import Receipt

State = Literal["done", "running", "failed", "stopped", "interrupted", "waiting"]


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
    attempt = newest_attempt(root, spec)
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
