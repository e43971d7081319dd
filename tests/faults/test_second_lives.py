"""A second life of the same job and restart count goes on in a folder of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher import logs, slurm, store
from launcher.attempts import attempts_at
from launcher.slurm import Job
from launcher.spec import Limits
from launcher.supervisor.main import _allocation
from launcher.supervisor.slurm_job import SlurmJob
from tests.left_attempts import leave_attempt
from tests.supervisor.counting import counting_stage, counting_step

SPEC = counting_stage(counting_step())


@pytest.fixture
def in_job(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"SLURM_JOB_ID": "76", "SLURMD_NODENAME": "n1", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    for name in ("PRISM_ATTEMPT", "SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)


def begin(root: Path) -> SlurmJob:
    found = _allocation(SPEC, root, Path("stage.json"))
    assert isinstance(found, SlurmJob)
    return found


@pytest.mark.usefixtures("in_job")
def test_slurm_starts_a_job_twice_with_the_same_restart_count(tmp_path: Path) -> None:
    lives = [begin(tmp_path) for _ in range(3)]
    assert [life.attempt_dir.name for life in lives] == ["76.0", "76.0.2", "76.0.3"]
    assert all(life.attempt_dir.is_dir() for life in lives)
    assert lives[1].place().attempt_dir == str(lives[1].attempt_dir), "its steps write there"
    assert lives[1].job == "76" and lives[1].attempt.restarts == "0"


def test_its_lives_are_one_jobs(tmp_path: Path) -> None:
    for name, started in (("76.0", 100), ("76.0.2", 90), ("76.1", 80)):
        leave_attempt(tmp_path, SPEC, name, started, started + 5, "crashed", action="again")
    log = store.stage_dir(tmp_path, SPEC.run, SPEC.stage) / "76_0_log.out"
    log.write_text("words\n")
    found = attempts_at(tmp_path, SPEC)
    assert [(a.name, a.job) for a in found] == [("76.0", "76"), ("76.0.2", "76"), ("76.1", "76")]
    assert {logs.supervisor_log(a) for a in found} == {log}


@pytest.mark.usefixtures("in_job")
@pytest.mark.parametrize(
    ("known", "refused", "told"),
    [
        (None, "Invalid job id specified for job 76", "Slurm has forgotten this job"),
        (Job("76", "RUNNING"), "Requested operation is presently disabled", "continuation: chain"),
    ],
)
def test_a_job_that_slurm_forgot_is_no_reason_for_a_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: Job | None, refused: str, told: str
) -> None:
    monkeypatch.setattr(slurm, "show_job", lambda *_: known)
    monkeypatch.setattr(slurm, "requeue", lambda *_: refused)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert SPEC.limits == Limits(hang_s=30.0, save_s=10.0)
    words = begin(tmp_path).go_on(())
    assert words is not None and told in words and ("chain" in words) == (known is not None)
