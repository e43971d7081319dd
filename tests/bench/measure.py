"""What every measurement here uses: a row of the table, CPU seconds of a child, a cold file, anonymous memory."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CHECKOUT = Path(__file__).resolve().parents[2]
GIB = 1 << 30


@dataclass(frozen=True)
class Row:
    """One line of the table: the median of `values`, its budget if it has one, and what was compared and how.

    `better` says on which side of the budget the value should be.
    """

    name: str
    values: tuple[float, ...]
    unit: str
    how: str
    budget: float | None = None
    better: Literal["lower", "higher"] = "lower"

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def met(self) -> bool | None:
        """Whether the median keeps the budget; None without one."""
        if self.budget is None:
            return None
        return self.median <= self.budget if self.better == "lower" else self.median >= self.budget


def environment(scratch: Path) -> dict[str, str]:
    """Variables for a child that runs this checkout with its bytecode compiled, as an installed program's is."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONDONTWRITEBYTECODE", "PRISM_ROOT")}
    ours = {"PYTHONPATH": str(CHECKOUT), "PYTHONPYCACHEPREFIX": str(scratch / "bytecode"), "OMP_NUM_THREADS": "1"}
    return {**kept, **ours}


def cpu_seconds(command: Sequence[str], variables: dict[str, str], cwd: Path) -> float:
    """User and system seconds of a child and of what it waited for. Raises RuntimeError where it fails."""
    before = _children()
    done = subprocess.run(command, env=variables, cwd=cwd, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr.strip()[-2000:]}")
    return _children() - before


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall seconds of `work`, and the user and system seconds of this process and of the children it waited for."""
    began, before = time.monotonic(), _self() + _children()
    work()
    return time.monotonic() - began, _self() + _children() - before


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _self() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


# -------------------------------------------------------------------------------------------------------------- files


def files_of(folder: Path) -> list[Path]:
    """Every file below a folder."""
    return sorted(p for p in folder.rglob("*") if p.is_file())


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder."""
    return sum(p.stat().st_size for p in files_of(folder))


def make_cold(folder: Path) -> bool:
    """Take a folder's files out of the page cache; whether they are out of it: some file systems keep them."""
    for path in files_of(folder):
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)
    # Last, so that reading to see does not warm what is looked at next.
    return not any(path.stat().st_size > 1 << 20 and _is_cached(path) for path in files_of(folder))


def cold_or_warm(folder: Path) -> str:
    """How a folder's files will be read here, as the table says it."""
    return "cold" if make_cold(folder) else "warm: they stay in the page cache on this file system"


def _is_cached(path: Path) -> bool:
    """Whether the byte in the middle can be read without waiting for the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(file, [bytearray(1)], path.stat().st_size // 2, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
    finally:
        os.close(file)


# ------------------------------------------------------------------------------------------------------------- memory


def run_watched(command: Sequence[str], variables: dict[str, str], cwd: Path, timeout: int = 300) -> tuple[str, int]:
    """Run a child; returns what it printed and its peak of anonymous memory in bytes, looked at every 2 ms.

    Raises RuntimeError where it fails. Pages of files, which the kernel can drop at any time, are not counted.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, env=variables, cwd=cwd, stdout=out, stderr=errors, text=True)
        over, peak = threading.Event(), [0]
        watcher = threading.Thread(target=_watch, args=(child.pid, peak, over))
        watcher.start()
        try:
            code = child.wait(timeout=timeout)
        finally:
            over.set()
            watcher.join()
            if child.poll() is None:
                child.kill()
                child.wait()
        out.seek(0)
        errors.seek(0)
        if code != 0:
            raise RuntimeError(f"{' '.join(command)}: exit code {code}: {errors.read().strip()[-2000:]}")
        return out.read(), peak[0]


def _watch(pid: int, peak: list[int], over: threading.Event) -> None:
    while not over.wait(0.002):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return
        kib = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:")), 0)
        peak[0] = max(peak[0], kib * 1024)


def python(*words: str) -> list[str]:
    """A command line of this interpreter."""
    return [sys.executable, *words]
