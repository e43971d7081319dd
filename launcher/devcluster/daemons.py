"""Processes of the dev cluster: started apart from the caller, known by pid and start time, awaited and ended."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from launcher import store
from launcher.errors import WorldError
from launcher.store import Owner

#: Debian keeps daemons where an ordinary user's PATH does not look.
SBIN = ("/usr/sbin", "/sbin")
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), *SBIN])
#: Seconds between two looks at something awaited.
_PAUSE = 0.05


def absent(programs: Iterable[str]) -> list[str]:
    """The programs that this machine lacks."""
    return [name for name in programs if not shutil.which(name, path=PATH)]


def spawn(folder: Path, name: str, argv: list[str], **variables: str) -> Owner:
    """Start a daemon that outlives the caller; what it prints goes to `log/NAME.out`.

    It gets a bare environment, because slurmd's reaches jobs and the caller's may hold secrets. PRISM_DEVCLUSTER in it
    says whose it is.
    """
    program = shutil.which(argv[0], path=PATH)
    if program is None:
        raise WorldError(f"{argv[0]}: no such program")
    env = {"PATH": PATH, "LANG": "C.UTF-8", "HOME": os.environ.get("HOME", "/"), "PRISM_DEVCLUSTER": str(folder)}
    log = os.open(log_file(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    files = [(os.POSIX_SPAWN_DUP2, null, 0), (os.POSIX_SPAWN_DUP2, log, 1), (os.POSIX_SPAWN_DUP2, log, 2)]
    try:
        pid = os.posix_spawn(program, argv, {**env, **variables}, file_actions=files, setsid=True)
    finally:
        os.close(log)
        os.close(null)
    return store.this_process(pid)


def log_file(folder: Path, name: str) -> Path:
    """What a daemon printed; Slurm's daemons also write `log/NAME.log`."""
    return folder / "log" / f"{name}.out"


def lives(owner: Owner) -> bool:
    """Whether the process is still there; a dead child is collected."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(owner.pid, os.WNOHANG)
    return store.is_alive(owner) is True


def wait_until(what: str, ready: Callable[[], bool], seconds: float, folder: Path, name: str, owner: Owner) -> None:
    """Ask `ready` until it says yes. Raises WorldError, with the log's end, when the daemon dies or time is up."""
    end = time.monotonic() + seconds
    while not ready():
        died = not lives(owner)
        if died or time.monotonic() > end:
            why = f"{name} has died" if died else f"not after {seconds:.0f} s"
            raise WorldError(f"dev cluster: {what}: {why}\n{_tail(folder, name)}")
        time.sleep(_PAUSE)


def _tail(folder: Path, name: str) -> str:
    """Where the daemon's logs are, and the last lines of the one that says most."""
    logs = [p for p in (folder / "log" / f"{name}.log", log_file(folder, name)) if p.exists() and p.stat().st_size]
    if not logs:
        return f"  its log is empty: {log_file(folder, name)}"
    lines = logs[0].read_text(errors="replace", encoding="utf-8").splitlines()[-8:]
    return "\n".join([f"  the end of {logs[0]}:", *(f"  | {line}" for line in lines)])


def end(owners: Iterable[Owner], seconds: float) -> None:
    """Ask the processes to end, and kill those that live on after `seconds`."""
    living = [owner for owner in owners if _send(owner, signal.SIGTERM)]
    until = time.monotonic() + seconds
    while (living := [owner for owner in living if lives(owner)]) and time.monotonic() < until:
        time.sleep(_PAUSE)
    kill(living)


def kill(owners: Iterable[Owner]) -> None:
    """Kill the processes and wait until they are gone."""
    living = [owner for owner in owners if _send(owner, signal.SIGKILL)]
    until = time.monotonic() + 5
    while (living := [owner for owner in living if lives(owner)]) and time.monotonic() < until:
        time.sleep(_PAUSE / 5)


def _send(owner: Owner, number: signal.Signals) -> bool:
    if not lives(owner):
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(owner.pid, number)
    return True


def listens(path: Path) -> bool:
    """Whether somebody answers at a unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def call(argv: Sequence[str], seconds: float = 10, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a client program to its end. A time-out reads as exit code 124."""
    env = {**os.environ, "PATH": PATH, **variables}
    try:
        return subprocess.run(
            argv,
            capture_output=True,
            text=True,
            timeout=seconds,
            stdin=subprocess.DEVNULL,
            env=env,
            check=False,
            encoding="utf-8",
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(argv, 124, "", f"{argv[0]}: no answer in {seconds:.0f} s")


def must(argv: Sequence[str], seconds: float = 10, **variables: str) -> str:
    """The same, and what it printed. Raises WorldError where it fails."""
    done = call(argv, seconds, **variables)
    if done.returncode:
        raise WorldError(f"dev cluster: {' '.join(argv)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def free_ports(count: int) -> tuple[int, ...]:
    """TCP ports that nobody uses, below the range from which the kernel gives ports to clients."""
    free = (port for port in random.sample(range(20_000, 32_000), 12_000) if _can_bind(port))
    return tuple(itertools.islice(free, count))


def _can_bind(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
