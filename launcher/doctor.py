"""What this machine has and lacks, for each way of using the launcher; with the mend for what is missing."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from launcher.containers import RUNTIMES
from launcher.data import install_command
from launcher.units import format_bytes

_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)[^;]*;.*extra *== *['\"]([\w-]+)['\"]")
_GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `wanted_by` is what needs it; `mend` is empty where nothing is wrong."""

    name: str
    wanted_by: Literal["always", "local", "slurm", "gpu", "report"]
    ok: bool
    found: str
    mend: str = ""


def examine(root: Path) -> list[Finding]:
    """Look at this machine; changes nothing."""
    return [*_machine(root), *_packages("local"), *_packages("report"), *_programs()]


def _machine(root: Path) -> Iterator[Finding]:
    yield Finding("python", "always", True, f"{platform.python_version()} ({platform.machine()})")
    yield Finding("cores", "local", True, str(len(os.sched_getaffinity(0))))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    enough = memory >= 4 * _GIB
    yield Finding("memory", "local", enough, format_bytes(memory), "" if enough else "the demo takes about 4 GiB")
    folder = next(p for p in (root, *root.parents) if p.exists())
    free = shutil.disk_usage(folder).free
    room = "" if free >= _GIB else f"free some room under {folder}, or choose another --root"
    yield Finding("disk", "always", not room, f"{format_bytes(free)} free for {root}", room)
    writable = os.access(folder, os.W_OK)
    mend = "" if writable else "choose another with --root or PRISM_ROOT"
    yield Finding("root", "always", writable, f"{folder} is {'writable' if writable else 'not writable'}", mend)


def _packages(extra: Literal["local", "report"]) -> Iterator[Finding]:
    """Every package of an extra: there or not. Whether the version fits is pip's to judge."""
    for line in requires("prism-launch") or []:
        match = _REQUIREMENT.match(line)
        if match is None or match[2] != extra:
            continue
        name = match[1]
        try:
            yield Finding(name, extra, True, version(name))
        except PackageNotFoundError:
            yield Finding(name, extra, False, "not installed", install_command(extra))


def _programs() -> Iterator[Finding]:
    sbatch = shutil.which("sbatch")
    found = _first_line("sbatch", "--version") if sbatch else "no sbatch here"
    yield Finding("slurm", "slurm", bool(sbatch), found, "" if sbatch else "render needs none; submit on a login node")
    programs = ("enroot", *(program for runtime in RUNTIMES.values() for program in runtime.programs))
    runtimes = [name for name in programs if shutil.which(name)]
    yield Finding("containers", "slurm", True, ", ".join(runtimes) or "none here")
    smi = shutil.which("nvidia-smi")
    gpus = _first_line("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader") if smi else "none seen"
    mend = "" if smi else "training runs on the CPU here (cpu_mode), for small models alone"
    yield Finding("gpu", "gpu", bool(smi), gpus, mend)


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, encoding="utf-8", errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return f"{command[0]} does not answer"
    return (done.stdout.strip() or done.stderr.strip() or "no answer").splitlines()[0]
