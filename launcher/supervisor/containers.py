"""Processes of this machine that stand for a container of another process's: it has to be ended by name.

A guard beside each waits for the supervisor's end, however that comes, and removes the container: without it one would
outlive a killed supervisor, since the runtime's client can be killed and its container cannot with it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.attempts import tail_of
from launcher.containers import list_argv, name_prefix, remove_argv
from launcher.errors import WorldError
from launcher.supervisor.classify import RankExit, Said
from launcher.supervisor.processes import Process

#: $0: the client's process group; the rest: the command that removes the container. Standard input is the supervisor's.
_GUARD = 'read -r _; kill -s KILL -- "-$0"; exec "$@"'
#: What `docker run` and `podman run` exit with where the container could not be made.
_NOT_STARTED = 125
_COMPLAINTS = ("docker: ", "Error: ")
_CALL_S = 60


@dataclass(frozen=True)
class Contained(Process):
    """The client of a container, which passes signals and the exit code on, and the container itself."""

    runtime: str
    name: str
    guard: subprocess.Popen[bytes]

    def exits(self) -> list[RankExit]:
        """How it ended, as if there were no container: killed by a signal is negative, and a failed start says why."""
        return [self._inside(ended) for ended in super().exits()]

    def _inside(self, ended: RankExit) -> RankExit:
        if ended.code == _NOT_STARTED and ended.said is None:
            return replace(ended, said=self._not_started())
        killed = 128 < ended.code < 128 + 65
        return replace(ended, code=128 - ended.code) if killed else ended

    def _not_started(self) -> Said:
        log = self.attempt_dir / f"{self.step.name}.{self.rank}.log"
        lines = [line for line in tail_of(log, 50) if line.startswith(_COMPLAINTS)]
        words = lines[-1] if lines else f"see {log}"
        return Said("crashed", f"{self.runtime} could not start the container: {words}")

    def _kill_group(self) -> None:
        """Kill the client and, unless the container has ended by itself, the container."""
        super()._kill_group()
        if self.popen.returncode is None or self.popen.returncode < 0:
            with contextlib.suppress(WorldError):  # the next attempt removes what is left
                _call(remove_argv(self.runtime, (self.name,)))
        self.guard.kill()
        self.guard.wait()


def contain(process: Process, runtime: str, name: str) -> Contained:
    """A started client with its guard."""
    argv = ["sh", "-c", _GUARD, str(process.popen.pid), *remove_argv(runtime, (name,))]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    guard = subprocess.Popen(argv, stdin=subprocess.PIPE, start_new_session=True, **quiet)  # type: ignore[call-overload]
    return Contained(process.step, process.rank, process.popen, process.attempt_dir, runtime, name, guard)


def remove_leftovers(runtime: str, artifact: str, attempt_dir: Path) -> None:
    """Remove containers that earlier attempts left at work on an artifact. Raises WorldError where one stays."""
    left = [n for n in _call(list_argv(runtime, artifact)).split() if not n.startswith(name_prefix(str(attempt_dir)))]
    if left:
        _call(remove_argv(runtime, tuple(left)))


def _call(argv: tuple[str, ...]) -> str:
    """What the command prints. Raises WorldError with what it says where it fails."""
    try:
        done = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            timeout=_CALL_S,
            cwd=os.sep,
            check=False,
            encoding="utf-8",
            errors="replace",
        )
    except FileNotFoundError:
        raise WorldError(f"{argv[0]}: no such program here") from None
    except subprocess.TimeoutExpired:
        raise WorldError(f"{argv[0]}: no answer to `{' '.join(argv[:2])}` within {_CALL_S} s") from None
    if done.returncode:
        raise WorldError(f"{argv[0]}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout
