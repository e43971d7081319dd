"""What is shown of a run: every stage with its job, progress, cost and reason, as a table and as JSON. Reads only.

docs/watching.md lists the keys of the JSON; SCHEMA counts up when one is renamed, removed or changes its meaning.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import costs, logs
from launcher.costs import Life
from launcher.run_record import PlannedStage, RunRecord
from launcher.slurm import Job
from launcher.state import Jobs, StageState, State, run_state, stage_states
from launcher.store import Receipt
from launcher.units import format_count, parse_duration

SCHEMA = 1


@dataclass(frozen=True)
class StageStatus:
    """A stage now. Times are seconds since the epoch, durations seconds; None is what is not known or does not apply.

    `seconds` is the time of the newest attempt, or of all that made the artifact where it is done.
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
    cost = costs.cost_of(lives, planned.resources)
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
    if not beat or not beat.get("total") or "first" not in beat:
        return None
    steps, seconds = beat["step"] - beat["first"]["step"], beat["time"] - beat["first"]["time"]
    return (beat["total"] - beat["step"]) * seconds / steps if steps > 0 and seconds > 0 else None


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
    if state.state == "queued" and job is not None and job.is_active:
        word = job.reason.partition(",")[0].strip("() ")
        return f"job {job.id} waits {_WAITS.get(word, f'({word})' if word not in ('', 'None') else 'in the queue')}"
    message = " ".join(state.message.split())
    if state.state in ("done", "waiting", "running", "queued"):
        return "" if state.state == "done" else message
    return f"{state.exit_class}: {message}" if state.exit_class and message else message or state.exit_class or ""


# ------------------------------------------------------------------------------------------------------------- table

STYLES: dict[State, str] = {
    "done": "green",
    "running": "cyan",
    "queued": "blue",
    "failed": "bold red",
    "stopped": "yellow",
    "interrupted": "yellow",
    "waiting": "dim",
}


@dataclass(frozen=True)
class StatusTable:
    """The run as rich shows it: a table as wide as the terminal, then a line for each stage that has a reason."""

    status: RunStatus

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.text import Text

        yield self._table(options.max_width)
        for stage in self.status.stages:
            if stage.reason:
                yield Text(f"{stage.stage}: {stage.reason}", STYLES[stage.state])
        if self.status.trouble:
            yield Text(self.status.trouble, "yellow")

    def _table(self, width: int) -> Any:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        title = Text(_title(self.status))
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        rows = [_cells(stage) for stage in self.status.stages]
        shown = _fitting(rows, width)
        for name in shown:
            is_number = _COLUMNS[name]
            table.add_column(name, justify="right" if is_number else "left", overflow="fold", no_wrap=is_number)
        for stage, row in zip(self.status.stages, rows, strict=True):
            table.add_row(*(Text(row[name], STYLES[stage.state] if name == "state" else "") for name in shown))
        return table


def _fitting(rows: Sequence[Mapping[str, str]], width: int) -> list[str]:
    """The columns of which something is known, less those that a narrow terminal can do without."""
    shown = [name for name in _COLUMNS if name in ("stage", "state") or any(row[name] for row in rows)]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in shown}
    for name in _DISPENSABLE:
        if sum(widths[n] + 3 for n in shown) - 3 <= width:
            break
        shown = [n for n in shown if n != name]
    return shown


def _title(status: RunStatus) -> str:
    return f"run {status.run}: {status.state}{_cost_text(status)}"


def _cost_text(status: RunStatus) -> str:
    if status.gpu_hours:
        return f", {status.gpu_hours:.3g} GPU-hours"
    return f", {status.core_hours:.3g} core-hours" if status.core_hours else ""


#: Name of each column, and whether it holds numbers.
_COLUMNS = {
    "stage": False,
    "state": False,
    "job": False,
    "nodes": False,
    "tries": True,
    "time": True,
    "step": True,
    "loss": True,
    "tokens/s": True,
    "left": True,
    "limit": True,
    "GPU-h": True,
}
#: What a narrow terminal does without, first to last.
_DISPENSABLE = ("tries", "job", "limit", "time", "nodes", "loss", "GPU-h", "tokens/s", "left")


def _cells(stage: StageStatus) -> dict[str, str]:
    return {
        "stage": stage.stage,
        "state": stage.state,
        "job": stage.job or "",
        "nodes": stage.nodes or "" if stage.job else "",
        "tries": str(stage.attempts) if stage.attempts else "",
        "time": _duration(stage.seconds),
        "step": f"{stage.step}/{stage.total}" if stage.step is not None and stage.state != "done" else "",
        "loss": f"{stage.loss:.4g}" if stage.loss is not None else "",
        "tokens/s": format_count(stage.tokens_per_s) if stage.tokens_per_s is not None else "",
        "left": _duration(stage.left_seconds),
        "limit": _duration(stage.limit_left_seconds),
        "GPU-h": f"{stage.gpu_hours:.3g}" if stage.gpu_hours else "",
    }


def _duration(seconds: float | None) -> str:
    """`8.2s`, `3m05s`, `26h10m`, `3d04h`: half as wide as `format_duration` has it."""
    if seconds is None:
        return ""
    whole = round(seconds)
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    hours = whole // 3600
    return f"{hours}h{whole % 3600 // 60:02}m" if hours < 48 else f"{hours // 24}d{hours % 24:02}h"


def failure_tails(status: RunStatus, lines: int = 8) -> Sequence[str]:
    """The last lines of the log of every failed stage, each under its path."""
    found: list[str] = []
    for stage in status.stages:
        if stage.state == "failed" and stage.log:
            found += [f"==> {stage.log} <==", *logs.tail(Path(stage.log), lines)]
    return found
