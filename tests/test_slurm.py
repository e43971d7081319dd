"""Slurm's answers as values. What 22.05 prints is seen on the dev cluster; files hold what newer versions print."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher import slurm
from launcher.errors import WorldError

DATA = Path(__file__).parent / "data" / "slurm-24.05"


def told(name: str) -> str:
    return (DATA / name).read_text()


def local_time(text: str) -> float:
    return time.mktime(time.strptime(text, "%Y-%m-%d %H:%M:%S"))


# ------------------------------------------------------------------------------------------------------ 24.05 and newer

SHOWN = [line for line in told("scontrol.txt").splitlines() if line]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (0, slurm.Job("501", "RUNNING", "None", nodes="gpu[007-008]")),
        (1, slurm.Job("502", "PENDING", "Dependency")),
        (2, slurm.Job("77_2", "COMPLETING", "NonZeroExitCode", 1, "gpu[007-008]")),
        (3, slurm.Job("63", "RUNNING", "None", nodes="gpu[007-008]")),
        (4, slurm.Job("63+1", "RUNNING", "None", nodes="gpu[007-008]")),
        (5, slurm.Job("510", "RUNNING", "None", nodes="gpu[007-008]", preempted=True)),
        (6, slurm.Job("511", "RUNNING", "None", nodes="gpu[007-008]")),
        (
            7,
            slurm.Job(
                "512", "OUT_OF_MEMORY", "OutOfMemory", nodes="gpu[007-008]", ended=local_time("2026-01-31 23:59:59")
            ),
        ),
        (8, slurm.Job("513", "REQUEUED", "Node_gpu008_failed", 3, "gpu[007-008]", excluded="gpu[003,008]")),
        (9, slurm.Job("514", "EXPEDITING", "None", nodes="gpu[007-008]")),
    ],
)
def test_scontrol(line: int, expected: slurm.Job) -> None:
    assert slurm.parse_show_job(SHOWN[line]) == expected


def test_scontrol_of_a_heterogeneous_job_is_its_leader() -> None:
    found = slurm.parse_show_job("\n".join(SHOWN[3:5]))
    assert found is not None and found.id == "63"


@pytest.mark.parametrize("text", ["", "slurm_load_jobs error: Invalid job id specified", "JobId=1 JobName=JobState=X "])
def test_what_is_no_job_is_none(text: str) -> None:
    assert slurm.parse_show_job(text) is None


def test_squeue() -> None:
    jobs = {job.id: job for job in slurm.parse_squeue(told("squeue.txt"))}
    assert jobs["501"] == slurm.Job("501", "RUNNING", nodes="gpu[007-008]", time_left="22:57:57")
    assert jobs["503"].reason.endswith("| try later") and jobs["503"].nodes == ""
    assert jobs["77_1"].ended == local_time("2026-01-31 23:11:00")
    ended = {"77_0", "77_1", "506"}
    assert {job for job, told_of in jobs.items() if not told_of.is_active} == ended


def test_sacct() -> None:
    jobs = {job.id: job for job in slurm.parse_sacct(told("sacct.txt"))}
    assert jobs["402"] == slurm.Job("402", "CANCELLED", "Dependency", ended=local_time("2026-01-31 23:00:00"))
    assert {job for job, told_of in jobs.items() if told_of.is_active} == {"409", "410"}
    assert jobs["65+0"].nodes == "gpu[020-021]"


def test_scripts() -> None:
    found = slurm.parse_scripts(told("scripts.txt"))
    assert found["/scratch/ann/runs/r/stages/a/job.sbatch"] == ("601", "602")
    assert found["/scratch/ann/runs/a | b/stages/x=y/job.sbatch"] == ("603",)
    assert found["/scratch/ann/runs/r/stages/rl/job.sbatch"] == ("63",)


def test_sinfo() -> None:
    bad = {f"gpu{n:03d}" for n in (5, 6, 7, 8, 9, 10, 12, 14, 15)}
    assert set(slurm.parse_bad_nodes(told("sinfo.txt"))) == bad


# ------------------------------------------------------------------------------------------------- asking, as programs


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts a command before all others on PATH: it notes its arguments and variables and says what it is told."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def put(name: str, out: str = "", err: str = "", code: int = 0) -> Path:
        for stream, text in (("out", out), ("err", err)):
            (tmp_path / f"{name}.{stream}").write_text(text)
        script = f"""#!/bin/sh
