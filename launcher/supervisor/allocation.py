"""Where an attempt runs: this machine, or a Slurm job. How steps start, what a stop means, how to get another life."""

from __future__ import annotations

import fnmatch
import os
import pwd
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import launcher
from launcher import slurm, store
from launcher.containers import DETACHED, LEAKS, container_name
from launcher.errors import UserError, WorldError
from launcher.spec import ExitClass, StageSpec, Step
from launcher.steps import (
    ARRAY_VARIABLES,
    SRUN_DEFAULTS,
    Place,
    SlurmAttempt,
    is_elsewhere,
    local_commands,
    nodelist,
    place_of,
    slurm_place,
    srun_argv,
)
from launcher.store import Owner
from launcher.supervisor.containers import contain, remove_leftovers
from launcher.supervisor.processes import Process, SrunStep


class Allocation(Protocol):
    """What the supervisor needs of the place that it runs in."""

    @property
    def job(self) -> str | None:
        """The Slurm job's id; None outside Slurm."""

    @property
    def attempt_dir(self) -> Path:
        """The attempt's folder."""

    def place(self) -> Place:
        """Hosts and ports of the steps."""

    def start(self, step: Step, place: Place) -> list[Process]:
        """Start a step."""

    def why(self, number: signal.Signals) -> ExitClass:
        """What a signal to stop stands for."""

    def lives(self, owner: Owner) -> bool | None:
        """Whether another maker of the artifact lives; None where that cannot be told."""

    def requeue(self) -> str | None:
        """Ask for another life of this job; returns why not."""


@dataclass(frozen=True)
class ThisMachine:
    """Processes of this machine; another life is the local driver's affair."""

    spec: StageSpec
    root: Path
    stage_json: Path
    attempt_dir: Path
    job: str | None = None

    def place(self) -> Place:
        """This machine, a free port for each step."""
        return place_of(
            self.spec,
            self.root,
            self.stage_json,
            self.attempt_dir,
            sys.executable,
            hosts={step.name: "127.0.0.1" for step in self.spec.steps},
            ports={step.name: str(_free_port()) for step in self.spec.steps},
        )

    def start(self, step: Step, place: Place) -> list[Process]:
        """Start every rank; output goes to STEP.RANK.log. Ranks die with the supervisor."""
        container = self.spec.runtime.container
        if container in DETACHED:
            remove_leftovers(container, f"{self.root}/{self.spec.artifact}", self.attempt_dir)
        inherited = self._environment()
        user = f"{os.getuid()}:{os.getgid()}"
        started: list[Process] = []
        for rank, (argv, variables) in enumerate(local_commands(self.spec, step, place, user)):
            with (self.attempt_dir / f"{step.name}.{rank}.log").open("ab") as log:
                popen = _popen(argv, {**inherited, **variables}, self.attempt_dir, stdout=log, stderr=subprocess.STDOUT)
            process = Process(step, rank, popen, self.attempt_dir)
            name = container_name(str(self.attempt_dir), step.name, rank)
            started.append(contain(process, container, name) if container in (*DETACHED, "apptainer") else process)
        return started

    def _environment(self) -> dict[str, str]:
        """This process's environment, as the ranks inherit it, or the program that starts their containers."""
        container = self.spec.runtime.container
        leaks = (*LEAKS[container], *self.spec.runtime.env_unset)
        inherited = {k: v for k, v in os.environ.items() if not any(fnmatch.fnmatchcase(k, leak) for leak in leaks)}
        if container == "none":
            inherited["PYTHONPATH"] = os.pathsep.join(filter(None, [_package_root(), os.environ.get("PYTHONPATH")]))
        if container in ("none", "charliecloud"):  # the others start their containers from another process
            inherited |= {"PRISM_DIE_WITH_PARENT": "1", "PRISM_PARENT": str(os.getpid())}
        return {"USER": _user_name(), **inherited, "PYTHONUNBUFFERED": "1"}

    def why(self, number: signal.Signals) -> ExitClass:
        """TERM is `cancel` or Ctrl-C."""
        return "cancelled" if number == signal.SIGTERM else "time-limit"

    def lives(self, owner: Owner) -> bool | None:
        """By process id and start time."""
        return store.is_alive(owner)

    def requeue(self) -> str | None:
        """Never: the driver starts another attempt."""
        return "there is no queue on this machine"


