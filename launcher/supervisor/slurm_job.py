"""The batch step of a Slurm job as the place of an attempt. Every call to Slurm has a time-out of 2 s."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launcher import slurm, store, submitted
from launcher.attempts import attempts_at
from launcher.errors import WorldError
from launcher.progress import TERM_NOTE
from launcher.slurm import Job
from launcher.spec import StageSpec, Step
from launcher.steps import (
    ARRAY_VARIABLES,
    SRUN_DEFAULTS,
    Place,
    SlurmAttempt,
    is_elsewhere,
    nodelist,
    preflight_argv,
    preflight_place,
    preflight_steps,
    slurm_place,
    srun_argv,
)
from launcher.store import Owner
from launcher.supervisor import chain, lives, preflight
from launcher.supervisor.allocation import Reason
from launcher.supervisor.classify import Outcome
from launcher.supervisor.preflight import Findings
from launcher.supervisor.processes import Process, SrunStep, popen

_ANSWER_S = 2.0


@dataclass
class SlurmJob:
    """The batch step of a Slurm job, on its first node; `links` are the jobs of its chain, or this one alone."""

    spec: StageSpec
    root: Path
    python: str
    attempt: SlurmAttempt
    nodes: str
    node_count: int
    links: tuple[str, ...]
    log_start: int = 0
    _asked_at: float = field(default=0.0, init=False)

    @classmethod
    def current(cls, spec: StageSpec, root: Path, python: str) -> SlurmJob:
        """The job that this process runs in, by its environment."""
        number = os.environ["SLURM_JOB_ID"]
        element = [os.environ.get(name) for name in ARRAY_VARIABLES]
        job = "_".join(part for part in element if part) if all(element) else number
        restarts = os.environ.get("SLURM_RESTART_COUNT") or "0"
        hosts = _hosts_elsewhere(spec)
        attempt = SlurmAttempt(job, restarts, os.environ["SLURMD_NODENAME"], number, hosts)
        links = chain.read_links(root, spec, job) if spec.limits.continuation == "chain" else (job,)
        nodes, count = os.environ["SLURM_JOB_NODELIST"], int(os.environ.get("SLURM_JOB_NUM_NODES") or 1)
        return cls(spec, root, python, attempt, nodes, count, links, _log_size())

    @property
    def job(self) -> str:
        """The job's id."""
        return self.attempt.job

    @property
    def attempt_dir(self) -> Path:
        """The folder of this life of the job."""
        return store.stage_dir(self.root, self.spec.run, self.spec.stage) / self.attempt.name

    # ---- steps

    def place(self) -> Place:
        """Each step's first node; ports from the job's id."""
        return slurm_place(self.spec, self.root, self.python, self.attempt)

    def start(self, step: Step, place: Place) -> list[Process]:
        """Start the step's srun; the tasks write their own logs."""
        argv = srun_argv(step, place, self.spec.runtime)
        made = popen(argv, self._environment(), self.attempt_dir, subprocess.DEVNULL, subprocess.PIPE)
        assert made.stderr is not None
        os.set_blocking(made.stderr.fileno(), False)
        return [SrunStep(step, 0, made, self.attempt_dir)]

    def preflight(self, place: Place, stopped: Callable[[], bool]) -> Findings | None:
        """Look at every node of the job; None where the stage asks for no look."""
        if self.spec.preflight is None:
            return None
        there = preflight_place(place, self.attempt.node, self.attempt)
        steps = preflight_steps(self.spec, self.node_count, self.python)
        commands = [(step.name, preflight_argv(step, there, self.spec.runtime)) for step in steps]
        environment = self._environment()
        return preflight.look(self.spec.preflight, self._names(), commands, environment, self.attempt_dir, stopped)

    def _names(self) -> tuple[str, ...]:
        try:
            return tuple(slurm.hostnames(self.nodes, _ANSWER_S))
        except WorldError:  # Slurm does not answer
            return (self.attempt.node,)

    def _environment(self) -> dict[str, str]:
        unset = (*SRUN_DEFAULTS, *self.spec.runtime.env_unset)
        return {k: v for k, v in os.environ.items() if k not in unset}

    # ---- stopping

    def why(self, number: signal.Signals | None) -> Reason | None:
        """TERM is ambiguous: ask first, or a user's scancel would be undone by requeueing."""
        known = slurm.show_job(self.job, _ANSWER_S)
        if number == signal.SIGUSR2:
            return Reason("preempted" if known is not None and known.preempted else "time-limit")
        return self._ended(known, slurm.reason_in_log(_log_since(self.log_start))) or self._unasked(number)

    def _ended(self, known: Job | None, said: str | None) -> Reason | None:
        """Why Slurm is ending this life of the job, by its record and by what slurmstepd wrote into the log."""
        again = known is not None and known.restarts > int(self.attempt.restarts)
        over = again or said is not None or (known is not None and known.state != "RUNNING")
        if said == "PREEMPTION" or (known is not None and known.preempted):
            return Reason("preempted", leaving=over)
        if not over:
            return None
        if again or said in ("NODE FAILURE", "JOB REQUEUE"):
            failed = said == "NODE FAILURE"
            # A node that drains goes on with what it runs: it is to blame where a node failed and no other is down.
            bad = slurm.lost_nodes(self.nodes, _ANSWER_S) or (slurm.bad_nodes(self.nodes, _ANSWER_S) if failed else ())
            return Reason("node-failure" if bad or failed else "requeued", bad, leaving=True)
        late = said == "TIME LIMIT" or (known is not None and known.state == "TIMEOUT")
        return Reason("time-limit" if late else "cancelled", leaving=True)

    def _unasked(self, number: signal.Signals | None) -> Reason | None:
        if number is not None:
            return Reason("time-limit")  # TERM to a job that goes on: from whoever sent it by hand
        bad = slurm.lost_nodes(self.nodes, _ANSWER_S) if self.node_count > 1 else ()
        return Reason("node-failure", bad) if bad else None

    def noticed(self) -> Reason | None:
        """In a preemption with grace time the steps alone hear of it: where one has, Slurm is asked every 2 s."""
        now = time.monotonic()
        if now - self._asked_at < 2.0 or not (self.attempt_dir / TERM_NOTE).exists():
            return None
        self._asked_at = now
        known = slurm.show_job(self.job, _ANSWER_S)
        return Reason("preempted") if known is not None and known.preempted else None

    # ---- lives

    def lives(self, owner: Owner) -> bool | None:
        """By Slurm's word where the process is on another node; an earlier life of this job is dead."""
        if owner.job is None or store.is_alive(owner) is not None:
            return store.is_alive(owner)
        if owner.job == self.job:
            return False
        return submitted.lives(self.root, owner.job)

    def next_life(self, result: Outcome) -> Outcome:
        """The outcome where the stage gets another life, or with why this one was its last."""
        had = [life for life in attempts_at(self.root, self.spec) if chain.is_of(life, self.links)]
        result = lives.next_life(result, had, self.spec.limits)
        if result.action != "again" or self.spec.limits.continuation != "chain":
            return result
        number = self.links.index(self.job) + 1
        return lives.end_of_chain(result, number) if number >= self.spec.limits.chain_jobs else result

    def go_on(self, exclude: Sequence[str]) -> str | None:
        """Put the job back into the queue, unless Slurm has done so, and keep it off some nodes.

        In a chain the jobs that follow are kept off them. Returns why there will be no other life.
        """
        if self.spec.limits.continuation == "chain":
            for job in self._waiting_links() if exclude else ():
                _keep_off(job, exclude, slurm.show_job(job))
            return None
        # Ending this life, Slurm sends TERM to all that runs in it, the commands of Slurm below too.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        known = slurm.show_job(self.job) or slurm.show_job(self.job)
        if known is None or known.restarts <= int(self.attempt.restarts):
            refused = slurm.requeue(self.job)
            if refused is not None:
                return _not_requeued(refused)
        if exclude:  # at once: after the requeue there is KillWait for it
            _keep_off(self.job, exclude, known)
        return None

    def _waiting_links(self) -> list[str]:
        """The jobs that follow in the chain, as far as Slurm still knows them by these numbers."""
        links = chain.read_links(self.root, self.spec, self.job)
        after = links[links.index(self.job) + 1 :]
        lines = [line for line in submitted.read_submitted(self.root, self.spec.run) if line.job in after]
        with contextlib.suppress(WorldError):
            return [j.id for j in submitted.told_states(self.root, self.spec.run, lines).values() if j.is_active]
        return []


