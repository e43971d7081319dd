"""The processes of a stage's steps: started, looked at, signalled. Each is its own session, so that a signal reaches
what it started in turn. Workers ask Linux to die with the supervisor (`progress.die_with_parent`)."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher import store
from launcher.spec import Probe, Step
from launcher.steps import Place, fill
from launcher.supervisor import memory
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
        code = self.poll()
        if code is None:
            return None
        said = store.read_json(self.attempt_dir / f"exit.{self.step.name}.{self.rank}.json")
        return RankExit(self.step.name, self.rank, code, said)

    def poll(self) -> int | None:
        """The exit code; None while it runs. What it started and left behind is killed when its end is noticed."""
        if self.popen.returncode is None and self.popen.poll() is not None:
            self._kill_group()
        return self.popen.returncode

    def signal(self, number: signal.Signals) -> None:
        """Signal the process alone, or, to kill, all that it started too; nothing once it has ended."""
        if self.poll() is not None:
            return
        if number == signal.SIGKILL:
            self._kill_group()
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.popen.pid, number)

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.popen.pid, signal.SIGKILL)


@dataclass(frozen=True)
class SrunStep(Process):
    """A step's srun, which stands for all its ranks; what it says itself goes to STEP.srun.log.

    srun tells at once which task ended badly, but ends itself only when every task has; its own exit code is the
    highest of all tasks'.
    """

    told: list[RankExit] = field(default_factory=list)

    def exit(self) -> RankExit | None:
        """The first task that ended badly, while the others may still run, or the end of all."""
        for rank, code in self._complaints():
            self.told.append(RankExit(self.step.name, rank, code, self._said(rank)))
        if self.told:
            return self.told[0]
        ended = self.poll()
        if ended is None:
            return None
        if ended > 128:
            ended = 128 - ended  # all ranks were killed
        said = [self._said(rank) for rank in range(self.step.ntasks)]
        unwell = [(r, s) for r, s in enumerate(said) if s is None or s.get("class") != "finished"]
        rank, what = unwell[0] if unwell else (0, said[0])
        return RankExit(self.step.name, rank, ended, what)

    def signal(self, number: signal.Signals) -> None:
        """Signal all ranks.

        To kill them srun is asked first, which takes 0.03 s where its nodes answer. Where it is killed itself the step
        goes on for seconds after its tasks have ended, and the job cannot start again before that.
        """
        if number == signal.SIGKILL and self.poll() is None:
            super().signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(1.0)
        super().signal(number)

    def _said(self, rank: int) -> dict[str, Any] | None:
        found: dict[str, Any] | None = store.read_json(self.attempt_dir / f"exit.{self.step.name}.{rank}.json")
        return found

    def _complaints(self) -> list[tuple[int, int]]:
        assert self.popen.stderr is not None
        text = (self.popen.stderr.read() or b"").decode(errors="replace")
        if text:
            with (self.attempt_dir / f"{self.step.name}.srun.log").open("a") as log:
                log.write(text)
        return complaints(text)


_COMPLAINT = re.compile(r"^srun: error: (\S+): tasks? ([\d,-]+): (.+)$", re.MULTILINE)


def complaints(text: str) -> list[tuple[int, int]]:
    """Tasks that ended badly and their exit codes (negative: that signal), from what srun wrote to its stderr."""
    found = []
    for _, tasks, what in _COMPLAINT.findall(text):
        code = re.search(r"exit code (\d+)", what)
        rank = int(re.split("[,-]", tasks)[0])
        if code:
            found.append((rank, int(code[1])))
        elif "Terminated" in what:
            found.append((rank, -signal.SIGTERM))
        else:  # Killed, Segmentation fault, Aborted, ...
            number = _NUMBERS.get(what.split(" (")[0].strip(), signal.SIGKILL)
            full = number == signal.SIGKILL and memory.is_told(text)
            found.append((rank, -memory.SIG_OOM if full else -number))
    return found


#: What the C library calls signals, as srun prints them.
_NUMBERS = {signal.strsignal(s): int(s) for s in signal.Signals}


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
    while time.monotonic() < end and any(p.poll() is None for p in processes):
        time.sleep(0.05)
    kill_all(processes)


def kill_all(processes: list[Process]) -> None:
    """Kill what still runs, with all that it started."""
    for process in processes:
        process.signal(signal.SIGKILL)
    for process in processes:
        process.popen.wait()
