"""Where an attempt runs: this machine here, a Slurm job in `slurm_job`. How steps start, what a stop means, how to get
another life."""

from __future__ import annotations

import fnmatch
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import launcher
from launcher import store
from launcher.containers import RUNTIMES, container_name
from launcher.spec import ExitClass, StageSpec, Step
from launcher.steps import Place, local_commands, place_of
from launcher.store import Owner
from launcher.supervisor.classify import Outcome
from launcher.supervisor.containers import contain, remove_leftovers
from launcher.supervisor.preflight import Findings
from launcher.supervisor.processes import Process, popen
from launcher.users import user_name


@dataclass(frozen=True)
class Reason:
    """Why an attempt has to stop. `nodes` are at fault; `leaving`: Slurm is ending this life already."""

    exit_class: ExitClass
    nodes: tuple[str, ...] = ()
    leaving: bool = False


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

    def preflight(self, place: Place, stopped: Callable[[], bool]) -> Findings | None:
        """Look at the nodes before anything starts, unless asked to stop; None where there is nothing to look at."""

    def why(self, number: signal.Signals | None) -> Reason | None:
        """What a signal to stop stands for; None: what may have ended or stopped the workers where nobody asked."""

    def noticed(self) -> Reason | None:
        """A reason to stop of which no signal tells; asked in every round, so it must not take long."""

    def lives(self, owner: Owner) -> bool | None:
        """Whether another maker of the artifact lives; None where that cannot be told."""

    def next_life(self, result: Outcome) -> Outcome:
        """The outcome where another life is wanted, or why this one was the last."""

    def go_on(self, exclude: Sequence[str]) -> str | None:
        """Ask for another life, without some nodes; returns why there is none. Nothing may follow but the exit."""


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
        runtime = RUNTIMES[container]
        if runtime.is_detached:
            remove_leftovers(container, f"{self.root}/{self.spec.artifact}", self.attempt_dir)
        inherited = self._environment()
        user = f"{os.getuid()}:{os.getgid()}"
        started: list[Process] = []
        for rank, (argv, variables) in enumerate(local_commands(self.spec, step, place, user)):
            with (self.attempt_dir / f"{step.name}.{rank}.log").open("ab") as log:
                made = popen(argv, {**inherited, **variables}, self.attempt_dir, log, subprocess.STDOUT)
            process = Process(step, rank, made, self.attempt_dir)
            name = container_name(str(self.attempt_dir), step.name, rank)
            started.append(process if runtime.is_child else contain(process, container, name))
        return started

    def _environment(self) -> dict[str, str]:
        """This process's environment, as the ranks inherit it, or the program that starts their containers."""
        runtime = RUNTIMES[self.spec.runtime.container]
        leaks = (*runtime.leaks, *self.spec.runtime.env_unset)
        inherited = {k: v for k, v in os.environ.items() if not any(fnmatch.fnmatchcase(k, leak) for leak in leaks)}
        if self.spec.runtime.container == "none":
            inherited["PYTHONPATH"] = os.pathsep.join(filter(None, [_package_root(), os.environ.get("PYTHONPATH")]))
        if runtime.is_child:  # the others start their containers from another process
            inherited["PRISM_PARENT"] = str(os.getpid())
        return {"USER": user_name(), **inherited, "PYTHONUNBUFFERED": "1"}

    def preflight(self, place: Place, stopped: Callable[[], bool]) -> Findings | None:
        """Nothing: `doctor` looks at this machine."""
        return None

    def why(self, number: signal.Signals | None) -> Reason | None:
        """TERM is `cancel` or Ctrl-C."""
        if number is None:
            return None
        return Reason("cancelled" if number == signal.SIGTERM else "time-limit")

    def noticed(self) -> Reason | None:
        """Nothing."""
        return None

    def lives(self, owner: Owner) -> bool | None:
        """By process id and start time."""
        return store.is_alive(owner)

    def next_life(self, result: Outcome) -> Outcome:
        """The driver decides."""
        return result

    def go_on(self, exclude: Sequence[str]) -> str | None:
        """The driver starts another attempt."""
        return None


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _package_root() -> str:
    # Workers run in the attempt's folder, so that nothing in the user's own can be taken for a module.
    return str(Path(launcher.__file__).resolve().parent.parent)
