"""The processes of a stage's steps: started, looked at, signalled. Each is its own session, so that a signal reaches
what it started in turn; each dies with the supervisor."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import launcher
from launcher import store
from launcher.spec import Probe, StageSpec, Step
from launcher.steps import Place, fill, local_commands
from launcher.supervisor.classify import RankExit


@dataclass(frozen=True)
class Process:
    """A started process, and the folder in which it says how it ended."""

    step: Step
    rank: int
    popen: subprocess.Popen[bytes]
    attempt_dir: Path

    def exit(self) -> RankExit | None:
        """How it ended; None while it runs."""
        code = self.popen.poll()
        if code is None:
            return None
        said = store.read_json(self.attempt_dir / f"exit.{self.step.name}.{self.rank}.json")
        return RankExit(self.step.name, self.rank, code, said)

    def signal(self, number: signal.Signals) -> None:
        """Signal the process alone, or, to kill, all that it started too."""
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(self.popen.pid, number)
            elif self.popen.poll() is None:
                os.kill(self.popen.pid, number)


def local_place(spec: StageSpec, root: Path, stage_json: Path, attempt_dir: Path) -> Place:
    """This machine as the place of an attempt, a free port for each step."""
    return Place(
        root=str(root),
        stage_json=str(stage_json),
        attempt_dir=str(attempt_dir),
        python=sys.executable,
        hosts={step.name: "127.0.0.1" for step in spec.steps},
        ports={step.name: str(_free_port()) for step in spec.steps},
    )


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(step: Step, place: Place, unset: tuple[str, ...]) -> list[Process]:
    """Start every rank of a step; output goes to STEP.RANK.log in the attempt's folder."""
    folder = Path(place.attempt_dir)
    inherited = {k: v for k, v in os.environ.items() if k not in unset}
    inherited["PYTHONPATH"] = os.pathsep.join(filter(None, [_package_root(), os.environ.get("PYTHONPATH")]))
    inherited |= {"PYTHONUNBUFFERED": "1", "PRISM_DIE_WITH_PARENT": "1", "PRISM_PARENT": str(os.getpid())}
    return [
        _start(step, rank, argv, {**inherited, **variables}, folder)
        for rank, (argv, variables) in enumerate(local_commands(step, place))
    ]


def _package_root() -> str:
    # Workers run in the attempt's folder, so that nothing in the user's own can be taken for a module.
    return str(Path(launcher.__file__).resolve().parent.parent)


def _start(step: Step, rank: int, argv: tuple[str, ...], environment: Mapping[str, str], folder: Path) -> Process:
    with (folder / f"{step.name}.{rank}.log").open("ab") as log:
        popen = subprocess.Popen(
            argv,
            env=dict(environment),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Process(step, rank, popen, folder)


def is_ready(probe: Probe, place: Place) -> bool:
    """Whether a component answers."""
    target = fill((probe.target,), place)[0]
    if probe.kind == "file":
        return (Path(place.attempt_dir) / target).exists()
    if probe.kind == "tcp":
        host, _, port = target.rpartition(":")
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=2):
            return True
        return False
    return _answers_http(target)


def _answers_http(url: str) -> bool:
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return int(answer.status) < 400
    except (OSError, urllib.error.URLError):
        return False


def stop_all(processes: list[Process], grace: float) -> None:
    """Ask what still runs to save and stop, and kill what has not after `grace` seconds."""
    for process in processes:
        process.signal(signal.SIGUSR2)
    end = time.monotonic() + grace
    while time.monotonic() < end and any(p.popen.poll() is None for p in processes):
        time.sleep(0.05)
    kill_all(processes)


def kill_all(processes: list[Process]) -> None:
    """Kill what still runs, with all that it started."""
    for process in processes:
        process.signal(signal.SIGKILL)
    for process in processes:
        process.popen.wait()
