"""A run as it goes: a live table on a terminal, plain lines with rate and time left in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from launcher import store
from launcher.errors import WorldError
from launcher.run_record import RunRecord
from launcher.state import Jobs, StageState, State, run_state, stage_states
from launcher.units import format_count, format_duration

#: A plain line of each running stage at most this often, in seconds.
_LINE_S = 10.0
_STYLES: dict[State, str] = {
    "done": "green",
    "running": "cyan",
    "queued": "blue",
    "failed": "bold red",
    "stopped": "yellow",
    "interrupted": "yellow",
    "waiting": "dim",
}


@dataclass
class Pace:
    """How fast a stage goes, from the heartbeats seen since the first one of an attempt."""

    attempt: str | None = None
    first_step: int = 0
    first_time: float = 0.0
    step: int = 0
    at: float = 0.0

    def see(self, state: StageState, now: float) -> None:
        """Take note of a heartbeat; what came before the first one was start-up and says nothing of the pace."""
        if state.step is None:
            return
        if state.attempt != self.attempt:
            self.attempt, self.first_step, self.first_time = state.attempt, state.step, now
        if state.step != self.step:
            self.step, self.at = state.step, now

    def seconds_left(self, total: int | None) -> float | None:
        """Seconds to the end at this pace; None while it cannot be told."""
        steps = self.step - self.first_step
        if not total or steps < 1 or self.at <= self.first_time:
            return None
        return (total - self.step) * (self.at - self.first_time) / steps


@dataclass
class Follower:
    """Shows states as they come; a context, since a live table must give the terminal back."""

    run: str
    clock: Callable[[], float] = time.monotonic
    paces: dict[str, Pace] = field(default_factory=dict)
    told: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    line_at: dict[str, float] = field(default_factory=dict)
    live: Any = None

    def __enter__(self) -> Follower:
        if sys.stdout.isatty():
            from rich.console import Console
            from rich.live import Live

            self.live = Live(console=Console(), refresh_per_second=4)
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
        if self.live is not None:
            self.live.console.print(text, markup=False, highlight=False)
        else:
            print(f"{_clock_text()}  {text}", flush=True)

    def show(self, states: Sequence[StageState]) -> None:
        """The states now."""
        now = self.clock()
        for state in states:
            self.paces.setdefault(state.stage, Pace()).see(state, now)
        if self.live is not None:
            self.live.update(states_table(self.run, states, self.paces))
        else:
            for state in states:
                self._show_line(state, now)

    def _show_line(self, state: StageState, now: float) -> None:
        """A line for a change of state, and every few seconds for a running stage that goes on."""
        key = (state.state, state.attempt, state.exit_class)
        progress = (state.step, tuple(state.figures.items()))
        changed = self.told.get(state.stage, ("waiting", None, None)) != key
        due = state.state == "running" and now - self.line_at.get(state.stage, now) >= _LINE_S
        if changed:
            self.told[state.stage] = key
            self.say(f"{state.stage}: {describe_change(state)}")
        elif due and progress[0] is not None:
            self.say(f"{state.stage}: {describe_progress(state, self.paces[state.stage])}")
        if changed or due:
            self.line_at[state.stage] = now


def _clock_text() -> str:
    return time.strftime("%H:%M:%S")


def describe_change(state: StageState) -> str:
    """What happened to a stage, in words."""
    if state.state == "done":
        return f"done in {format_duration(state.seconds)}" if state.seconds is not None else "done"
    if state.state == "queued":
        return state.message
    if state.state == "running":
        return f"started ({state.attempt})" + (f": {state.message}" if state.message else "")
    return state.state + (f": {state.exit_class}: {state.message}" if state.message else "")


def describe_progress(state: StageState, pace: Pace) -> str:
    """Step, figures and time left of a running stage."""
    parts = [f"step {state.step}/{state.total}"] if state.total else []
    parts += [_figure(name, value) for name, value in state.figures.items()]
    left = pace.seconds_left(state.total)
    if left is not None:
        parts.append(f"{format_duration(left)} left")
    return "  ".join(parts)


def _figure(name: str, value: Any) -> str:
    if name == "tokens_per_s":
        return f"{format_count(float(value))} tokens/s"
    return f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"


def states_table(run: str, states: Sequence[StageState], paces: dict[str, Pace] | None = None) -> Any:
    """The states as a rich table."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"run {run}: {run_state(list(states))}", title_justify="left", expand=False)
    for column in ("stage", "state", "time", "progress"):
        table.add_column(column, justify="right" if column == "time" else "left", overflow="fold")
    for state in states:
        table.add_row(
            Text(state.stage + (" (inserted)" if state.inserted else "")),
            Text(state.state, _STYLES[state.state]),
            _time_of(state),
            Text(_progress_of(state, (paces or {}).get(state.stage, Pace()))),
        )
    return table


def _time_of(state: StageState) -> str:
    if state.seconds is not None:
        return format_duration(state.seconds)
    return format_duration(time.time() - state.started) if state.state == "running" and state.started else ""


def _progress_of(state: StageState, pace: Pace) -> str:
    if state.state == "running":
        return describe_progress(state, pace) or state.message
    if state.state in ("queued", "waiting"):
        return state.message
    if state.state == "done":
        return ""
    return f"{state.exit_class or state.state}: {state.message}".removesuffix(": ")


def watch_run(root: Path, record: RunRecord, jobs: Callable[[], Jobs] = dict, poll_s: float = 0.5) -> list[StageState]:
    """Follow a run until neither a stage runs or waits in a queue nor the run is driven; returns the last states.

    `jobs` asks Slurm; where it does not answer, what it said last stands.
    """
    known: Jobs = {}
    with Follower(record.run) as follower:
        while True:
            driver = store.claim_holder(store.driver_claim(root, record.run))
            driven = driver is not None and store.is_alive(driver) is not False
            with contextlib.suppress(WorldError):
                known = jobs()
            states = stage_states(root, record, jobs=known)
            follower.show(states)
            if not driven and not any(s.state in ("running", "queued") for s in states):
                return states
            time.sleep(poll_s)


def follow_file(path: Path, still_running: Callable[[], bool], poll_s: float = 0.3) -> None:
    """Print what is appended to a file for as long as its stage runs."""
    with path.open(errors="replace") as file:
        file.seek(0, 2)
        running = True
        while running:
            running = still_running()
            print(file.read(), end="", flush=True)
            time.sleep(poll_s if running else 0)
