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
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from launcher import store
from launcher.errors import UserError
from launcher.spec import Probe, Step
from launcher.steps import Place, fill
from launcher.supervisor import memory
from launcher.supervisor.beats import RunningTime
from launcher.supervisor.classify import RankExit, Said


def read_said(path: Path) -> Said | None:
    """What an exit file says; None where there is none, or it is damaged."""
    try:
        data = store.read_json(path)
    except OSError:
        return None
    if not isinstance(data, dict) or not isinstance(data.get("class"), str):
        return None
    message = data.get("message")
    used = {name: _number(data.get(name)) for name in ("cpu_seconds", "peak_memory_bytes")}
    return Said(data["class"], message if isinstance(message, str) else "", **used)


def _number(value: Any) -> float:
    return value if isinstance(value, (int, float)) and 0 <= value < _MOST else 0.0


#: More than any process has used, of anything.
_MOST = 1e18


@dataclass(frozen=True)
class Process:
    """A started process, and the folder in which it says how it ended."""

    step: Step
    rank: int
    popen: subprocess.Popen[bytes]
    attempt_dir: Path
    told: list[RankExit] = field(default_factory=list, kw_only=True)

    def exits(self) -> list[RankExit]:
        """How it ended; nothing while it runs."""
        if not self.told and (code := self.poll()) is not None:
            self.told.append(self._rank_exit(self.rank, code))
        return self.told

    def _rank_exit(self, rank: int, code: int, node: str | None = None) -> RankExit:
        said = read_said(self.attempt_dir / f"exit.{self.step.name}.{rank}.json")
        log = "" if code == 0 or not self.step.gpus else _tail(self.attempt_dir / f"{self.step.name}.{rank}.log")
        return RankExit(self.step.name, rank, code, said, node, log)

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

    def exits(self) -> list[RankExit]:
        """The tasks that ended badly, while the others may still run, or the end of all."""
        ended = None if self.told else self.poll()
        self.told.extend(self._rank_exit(rank, code, node) for rank, code, node in self._complaints())
        if ended is not None and not self.told:
            self.told.append(self._end_of_all(128 - ended if ended > 128 else ended))  # over 128: all were killed
        return self.told

    def _end_of_all(self, code: int) -> RankExit:
        """The end of the first rank that did not finish, or of the first."""
        found = [self._rank_exit(rank, code) for rank in range(self.step.ntasks)]
        return next((e for e in found if e.said is None or e.said.exit_class != "finished"), found[0])

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

    def _complaints(self) -> list[tuple[int, int, str]]:
        assert self.popen.stderr is not None
        text = (self.popen.stderr.read() or b"").decode(errors="replace")
        if text:
            with (self.attempt_dir / f"{self.step.name}.srun.log").open("a", encoding="utf-8") as log:
                log.write(text)
        return complaints(text)


_COMPLAINT = re.compile(r"^srun: error: (\S+): tasks? ([\d,-]+): (.+)$", re.MULTILINE)


#: The end of a log in which the cause of a rank's death is looked for.
_TAIL_BYTES = 32 << 10


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def complaints(text: str) -> list[tuple[int, int, str]]:
    """Tasks that ended badly, their exit codes (negative: that signal) and nodes, from what srun wrote to stderr."""
    found = []
    for node, tasks, what in _COMPLAINT.findall(text):
        code = re.search(r"exit code (\d+)", what)
        rank = int(re.split("[,-]", tasks)[0])
        if code:
            found.append((rank, int(code[1]), node))
        elif "Terminated" in what:
            found.append((rank, -signal.SIGTERM, node))
        else:  # Killed, Segmentation fault, Aborted, ...
            number = _NUMBERS.get(what.split(" (")[0].strip(), signal.SIGKILL)
            full = number == signal.SIGKILL and memory.is_told(text)
            found.append((rank, -memory.SIG_OOM if full else -number, node))
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
    clock = RunningTime()
    while clock() < grace and any(p.poll() is None for p in processes):
        time.sleep(0.05)
    kill_all(processes)


def kill_all(processes: list[Process]) -> None:
    """Kill what still runs, with all that it started."""
    for process in processes:
        process.signal(signal.SIGKILL)
    for process in processes:
        process.popen.wait()


def popen(
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
