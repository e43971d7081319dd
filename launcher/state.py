"""What every stage of a run is doing: a fold over receipts, the attempts' events and heartbeats. Reads only.

A receipt beats everything; then the newest attempt of the planned fingerprint: its last event, or whether its
supervisor lives.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from launcher import store
from launcher.attempts import Attempt, Beat, End, read_attempts, tail_of
from launcher.caps import read_held
from launcher.run_record import PlannedStage, RunRecord
from launcher.slurm import Job
from launcher.store import Receipt

State = Literal["done", "running", "queued", "failed", "stopped", "interrupted", "waiting"]
#: The newest job of a stage, by the stage's name; empty outside Slurm.
Jobs = Mapping[str, Job]


@dataclass(frozen=True)
class StageState:
    """A stage now. Times are seconds; `step` of `total` and `figures` are the worker's last heartbeat.

    `tail` are the last lines of `log`, where the stage ended badly; `damage` is what could not be read of its attempts.
    """

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
    log: str | None = None
    tail: Sequence[str] = ()
    damage: Sequence[str] = ()


def stage_states(
    root: Path, record: RunRecord, done: Mapping[str, Receipt] | None = None, jobs: Jobs | None = None
) -> list[StageState]:
    """The state of every stage, in the plan's order; receipts in `done`, by stage, are not read again."""
    done, jobs = done or {}, jobs or {}
    held = read_held(root, record.run)
    names = [stage.spec.stage for stage in record.stages]
    found = [_stage_state(root, s, done.get(n), jobs.get(n)) for n, s in zip(names, record.stages, strict=True)]
    return [_held_back(s, held[s.stage]) if s.stage in held else s for s in found]


def _held_back(state: StageState, why: str) -> StageState:
    """A stage that the last `run` did not submit, unless a job makes it all the same."""
    if state.state in ("done", "running", "queued"):
        return state
    return replace(state, state="waiting", exit_class=None, message=why)


def run_state(stages: list[StageState]) -> State:
    """One word for the run: what asks for attention first."""
    found = {s.state for s in stages}
    order: tuple[State, ...] = ("running", "queued", "failed", "stopped", "interrupted", "waiting")
    return next((state for state in order if state in found), "done")


def _stage_state(root: Path, stage: PlannedStage, known: Receipt | None, job: Job | None) -> StageState:
    spec = stage.spec
    found, damage = read_attempts(root, spec.run, spec.stage)
    attempt = next((a for a, fingerprint in reversed(found) if fingerprint == spec.fingerprint), None)
    facts: dict[str, Any] = {"stage": spec.stage, "kind": spec.kind, "inserted": stage.inserted}
    facts["damage"] = tuple(damage)
    if attempt is not None:
        facts |= _attempt_facts(attempt)
    receipt = known or store.read_receipt(root, spec.artifact)
    if receipt is not None:
        made = {"state": "done", "exit_class": "finished", "message": "", "seconds": receipt.seconds}
        return StageState(**{**facts, **made})
    if _just_made(attempt, job, spec.limits.visibility_s):
        return StageState(**{**facts, "state": "running", "exit_class": None, "message": "finished; not seen here yet"})
    if job is not None and (attempt is None or not _tells_more(attempt, job)):
        folder = store.stage_dir(root, spec.run, stage.part_of or spec.stage)
        return StageState(**{**facts, **_job_facts(job, attempt, folder)})
    return StageState(state="waiting" if attempt is None else _state(attempt), **facts)


def _just_made(attempt: Attempt | None, job: Job | None, visibility_s: float) -> bool:
    """Whether the stage finished so short a while ago that a shared file system may still hide its artifact here."""
    ends = [job.ended] if job is not None and job.state == "COMPLETED" and job.ended else []
    if attempt is not None and attempt.end is not None and attempt.end.exit_class == "finished":
        ends.append(attempt.end.time)
    return bool(ends) and abs(time.time() - max(ends)) < visibility_s  # clocks differ


def _tells_more(attempt: Attempt, job: Job) -> bool:
    """Whether an attempt's own files say more of a stage than Slurm does of its job."""
    if attempt.job != job.id:
        return False  # of an earlier job
    if attempt.end is None:
        return job.state == "RUNNING"  # of one that is suspended Slurm says more
    # One that wanted another life may have been cancelled while it waited for that.
    return not attempt.wants_another or not (job.is_active or job.state in _ENDED)


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


def _job_facts(job: Job, last: Attempt | None, folder: Path) -> dict[str, Any]:
    """What Slurm says of a job; `last` is the stage's newest attempt, of this job or of one before it."""
    if job.is_active:
        waits = not job.is_started
        reason = "" if job.reason in ("None", "") else f", {job.reason}"
        before = f"; before: {last.end.message or last.end.exit_class}" if waits and last and last.end else ""
        words = f"job {job.id} {job.state.lower()}{reason}{before}"
        return {"state": "queued" if waits else "running", "exit_class": None, "message": words}
    state, exit_class = _ENDED.get(job.state, ("interrupted", "crashed"))
    words = f"Slurm no longer knows job {job.id}" if job.state == "GONE" else f"job {job.id} ended as {job.state}"
    mend = "; ask for more memory a node (`mem`)" if exit_class == "out-of-memory" else ""
    facts: dict[str, Any] = {"state": state, "exit_class": exit_class, "message": words + mend}
    if job.state != "FAILED" or (last is not None and last.job == job.id):
        return facts
    log = folder / f"{job.id}_0_log.out"
    return facts | {"state": "failed", "message": f"job {job.id} failed before its supervisor began"} | _end_of(log)


def _end_of(log: Path) -> dict[str, Any]:
    return {"log": str(log), "tail": tuple(tail_of(log, 5))} if log.exists() else {}


def _state(attempt: Attempt) -> State:
    if attempt.end is None:
        return "running" if attempt.is_living else "interrupted"
    if attempt.end.exit_class in ("cancelled", "time-limit"):
        return "stopped"
    # An attempt that finished but whose artifact is gone or damaged counts for nothing.
    return "waiting" if attempt.end.exit_class == "finished" else "failed"


def _attempt_facts(attempt: Attempt) -> dict[str, Any]:
    beat, end = attempt.beat, attempt.end
    return {
        "attempt": attempt.name,
        "started": attempt.started,
        "folder": str(attempt.folder),
        "message": end.message if end else attempt.note,
        **(_beat_facts(beat) if beat else {}),
        **(_end_facts(end, attempt.folder) if end else {}),
    }


def _beat_facts(beat: Beat) -> dict[str, Any]:
    return {"step": beat.step, "total": beat.total, "figures": beat.figures}


def _end_facts(end: End, folder: Path) -> dict[str, Any]:
    log = str(folder / end.log) if end.log else None
    return {"exit_class": end.exit_class, "seconds": end.seconds, "log": log, "tail": end.tail}
