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
from launcher.slurm import Job
from launcher.store import Receipt

State = Literal["done", "running", "queued", "failed", "stopped", "interrupted", "waiting"]
#: The newest job of a stage, by the stage's name; empty outside Slurm.
Jobs = Mapping[str, Job]


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


def stage_states(
    root: Path, record: RunRecord, done: Mapping[str, Receipt] | None = None, jobs: Jobs | None = None
) -> list[StageState]:
    """The state of every stage, in the plan's order; receipts in `done`, by stage, are not read again."""
    done, jobs = done or {}, jobs or {}
    names = [stage.spec.stage for stage in record.stages]
    return [_stage_state(root, s, done.get(n), jobs.get(n)) for n, s in zip(names, record.stages, strict=True)]


def run_state(stages: list[StageState]) -> State:
    """One word for the run: what asks for attention first."""
    found = {s.state for s in stages}
    order: tuple[State, ...] = ("running", "queued", "failed", "stopped", "interrupted", "waiting")
    return next((state for state in order if state in found), "done")


def _stage_state(root: Path, stage: PlannedStage, known: Receipt | None, job: Job | None) -> StageState:
    spec = stage.spec
    attempt = newest_attempt(root, spec)
    facts: dict[str, Any] = {"stage": spec.stage, "kind": spec.kind, "inserted": stage.inserted}
    if attempt is not None:
        facts |= _attempt_facts(attempt)
    receipt = known or store.read_receipt(root, spec.artifact)
    if receipt is not None:
        made = {"state": "done", "exit_class": "finished", "message": "", "seconds": receipt.seconds}
        return StageState(**{**facts, **made})
    if job is not None and (attempt is None or not _tells_more(attempt, job)):
        return StageState(**{**facts, **_job_facts(job, attempt)})
    return StageState(state="waiting" if attempt is None else _state(attempt), **facts)


def _tells_more(attempt: Attempt, job: Job) -> bool:
    """Whether an attempt's own files say more of a stage than Slurm does of its job."""
    if attempt.name.partition(".")[0] != job.id:
        return False  # of an earlier job
    if attempt.end is None:
        return job.state == "RUNNING"
    return not job.is_active or attempt.end.get("action") != "again"


#: How Slurm ends jobs by itself.
_ENDED: Mapping[str, tuple[State, str]] = {
    "CANCELLED": ("stopped", "cancelled"),
    "NODE_FAIL": ("interrupted", "node-failure"),
    "BOOT_FAIL": ("interrupted", "node-failure"),
    "TIMEOUT": ("interrupted", "time-limit"),
    "DEADLINE": ("interrupted", "time-limit"),
    "PREEMPTED": ("interrupted", "preempted"),
    "OUT_OF_MEMORY": ("failed", "out-of-memory"),
}


def _job_facts(job: Job, last: Attempt | None) -> dict[str, Any]:
    if job.is_active:
        waits = job.state != "RUNNING"
        reason = "" if job.reason in ("None", "") else f", {job.reason}"
        before = f"; before: {last.end.get('message') or last.end.get('class')}" if waits and last and last.end else ""
        words = f"job {job.id} {job.state.lower()}{reason}{before}"
        return {"state": "queued" if waits else "running", "exit_class": None, "message": words}
    state, exit_class = _ENDED.get(job.state, ("interrupted", "crashed"))
    return {"state": state, "exit_class": exit_class, "message": f"job {job.id} ended as {job.state}"}


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