@dataclass(frozen=True)
class SlurmJob:
    """The batch step of a Slurm job, on its first node."""

    spec: StageSpec
    root: Path
    attempt: SlurmAttempt
    nodes: str

    @classmethod
    def current(cls, spec: StageSpec, root: Path) -> SlurmJob:
        """The job that this process runs in, by its environment."""
        restarts = os.environ.get("SLURM_RESTART_COUNT") or "0"
        number = os.environ["SLURM_JOB_ID"]
        element = [os.environ.get(name) for name in ARRAY_VARIABLES]
        job = "_".join(part for part in element if part) if all(element) else number
        hosts = _hosts_elsewhere(spec)
        attempt = SlurmAttempt(job, restarts, os.environ["SLURMD_NODENAME"], number, hosts)
        return cls(spec, root, attempt, os.environ["SLURM_JOB_NODELIST"])

    @property
    def job(self) -> str:
        """The job's id."""
        return self.attempt.job

    @property
    def attempt_dir(self) -> Path:
        """The folder of this life of the job."""
        return store.stage_dir(self.root, self.spec.run, self.spec.stage) / self.attempt.name

    def place(self) -> Place:
        """Each step's first node; ports from the job's id."""
        return slurm_place(self.spec, self.root, sys.executable, self.attempt)

    def start(self, step: Step, place: Place) -> list[Process]:
        """Start the step's srun; the tasks write their own logs."""
        unset = (*SRUN_DEFAULTS, *self.spec.runtime.env_unset)
        inherited = {k: v for k, v in os.environ.items() if k not in unset}
        argv = srun_argv(step, place, self.spec.runtime)
        popen = _popen(argv, inherited, self.attempt_dir, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        assert popen.stderr is not None
        os.set_blocking(popen.stderr.fileno(), False)
        return [SrunStep(step, 0, popen, self.attempt_dir)]

    def why(self, number: signal.Signals) -> ExitClass:
        """TERM is ambiguous: ask first, or a user's scancel would be undone by requeueing."""
        known = slurm.show_job(self.job)
        if number == signal.SIGTERM and known is not None:
            if known.restarts > int(self.attempt.restarts):
                return "node-failure" if slurm.bad_nodes(self.nodes) else "requeued"
            if known.state != "RUNNING":
                return "cancelled"
        return "preempted" if known is not None and known.preempted else "time-limit"

    def lives(self, owner: Owner) -> bool | None:
        """By Slurm's word where the process is on another node; an earlier life of this job is dead."""
        if owner.job is None or store.is_alive(owner) is not None:
            return store.is_alive(owner)
        if owner.job == self.job:
            return False
        try:
            known = slurm.job_states([owner.job]).get(owner.job)
        except WorldError:  # a controller that does not answer for a while is no reason to fail
            return None
        return None if known is None else known.is_active

    def requeue(self) -> str | None:
        """Put the job back into the queue; returns what Slurm said where it refused."""
        return slurm.requeue(self.job)


def _hosts_elsewhere(spec: StageSpec) -> dict[str, str]:
    """First nodes of the steps that do not start on this one, by step."""
    away = [step for step in spec.steps if is_elsewhere(step)]
    nodes = {name: slurm.hostnames(os.environ[name]) for name in dict.fromkeys(map(nodelist, away))}
    return {step.name: nodes[nodelist(step)][step.first_node] for step in away}


def _user_name() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _package_root() -> str:
    # Workers run in the attempt's folder, so that nothing in the user's own can be taken for a module.
    return str(Path(launcher.__file__).resolve().parent.parent)


def _popen(
    argv: tuple[str, ...], environment: Mapping[str, str], folder: Path, stdout: IO[Any] | int, stderr: IO[Any] | int
) -> subprocess.Popen[bytes]:
    """A session of its own, without standard input."""
    try:
        return subprocess.Popen(
            argv,
            env=dict(environment),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
    except FileNotFoundError:
        raise UserError(
            f"{argv[0]}: no such program here; the cluster profile's `python` names the interpreter"
        ) from None
