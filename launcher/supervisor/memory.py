"""Whether a process was ended for want of the machine's memory: Slurm's words for it, and the kernel's own count."""

from __future__ import annotations

import re
from pathlib import Path

#: What Slurm calls the end of a task that was killed for want of memory, in place of the KILL it died of: `0:125`.
SIG_OOM = 125
# srun (launch.c), slurmstepd (task_cgroup_memory.c, older wording with a hyphen; slurm_jobacct_gather.c) and Linux's
# log; tests/data/slurm-24.05 has the lines.
_TOLD = re.compile(
    r"Detected \d+ oom[-_]kill event|: Out Of Memory$|exceeded (job |step )?memory limit"
    r"|Memory cgroup out of memory|Out of memory: Killed process",
    re.MULTILINE,
)


def is_told(text: str) -> bool:
    """Whether srun or slurmstepd says that a process of the step was killed for want of memory."""
    return bool(_TOLD.search(text))


def kernel_kills(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """How many processes the kernel has killed so far for want of memory.

    Counted are those of this Slurm job on this node, or of this container, where cgroup v2 says so; else those of the
    whole machine. 0 where neither is told.
    """
    for events in _events_files(proc, cgroups):
        found = _number(events, r"^oom_kill (\d+)$")
        if found is not None:
            return found
    return _number(proc / "vmstat", r"^oom_kill (\d+)$") or 0


def _events_files(proc: Path, cgroups: Path) -> list[Path]:
    """memory.events of the job's cgroup, which counts its steps' too; of our own one outside Slurm."""
    own = re.search(r"^0::(/.*)$", _text(proc / "self" / "cgroup"), re.MULTILINE)
    if own is None:
        return []
    job = re.match(r".*/job_\d+(?=/|$)", own[1])
    return [cgroups / (job[0] if job else own[1]).lstrip("/") / "memory.events"]


def _number(path: Path, pattern: str) -> int | None:
    found = re.search(pattern, _text(path), re.MULTILINE)
    return int(found[1]) if found else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