printf '%s\\n' "$@" > {tmp_path}/{name}.argv; env > {tmp_path}/{name}.env
cat {tmp_path}/{name}.out; cat {tmp_path}/{name}.err >&2; exit {code}
"""
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
        return tmp_path / f"{name}.argv"

    return put


def test_jobs_are_known_by_the_ids_that_were_asked(answers: Callable[..., Path]) -> None:
    asked = answers("squeue", told("squeue.txt"))
    in_accounts = answers("sacct", told("sacct.txt"))
    wanted = ["501", "77_2", "77", "78_4", "78_9", "63", "63+1", "79_10", "79_3", "79", "65", "402", "999"]
    states = {job: found.state for job, found in slurm.job_states(wanted).items()}
    assert states == {
        "501": "RUNNING",
        "77_2": "COMPLETING",
        "77": "COMPLETING",
        "78_4": "PENDING",
        "78_9": "PENDING",
        "63": "RUNNING",
        "63+1": "RUNNING",
        "79_10": "CANCELLED",
        "79": "CANCELLED",
        "65": "FAILED",
        "402": "CANCELLED",
    }
    assert f"--jobs={','.join(sorted(wanted))}" in asked.read_text().splitlines()
    assert "--jobs=402,65,79,79_10,79_3,999" in in_accounts.read_text().splitlines()
    assert slurm.job_states(["63"])["63"].id == "63"


def test_without_accounting_the_queue_alone_is_known(answers: Callable[..., Path]) -> None:
    answers("squeue", "501|RUNNING|n1|N/A|1:00|None\n")
    answers("sacct", err="Slurm accounting storage is disabled", code=1)
    assert list(slurm.job_states(["501", "402"])) == ["501"]


def test_a_job_that_the_controller_has_forgotten_is_looked_up(answers: Callable[..., Path]) -> None:
    answers("squeue", err="slurm_load_jobs error: Invalid job id specified", code=1)
    answers("sacct", told("sacct.txt"))
    assert slurm.job_states(["401"])["401"].state == "COMPLETED"


@pytest.mark.parametrize(
    "error",
    [
        "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
        "slurm_load_jobs error: Socket timed out on send/recv operation",
        "slurm_load_jobs error: Zero Bytes were transmitted or received",
        "Unexpected message received for job 22",  # scontrol requeue, with slurmctld dead
    ],
)
def test_a_silent_controller_is_not_a_job_that_is_gone(answers: Callable[..., Path], error: str) -> None:
    answers("squeue", err=error, code=1)
    with pytest.raises(slurm.NoAnswer, match="the controller does not answer"):
        slurm.job_states(["501"])


@pytest.mark.parametrize(("out", "job"), [("123\n", "123"), ("123;fed1\n", "123")])
def test_submitted_ids(answers: Callable[..., Path], out: str, job: str) -> None:
    answers("sbatch", out)
    assert slurm.submit("job.sbatch") == job


def test_a_refusal_and_silence_are_told_apart(answers: Callable[..., Path]) -> None:
    answers("sbatch", err="sbatch: error: Batch job submission failed: Invalid qos specification", code=1)
    with pytest.raises(WorldError, match="Invalid qos") as refused:
        slurm.submit("job.sbatch")
    assert not isinstance(refused.value, slurm.NoAnswer)
    answers("sbatch", err="sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", code=1)
    with pytest.raises(slurm.NoAnswer):
        slurm.submit("job.sbatch")


def test_a_requeue_is_tried_again_until_the_controller_is_back(
    answers: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers("scontrol", err="Unable to contact slurm controller (connect failure) for job 7", code=1)
    monkeypatch.setattr(slurm.time, "sleep", lambda _: answers("scontrol"))
    assert slurm.requeue("7") is None
    answers("scontrol", err="Requested operation is presently disabled for job 7", code=1)
    assert slurm.requeue("7") == "Requested operation is presently disabled for job 7"
    answers("scontrol", err="Unable to contact slurm controller (connect failure) for job 7", code=1)
    assert "Unable to contact" in (slurm.requeue("7", patience_s=-1) or "")


def test_a_command_that_hangs_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "squeue").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    answer = slurm.call("squeue", timeout=0.2)
    assert answer.code is None and isinstance(answer.error("squeue"), slurm.NoAnswer)


def test_what_the_users_shell_sets_for_slurm_decides_nothing(
    answers: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = ("SQUEUE_FORMAT", "SQUEUE_USERS", "SACCT_FORMAT", "SLURM_TIME_FORMAT", "SBATCH_PARTITION")
    surrounding_job = ("SLURM_MEM_PER_CPU", "SLURM_HOSTFILE", "SLURM_RESTART_COUNT", "SLURM_JOB_ID", "SLURM_HET_SIZE")
    for name in (*shell, *surrounding_job):
        monkeypatch.setenv(name, "other")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm/slurm.conf")
    asked = answers("squeue", told("squeue.txt"))
    slurm.job_states(["501"])
    seen = asked.with_suffix(".env").read_text().splitlines()
    assert not [line for line in seen if line.endswith("=other")] and "SLURM_CONF=/etc/slurm/slurm.conf" in seen


def test_a_machine_without_slurm_is_said_to_be_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(WorldError, match="login node"):
        slurm.job_states(["1"])


def test_the_fixtures_are_read_in_any_time_zone() -> None:
    """Slurm prints local time; the moment is that of this machine's zone."""
    code = "from launcher import slurm; print(slurm.parse_sacct('1|FAILED|n|2026-01-31T23:00:00|None')[0].ended)"
    shown = [
        float(subprocess.check_output([sys.executable, "-c", code], env={**os.environ, "TZ": zone}))
        for zone in ("UTC", "UTC+5")
    ]
    assert shown[1] - shown[0] == 5 * 3600
