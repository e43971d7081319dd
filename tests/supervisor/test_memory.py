"""What counts as a death for want of memory: lines that Slurm prints, and the kernel's own count."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from launcher.supervisor.memory import SIG_OOM, is_told, kernel_kills
from launcher.supervisor.processes import complaints

SLURM = Path(__file__).parents[1] / "data" / "slurm-24.05"


def test_what_srun_prints_of_tasks_that_ended_badly() -> None:
    assert complaints((SLURM / "srun.txt").read_text()) == [
        (3, -SIG_OOM, "gpu007"),
        (9, -SIG_OOM, "gpu008"),  # called killed, while slurmstepd told of memory
        (10, 7, "gpu008"),
        (11, -signal.SIGSEGV, "gpu008"),
        (13, -signal.SIGTERM, "gpu008"),
    ]
    assert complaints((SLURM / "srun-22.05.txt").read_text()) == [(3, -SIG_OOM, "gpu007")]


def test_a_task_that_was_just_killed_had_memory_enough() -> None:
    assert complaints("srun: error: gpu008: task 9: Killed\n") == [(9, -signal.SIGKILL, "gpu008")]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            "slurmstepd: error: Detected 1 oom_kill event in StepId=1.0. Some of the step tasks have been OOM Killed.",
            True,
        ),
        ("slurmstepd: error: Detected 3 oom-kill event(s) in StepId=1.batch cgroup.", True),
        ("slurmstepd: error: StepId=7.0 exceeded memory limit (734003200 > 52428800), being killed", True),
        ("srun: error: n1: task 0: Out Of Memory", True),
        ("srun: error: n1: task 0: Killed", False),
        ("slurmstepd: error: *** STEP 1.0 ON n1 CANCELLED AT 2026-01-31T23:00:00 DUE TO TIME LIMIT ***", False),
    ],
)
def test_told(line: str, told: bool) -> None:
    assert is_told(f"{line}\n") is told


def machine(tmp_path: Path, group: str, vmstat: int | None, **kills: int) -> tuple[Path, Path]:
    """/proc and /sys/fs/cgroup of a machine: our own group, and counts of groups by name (`__` stands for `/`)."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text(f"0::{group}\n" if group else "4:memory:/docker/x\n")
    if vmstat is not None:
        (proc / "vmstat").write_text(f"nr_free_pages 1\noom_kill {vmstat}\nswap_ra 0\n")
    for name, count in kills.items():
        folder = groups / name.replace("__", "/")
        folder.mkdir(parents=True)
        (folder / "memory.events").write_text(f"low 0\noom 9\noom_kill {count}\noom_group_kill 0\n")
    return proc, groups


def test_under_slurm_the_whole_job_counts(tmp_path: Path) -> None:
    group = "/system.slice/slurmstepd.scope/job_12/step_batch/user/task_0"
    counts = {"system.slice__slurmstepd.scope__job_12": 2, "system.slice__slurmstepd.scope__job_12__step_batch": 0}
    assert kernel_kills(*machine(tmp_path, group, 40, **counts)) == 2


def test_in_a_container_its_own_group_counts(tmp_path: Path) -> None:
    proc, groups = machine(tmp_path, "/", 40)
    groups.mkdir()
    (groups / "memory.events").write_text("oom_kill 1\n")
    assert kernel_kills(proc, groups) == 1


@pytest.mark.parametrize(("group", "vmstat", "count"), [("/", 5, 5), ("", 7, 7), ("/user.slice", None, 0)])
def test_else_the_machine_counts(tmp_path: Path, group: str, vmstat: int | None, count: int) -> None:
    assert kernel_kills(*machine(tmp_path, group, vmstat)) == count
