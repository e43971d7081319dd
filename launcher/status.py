"""What is shown of a run: every stage with its job, progress, cost and reason, as a table and as JSON. Reads only.

docs/watching.md lists the keys of the JSON; SCHEMA counts up when one is renamed, removed or changes its meaning.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import costs, logs
from launcher.costs import Life
from launcher.run_record import PlannedStage, RunRecord
from launcher.slurm import Job
from launcher.state import Jobs, StageState, State, run_state, stage_states
from launcher.store import Receipt
from launcher.units import parse_duration

SCHEMA = 1


@dataclass(frozen=True)
class StageStatus:
    """A stage now. Times are seconds since the epoch, durations seconds; None is what is not known or does not apply.

    `seconds` is the time of the newest attempt, or of all that made the artifact where it is done; `damage` is what
    could not be read of the attempts' files.
    """

    stage: str
    kind: str
    state: State
    inserted: bool
    job: str | None
    job_state: str | None
    nodes: str | None
    attempt: str | None
    attempts: int
    exit_class: str | None
    message: str
    reason: str
    step: int | None
    total: int | None
    loss: float | None
    tokens_per_s: float | None
    figures: Mapping[str, Any]
    started: float | None
    seconds: float | None
    left_seconds: float | None
    limit_left_seconds: float | None
    gpu_hours: float
    core_hours: float
    folder: str | None
    log: str | None
    damage: Sequence[str] = ()


@dataclass(frozen=True)
class RunStatus:
    """A run now. `trouble` says why Slurm's view is missing or old; None where all is well or Slurm has no part."""

    run: str
    root: str
    cluster: str
    state: State
    time: float
    gpu_hours: float
    core_hours: float
    trouble: str | None
    stages: tuple[StageStatus, ...]
    schema: int = SCHEMA


def run_status(
    root: Path,
    record: RunRecord,
    jobs: Jobs | None = None,
    trouble: str | None = None,
    done: Mapping[str, Receipt] | None = None,
) -> RunStatus:
    """The run as its files and its jobs tell it; receipts in `done`, by stage, are not read again."""
    now, jobs = time.time(), jobs or {}
    states = stage_states(root, record, done, jobs)
    stages = tuple(
        _stage_status(root, planned, state, jobs.get(state.stage), now)
        for planned, state in zip(record.stages, states, strict=True)
    )
    return RunStatus(
        run=record.run,
        root=str(root),
        cluster=record.cluster,
        state=run_state(states),
        time=now,
        gpu_hours=sum(s.gpu_hours for s in stages),
        core_hours=sum(s.core_hours for s in stages),
        trouble=trouble,
        stages=stages,
    )


def _stage_status(root: Path, planned: PlannedStage, state: StageState, job: Job | None, now: float) -> StageStatus:
    lives = costs.lives_of(root, planned, now, state.state == "running")
    cost = costs.cost_of(lives, planned)
    newest = lives[-1] if lives else None
    running = state.state == "running"
    return StageStatus(
        stage=state.stage,
        kind=state.kind,
        state=state.state,
        inserted=state.inserted,
        job=job.id if job else _job_of(newest),
        job_state=job.state if job else None,
        nodes=(job.nodes if job else "") or _host_of(newest),
        attempt=state.attempt,
        attempts=cost.attempts,
        exit_class=state.exit_class,
        message=state.message,
        reason=reason_of(state, job),
        step=state.step,
        total=state.total,
        loss=_number(state.figures.get("loss")),
        tokens_per_s=_number(state.figures.get("tokens_per_s")),
        figures=state.figures,
        started=state.started,
        seconds=newest.seconds if running and newest else state.seconds,
        left_seconds=left_seconds(newest) if running else None,
        limit_left_seconds=_limit_left(job) if running else None,
        gpu_hours=cost.gpu_hours,
        core_hours=cost.core_hours,
        folder=state.folder,
        log=_log_of(root, planned, newest),
        damage=state.damage,
    )


def _job_of(life: Life | None) -> str | None:
    return life.attempt.owner.job if life and life.attempt.owner else None


def _host_of(life: Life | None) -> str | None:
    return life.attempt.owner.host if life and life.attempt.owner else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _log_of(root: Path, planned: PlannedStage, newest: Life | None) -> str | None:
    if newest is None:
        return None
    path = logs.main_log(planned.spec, newest.attempt)
    return str(path) if path.exists() else None


def left_seconds(life: Life | None) -> float | None:
    """Seconds to the end at the pace since the attempt's first heartbeat; None while it cannot be told.

    What came before that beat was start-up and says nothing of the pace.
    """
    beat = life.attempt.beat if life else None
    if beat is None or not beat.total or beat.first_step is None or beat.first_time is None:
        return None
    steps, seconds = beat.step - beat.first_step, beat.time - beat.first_time
    return (beat.total - beat.step) * seconds / steps if steps > 0 and seconds > 0 else None


def _limit_left(job: Job | None) -> float | None:
    try:
        return parse_duration(job.time_left) if job and job.time_left else None
    except ValueError:
        return None  # UNLIMITED, INVALID, NOT_SET


#: Why a job waits, in Slurm's word and for people (`man squeue`, JOB REASON CODES); others stand as they are.
_WAITS = {
    "Dependency": "for the stages it reads",
    "Priority": "behind jobs of higher priority",
    "Resources": "for free nodes",
    "BeginTime": "until Slurm lets it begin again",
    "ReqNodeNotAvail": "for nodes that are down, drained or reserved",
    "JobHeldUser": "held by its user; `scontrol release` it",
    "JobHeldAdmin": "held by the operators",
    "DependencyNeverSatisfied": "for a stage that failed; it will never start",
}


def reason_of(state: StageState, job: Job | None) -> str:
    """Why the stage is in its state, on one line; empty where nothing is to be said."""
    if job is not None and job.state in ("SUSPENDED", "STOPPED") and state.state == "running":
        return f"job {job.id} is {job.state.lower()}: its processes stand still until Slurm lets them go on"
    if state.state == "queued" and job is not None and job.is_active:
        word = job.reason.partition(",")[0].strip("() ")
        return f"job {job.id} waits {_WAITS.get(word, f'({word})' if word not in ('', 'None') else 'in the queue')}"
    message = " ".join(state.message.split())
    if state.state in ("done", "waiting", "running", "queued"):
        return "" if state.state == "done" else message
    return f"{state.exit_class}: {message}" if state.exit_class and message else message or state.exit_class or ""


def failure_tails(status: RunStatus, lines: int = 8) -> Sequence[str]:
    """The last lines of the log of every failed stage, each under its path."""
    found: list[str] = []
    for stage in status.stages:
        if stage.state == "failed" and stage.log:
            found += [f"==> {stage.log} <==", *logs.tail(Path(stage.log), lines)]
    return found
