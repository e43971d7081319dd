"""How an attempt ended, from its evidence, and what to do about each class. Pure."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from launcher.spec import ExitClass
from launcher.supervisor.memory import SIG_OOM

#: done: the artifact is whole. again: another attempt may get further. stop: the same would happen again, or the user
#: asked for it.
Action = Literal["done", "again", "stop"]

ACTIONS: Mapping[ExitClass, Action] = {
    "finished": "done",
    "time-limit": "again",
    "preempted": "again",
    "requeued": "again",
    "cancelled": "stop",
    "node-failure": "again",
    "preflight": "again",
    "gpu-fault": "again",
    "out-of-memory": "stop",
    "hang": "again",
    "crashed": "again",
    "storage": "stop",
    "diverged": "stop",
    "user-error": "stop",
}


@dataclass(frozen=True)
class RankExit:
    """How one process ended: its exit code (negative: killed by that signal) and what it wrote about itself."""

    step: str
    rank: int
    code: int
    said: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Evidence:
    """All that is known at the end of an attempt; `exits` in the order in which they were noticed.

    `asked` is the class that a stop stands for where one was asked for, `ready_failed` the step that did not become
    ready, `memory_kill` whether the kernel killed a process for want of memory meanwhile.
    """

    exits: Sequence[RankExit] = field(default_factory=tuple)
    asked: ExitClass | None = None
    hang_s: float | None = None
    ready_failed: str | None = None
    memory_kill: bool = False


@dataclass(frozen=True)
class Outcome:
    """Class, a message for people, the action, and the step and rank whose log says more."""

    exit_class: ExitClass
    message: str
    action: Action
    blamed: tuple[str, int] | None = None


def classify(evidence: Evidence) -> Outcome:
    """The outcome of an attempt: the first process that ended badly decides, unless the stop was asked for."""
    if evidence.hang_s is not None:
        return outcome("hang", f"no heartbeat for {evidence.hang_s:.0f} s; stacks of all ranks stand in the logs")
    if evidence.ready_failed is not None:
        return outcome("crashed", f"step {evidence.ready_failed} did not become ready in time", "stop")
    bad = next((e for e in evidence.exits if not _ended_well(e)), None)
    if evidence.asked is not None and (bad is None or bad.code < 0):
        if bad is None and not any(_said(e) == "time-limit" for e in evidence.exits):
            return outcome("finished", "")
        return _stopped(evidence.asked, bad)
    if bad is not None:
        return replace(_failed(bad, evidence.memory_kill), blamed=(bad.step, bad.rank))
    unfinished = next((e for e in evidence.exits if _said(e) == "time-limit"), None)
    if unfinished is not None:
        return outcome("time-limit", str((unfinished.said or {}).get("message", "")))
    return outcome("finished", "")


def outcome(exit_class: ExitClass, message: str, action: Action | None = None) -> Outcome:
    """An outcome with its class's action, or the one given."""
    return Outcome(exit_class, message, action or ACTIONS[exit_class])


def _said(exit: RankExit) -> str | None:
    return (exit.said or {}).get("class")


def _ended_well(exit: RankExit) -> bool:
    return exit.code == 0 and _said(exit) in ("finished", "time-limit")


_ASKED = {
    "cancelled": "stopped as asked",
    "time-limit": "the time limit came",
    "preempted": "preempted",
    "requeued": "requeued by Slurm",
    "node-failure": "a node failed",
}


def _stopped(asked: ExitClass, bad: RankExit | None) -> Outcome:
    lost = (
        ""
        if bad is None
        else "; not all processes saved in time, so the next attempt goes on from an earlier checkpoint"
    )
    return outcome(asked, _ASKED[asked] + lost)


def _failed(exit: RankExit, memory_kill: bool) -> Outcome:
    where = f"step {exit.step}, rank {exit.rank}"
    said, message = _said(exit), str((exit.said or {}).get("message", ""))
    if said in ACTIONS and said not in ("finished", "time-limit"):
        # An exception would be raised again; a signal from outside would not.
        return outcome(said, message or where, "stop" if said == "crashed" else None)  # type: ignore[arg-type]
    if exit.code == -SIG_OOM or (exit.code == -signal.SIGKILL and memory_kill):
        mend = "ask for more memory a node (`mem`), for more nodes, or lower micro_batch_size"
        return outcome("out-of-memory", f"{where}: killed because the machine or the job's share was full; {mend}")
    if exit.code < 0:
        name = signal.Signals(-exit.code).name if -exit.code in {s.value for s in signal.Signals} else str(-exit.code)
        hint = " (was the machine out of memory?)" if exit.code == -signal.SIGKILL else ""
        return outcome("crashed", f"{where}: killed by {name}{hint}")
    return outcome("crashed", f"{where}: exit code {exit.code} without saying why; see its log", "stop")