def _hosts_elsewhere(spec: StageSpec) -> dict[str, str]:
    """First nodes of the steps that do not start on this one, by step."""
    away = [step for step in spec.steps if is_elsewhere(step)]
    nodes = {name: slurm.hostnames(os.environ[name]) for name in dict.fromkeys(map(nodelist, away))}
    return {step.name: nodes[nodelist(step)][step.first_node] for step in away}


def _not_requeued(refused: str) -> str:
    if "nvalid job id" in refused:
        return "Slurm has forgotten this job: `prism-launch run` submits another, which goes on from what is saved"
    said = f"Slurm does not put the job back into its queue ({refused})"
    return f"{said}; set `continuation: chain` under limits: of the cluster profile"


def _keep_off(job: str, nodes: Sequence[str], known: Job | None) -> None:
    refused = slurm.exclude(job, nodes, known.excluded if known is not None else "")
    if refused is not None:
        print(f"job {job} is not kept off {', '.join(nodes)}: {refused}", flush=True)


def _log_size() -> int:
    """Where this life's part of the batch script's log begins."""
    found = os.fstat(2)
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


def _log_since(start: int) -> str:
    try:
        with open("/proc/self/fd/2", "rb") as log:
            if not stat.S_ISREG(os.fstat(log.fileno()).st_mode):
                return ""
            log.seek(start)
            return log.read().decode(errors="replace")
    except OSError:
        return ""
