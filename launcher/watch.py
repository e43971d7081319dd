"""A run as it goes: a live table on a terminal, plain lines with rate and time left in a log, or JSON lines."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from launcher import store
from launcher.attempts import Attempt, newest_attempt
from launcher.errors import WorldError
from launcher.notify import notify
from launcher.run_record import PlannedStage, RunRecord
from launcher.spec import encode
from launcher.state import Jobs
from launcher.status import SCHEMA, RunStatus, StageStatus, run_status
from launcher.status_table import StatusTable
from launcher.terminal import console
from launcher.units import format_count, format_duration

#: A plain line of each running stage at most this often, in seconds.
_LINE_S = 10.0


@dataclass
class Follower:
    """Shows a run as it comes; a context, since a live table must give the terminal back."""

    run: str
    as_json: bool = False
    clock: Callable[[], float] = time.monotonic
    told: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    line_at: dict[str, float] = field(default_factory=dict)
    trouble: str | None = None
    live: Any = None

    def __enter__(self) -> Follower:
        if sys.stdout.isatty() and not self.as_json:
            from rich.live import Live

            self.live = Live(console=console(), refresh_per_second=4)
            self.live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.__exit__(kind, error, trace)
            self.live = None

    def say(self, text: str) -> None:
        """One line for people."""
        if self.as_json:
            self._line("note", {"message": text})
        elif self.live is not None:
            self.live.console.print(text, markup=False, highlight=False)
        else:
            print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)

    def show(self, status: RunStatus) -> None:
        """The run now: what is new of it, or all of it on a terminal."""
        if self.live is not None:
            self.live.update(StatusTable(status, self.live.console.height - 1))
            return
        if status.trouble != self.trouble:
            self.trouble = status.trouble
            self.say(status.trouble or "Slurm answers again")
        for stage in status.stages:
            if self.as_json:
                self._show_json(stage)
            else:
                self._show_line(stage, self.clock())

    def end(self, status: RunStatus) -> None:
        """The last word on a run, for programs."""
        if self.as_json:
            self._line("end", {k: v for k, v in encode(status).items() if k not in ("stages", "time", "schema", "run")})

    def _line(self, event: str, facts: Mapping[str, Any]) -> None:
        head = {"schema": SCHEMA, "event": event, "time": time.time(), "run": self.run}
        print(json.dumps({**head, **facts}), flush=True)

    def _show_json(self, stage: StageStatus) -> None:
        """A line where something of the stage has changed but the clock alone."""
        key = (stage.state, stage.job, stage.job_state, stage.attempt, stage.exit_class, stage.step, stage.reason)
        if self.told.get(stage.stage) != key:
            self.told[stage.stage] = key
            self._line("stage", encode(stage))

    def _show_line(self, stage: StageStatus, now: float) -> None:
        """A line for a change of state, and every few seconds for a running stage that goes on."""
        key = (stage.state, stage.attempt, stage.exit_class, stage.reason if stage.state == "queued" else "")
        changed = self.told.get(stage.stage, ("waiting", None, None, "")) != key
        due = stage.state == "running" and now - self.line_at.get(stage.stage, now) >= _LINE_S
        if changed:
            self.told[stage.stage] = key
            self.say(f"{stage.stage}: {describe_change(stage)}")
        elif due and stage.step is not None:
            self.say(f"{stage.stage}: {describe_progress(stage)}")
        if changed or due:
            self.line_at[stage.stage] = now


def describe_change(stage: StageStatus) -> str:
    """What happened to a stage, in words."""
    if stage.state == "done":
        return f"done in {format_duration(stage.seconds)}" if stage.seconds is not None else "done"
    if stage.state == "queued":
        return stage.reason or "queued"
    if stage.state == "running":
        where = f", job {stage.job} on {stage.nodes}" if stage.job and stage.nodes else ""
        return f"started ({stage.attempt}{where})" + (f": {stage.message}" if stage.message else "")
    return stage.state + (f": {stage.reason}" if stage.reason else "")


def describe_progress(stage: StageStatus) -> str:
    """Step, figures, time left and cost of a running stage."""
    parts = [f"step {stage.step}/{stage.total}"] if stage.total else []
    parts += [_figure(name, value) for name, value in stage.figures.items()]
    if stage.left_seconds is not None:
        parts.append(f"{format_duration(stage.left_seconds)} left")
    if stage.gpu_hours:
        parts.append(f"{stage.gpu_hours:.3g} GPU-hours")
    return "  ".join(parts)


def _figure(name: str, value: Any) -> str:
    if name == "tokens_per_s" and not isinstance(value, str):
        return f"{format_count(float(value))} tokens/s"
    return f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"


# ----------------------------------------------------------------------------------------------------------- following


@dataclass
class Queue:
    """A run's jobs, asked for once a look; while Slurm is silent, what it said last stands.

    `ask` gets the jobs of which it is known how they ended, so that it need not ask for these again. Looks that follow
    within `every_s` seconds ask nothing.
    """

    ask: Callable[[Jobs], Jobs]
    every_s: float = 0.0
    jobs: Jobs = field(default_factory=dict)
    trouble: str | None = None
    asked: float = float("-inf")

    def look(self) -> None:
        """Ask once, if it is time."""
        if time.monotonic() - self.asked < self.every_s:
            return
        self.asked = time.monotonic()
        try:
            # What nothing knows may only be unknown for now.
            ended = {n: j for n, j in self.jobs.items() if not j.is_active and j.state != "GONE"}
            self.jobs, self.trouble = self.ask(ended), None
        except WorldError as error:
            self.trouble = f"{error}; what follows is from the run's files, and the jobs as they were last known"


def no_jobs(known: Jobs) -> Jobs:
    """The jobs of a run outside Slurm."""
    return {}


def watch_run(
    root: Path,
    record: RunRecord,
    ask: Callable[[Jobs], Jobs] = no_jobs,
    poll_s: float = 0.5,
    *,
    as_json: bool = False,
) -> RunStatus:
    """Follow a run until no stage runs or waits in a queue and nothing drives it; returns how it stands then.

    While Slurm does not answer it cannot be told that a run has ended, unless all is done. Where its commands are not
    installed it never will.
    """
    queue, can_answer = Queue(ask), shutil.which("squeue") is not None
    with Follower(record.run, as_json) as follower:
        while True:
            driver = store.claim_holder(store.driver_claim(root, record.run))
            driven = driver is not None and store.is_alive(driver) is not False
            queue.look()
            status = run_status(root, record, queue.jobs, queue.trouble)
            follower.show(status)
            for line in tell_unheard(root, record, status, queue.jobs):
                follower.say(line)
            goes_on = driven or any(s.state in ("running", "queued") for s in status.stages)
            if not goes_on and (queue.trouble is None or not can_answer or status.state == "done"):
                follower.end(status)
                return status
            time.sleep(poll_s)


# ---------------------------------------------------------------------------------------------------------------- hook


def tell_unheard(root: Path, record: RunRecord, status: RunStatus, jobs: Jobs) -> list[str]:
    """Tell the hook of stages that ended without a supervisor that could: never started, or killed with it.

    Each end is told once, whoever sees it first. Returns what went wrong.
    """
    ends = [
        (planned, stage, *end)
        for planned, stage in zip(record.stages, status.stages, strict=True)
        if planned.spec.notify and (end := _unheard(root, planned, stage, jobs)) is not None
    ]
    taken = [(planned, stage, old) for planned, stage, key, old in ends if _take(root, planned, key)]
    if not taken:
        return []
    with ThreadPoolExecutor(8) as pool:
        said = pool.map(lambda one: _tell(*one), taken)
    return [trouble for trouble in said if trouble]


def _unheard(root: Path, planned: PlannedStage, stage: StageStatus, jobs: Jobs) -> tuple[str, str] | None:
    """A name for the end of the stage and its state before, where nobody has told of it."""
    if stage.state not in ("failed", "stopped", "interrupted"):
        return None
    attempt, job = newest_attempt(root, planned.spec), jobs.get(stage.stage)
    if job is not None and not job.is_active and _ended_waiting(attempt, job.id):
        return f"job-{job.id}", "queued"
    return (attempt.name, "running") if attempt is not None and attempt.end is None else None


def _ended_waiting(attempt: Attempt | None, job: str) -> bool:
    """Whether a job ended in the queue: before its first life, or before the next one that was to come."""
    return attempt is None or attempt.job != job or attempt.wants_another


def _take(root: Path, planned: PlannedStage, key: str) -> bool:
    """Whether this process is the one that tells of it."""
    folder = store.stage_dir(root, planned.spec.run, planned.spec.stage)
    try:
        os.close(os.open(folder / f".told.{key}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except OSError:  # told already, or a store that is not ours to write
        return False
    return True


def _tell(planned: PlannedStage, stage: StageStatus, old: str) -> str | None:
    return notify(
        planned.spec,
        old,
        stage.state,
        exit_class=stage.exit_class,
        message=stage.message,
        action="stop",
        attempt=stage.attempt,
        job=stage.job,
    )
