"""How an attempt ended, from its evidence, and what to do about each class. Pure."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from launcher.spec import ExitClass
from launcher.supervisor.faults import GpuFault, gpu_fault, is_peers_fault, waited_in_vain
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

#: What a rank can only say of itself.
OWN_CAUSES: tuple[ExitClass, ...] = ("user-error", "diverged", "storage", "out-of-memory")


@dataclass(frozen=True)
class Said:
    """What a process wrote of its own end, and of what it used."""

    exit_class: str
    message: str = ""
    cpu_seconds: float = 0.0
    peak_memory_bytes: float = 0.0


@dataclass(frozen=True)
class RankExit:
    """How one process ended: its exit code (negative: killed by that signal) and what it wrote about itself.

    `node` and `log`, the end of its log, where they are known.
    """

    step: str
    rank: int
    code: int
    said: Said | None = None
    node: str | None = None
    log: str = ""


@dataclass(frozen=True)
class Evidence:
    """All that is known at the end of an attempt; `exits` in the order in which they were noticed.

    `asked` is the class that a stop stands for where one was asked for, `bad_nodes` those of which Slurm says that they
    are down or leave service, `ready_failed` the step that did not become ready, `memory_kill` whether the kernel
    killed a process for want of memory meanwhile.
    """

    exits: Sequence[RankExit] = field(default_factory=tuple)
    asked: ExitClass | None = None
    hang_s: float | None = None
    ready_failed: str | None = None
    bad_nodes: tuple[str, ...] = ()
    memory_kill: bool = False


@dataclass(frozen=True)
class Outcome:
    """Class, a message for people, the action, nodes that the next life leaves out, those that are suspected, and the
    step and rank whose log says more."""

    exit_class: ExitClass
    message: str
    action: Action
    exclude: tuple[str, ...] = ()
    suspect: tuple[str, ...] = ()
    blamed: tuple[str, int] | None = None


def classify(evidence: Evidence) -> Outcome:
    """The outcome of an attempt: the first process that ended badly decides, unless the stop was asked for.

    Of ranks that lost others, or waited for them in vain, it is the others that decide, where they said anything.
    """
    bad = [e for e in evidence.exits if not _ended_well(e)]
    causes = [e for e in bad if not is_secondhand(e)] or [e for e in bad if not is_peers_fault(_message(e))]
    first = next(iter(causes or bad), None)
    own_fault = first is not None and first.code > 0 and not is_peers_fault(_message(first))
    if evidence.asked is not None and not own_fault:
        if first is None and evidence.exits and not any(_said(e) == "time-limit" for e in evidence.exits):
            return outcome("finished", "")
        return _stopped(evidence, first)
    if evidence.hang_s is not None:
        return outcome("hang", f"no heartbeat for {evidence.hang_s:.0f} s; stacks of all ranks stand in the logs")
    if evidence.ready_failed is not None:
        return outcome("crashed", f"step {evidence.ready_failed} did not become ready in time", "stop")
    if first is not None:
        return replace(_failed(first, evidence.memory_kill), blamed=(first.step, first.rank))
    unfinished = next((e for e in evidence.exits if _said(e) == "time-limit"), None)
    if unfinished is not None:
        return outcome("time-limit", _message(unfinished))
    return outcome("finished", "")


def only_secondhand(exits: Sequence[RankExit]) -> bool:
    """Whether ranks ended badly, and all of them through others."""
    bad = [e for e in exits if not _ended_well(e)]
    return bool(bad) and all(is_secondhand(e) for e in bad)


def is_secondhand(exit: RankExit) -> bool:
    """Whether a rank ended because another was lost, or did not come: that one's end is the cause."""
    if _said(exit) in OWN_CAUSES:
        return False
    words = exit.log if exit.said is None else _message(exit)
    fault = gpu_fault(words)
    return is_peers_fault(_message(exit)) or (waited_in_vain(words) and fault is not None and fault.blame != "node")


def outcome(exit_class: ExitClass, message: str, action: Action | None = None) -> Outcome:
    """An outcome with its class's action, or the one given."""
    return Outcome(exit_class, message, action or ACTIONS[exit_class])


def _said(exit: RankExit) -> str | None:
    return exit.said.exit_class if exit.said else None


def _ended_well(exit: RankExit) -> bool:
    # What a rank says of itself is its last act: a signal that meets it on the way out takes nothing away.
    return exit.code <= 0 and _said(exit) in ("finished", "time-limit")


def _message(exit: RankExit) -> str:
    return exit.said.message if exit.said else ""


_ASKED = {
    "cancelled": "stopped as asked",
    "time-limit": "the time limit came",
    "preempted": "preempted by a job of higher priority",
    "requeued": "put back into the queue by Slurm or an operator",
    "node-failure": "a node failed",
}


def _stopped(evidence: Evidence, bad: RankExit | None) -> Outcome:
    assert evidence.asked is not None
    nodes = evidence.bad_nodes if evidence.asked == "node-failure" else ()
    words = f"lost {', '.join(nodes)}, which Slurm calls down or leaving service" if nodes else _ASKED[evidence.asked]
    lost = (
        ""
        if bad is None
        else "; not all processes saved in time, so the next attempt goes on from an earlier checkpoint"
    )
    return replace(outcome(evidence.asked, words + lost), exclude=nodes)


def _failed(exit: RankExit, memory_kill: bool) -> Outcome:
    where = f"step {exit.step}, rank {exit.rank}" + (f" on {exit.node}" if exit.node else "")
    said, message = _said(exit), _message(exit)
    full = exit.code == -SIG_OOM or (exit.code == -signal.SIGKILL and memory_kill)
    if not full and said not in OWN_CAUSES:
        fault = gpu_fault(f"{message}\n{exit.log}")
        if fault is not None:
            return _gpu_failed(where, exit.node, fault)
        if said == "crashed" and is_peers_fault(message):
            return outcome("crashed", f"{where}: {message}; the other end is gone")
    if said in ACTIONS and said not in ("finished", "time-limit"):
        # An exception would be raised again; a signal from outside would not.
        return outcome(said, message or where, "stop" if said == "crashed" else None)  # type: ignore[arg-type]
    if full:
        mend = "ask for more memory a node (`mem`), for more nodes, or lower micro_batch_size"
        return outcome("out-of-memory", f"{where}: killed because the machine or the job's share was full; {mend}")
    if exit.code < 0:
        name = signal.Signals(-exit.code).name if -exit.code in {s.value for s in signal.Signals} else str(-exit.code)
        hint = " (was the machine out of memory?)" if exit.code == -signal.SIGKILL else ""
        return outcome("crashed", f"{where}: killed by {name}{hint}")
    return outcome("crashed", f"{where}: exit code {exit.code} without saying why; see its log", "stop")


def _gpu_failed(where: str, node: str | None, fault: GpuFault) -> Outcome:
    found = outcome("gpu-fault", f"{where}: {fault.line[:300]}")
    nodes = (node,) if node else ()
    if fault.blame == "node":
        return replace(found, exclude=nodes)
    return replace(found, suspect=nodes) if fault.blame == "suspect" else found
