"""Why Slurm ends a job, from its record and from what slurmstepd writes; the lines are Slurm 22.05's."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from launcher import slurm
from launcher.progress import TERM_NOTE
from launcher.slurm import Job
from launcher.steps import SlurmAttempt
from launcher.supervisor import slurm_job
from launcher.supervisor.slurm_job import SlurmJob
from tests.supervisor.counting import counting_stage, counting_step

LINE = "slurmstepd-n1: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-25T20:02:45{} ***\n"
DUE = " DUE TO {}"


def at(tmp_path: Path, nodes: int = 1) -> SlurmJob:
    return SlurmJob(
        counting_stage(counting_step()), tmp_path, "python", SlurmAttempt("7", "1", "n1"), "n1", nodes, ("7",)
    )


@pytest.mark.parametrize(
    ("number", "known", "log", "bad", "exit_class", "leaving"),
    [
        (signal.SIGUSR2, Job("7", "RUNNING", restarts=1), "", (), "time-limit", False),
        (signal.SIGUSR2, Job("7", "RUNNING", restarts=1, preempted=True), "", (), "preempted", False),
        (signal.SIGUSR2, None, "", (), "time-limit", False),
        (signal.SIGTERM, Job("7", "COMPLETING", restarts=2), "PREEMPTION", (), "preempted", True),
        (signal.SIGTERM, Job("7", "COMPLETING", restarts=1, preempted=True), "PREEMPTION", (), "preempted", True),
        (signal.SIGTERM, Job("7", "COMPLETING", restarts=2), "JOB REQUEUE", (), "requeued", True),
        (signal.SIGTERM, Job("7", "COMPLETING", restarts=2), "NODE FAILURE", ("n2",), "node-failure", True),
        (signal.SIGTERM, Job("7", "COMPLETING", restarts=2), None, ("n2",), "node-failure", True),
        (signal.SIGTERM, Job("7", "COMPLETING", restarts=1), "", (), "cancelled", True),
        (signal.SIGTERM, Job("7", "CANCELLED", restarts=1), None, (), "cancelled", True),
        (signal.SIGTERM, None, "", (), "cancelled", True),
        (signal.SIGTERM, Job("7", "TIMEOUT", restarts=1), "TIME LIMIT", (), "time-limit", True),
        (signal.SIGTERM, Job("7", "RUNNING", restarts=1), None, (), "time-limit", False),
        (None, Job("7", "RUNNING", restarts=1), None, (), None, False),
        (None, Job("7", "RUNNING", restarts=1), None, ("n2",), "node-failure", False),
        (None, Job("7", "RUNNING", restarts=1, preempted=True), None, (), "preempted", False),
        (None, None, None, (), None, False),
    ],
)
def test_why(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals | None,
    known: Job | None,
    log: str | None,
    bad: tuple[str, ...],
    exit_class: str | None,
    leaving: bool,
) -> None:
    monkeypatch.setattr(slurm, "show_job", lambda job, timeout: known)
    monkeypatch.setattr(slurm, "lost_nodes", lambda nodes, timeout: bad)
    monkeypatch.setattr(slurm, "bad_nodes", lambda nodes, timeout: bad)
    text = "" if log is None else LINE.format(DUE.format(log) if log else "")
    monkeypatch.setattr(slurm_job, "_log_since", lambda start: f"a worker's words\n{text}")
    found = at(tmp_path, nodes=2).why(number)
    assert (found and found.exit_class) == exit_class
    assert found is None or (found.leaving == leaving and found.nodes == (bad if exit_class == "node-failure" else ()))


@pytest.mark.parametrize(
    ("states", "log", "exit_class", "blamed"),
    [
        ("n1|draining\nn2|allocated", "JOB REQUEUE", "requeued", ()),
        ("n1|drained\nn2|failing", "JOB REQUEUE", "requeued", ()),
        ("n1|draining\nn2|down*", "JOB REQUEUE", "node-failure", ("n2",)),
        ("n1|draining\nn2|down*", "NODE FAILURE", "node-failure", ("n2",)),
        ("n1|draining\nn2|idle", "NODE FAILURE", "node-failure", ("n1",)),
        ("n1|drained*\nn2|idle", "JOB REQUEUE", "node-failure", ("n1",)),
        ("n1|draining\nn2|mixed", None, None, ()),
        ("n1|draining\nn2|down", None, "node-failure", ("n2",)),
    ],
)
def test_a_node_that_drains_is_not_to_blame(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    states: str,
    log: str | None,
    exit_class: str | None,
    blamed: tuple[str, ...],
) -> None:
    """An operator's requeue, or a rank's own end, on a job one of whose nodes happens to drain."""
    again = Job("7", "COMPLETING", restarts=2) if log else Job("7", "RUNNING", restarts=1)
    monkeypatch.setattr(slurm, "show_job", lambda job, timeout: again)
    monkeypatch.setattr(slurm, "call", lambda *argv, timeout: slurm.Answer(0, states, ""))
    monkeypatch.setattr(slurm_job, "_log_since", lambda start: LINE.format(DUE.format(log)) if log else "")
    found = at(tmp_path, nodes=2).why(signal.SIGTERM if log else None)
    assert (found and found.exit_class, found.nodes if found else ()) == (exit_class, blamed)


def test_only_what_slurmstepd_says_of_the_job_counts() -> None:
    assert slurm.reason_in_log("srun: error: *** STEP 7.0 ON n1 CANCELLED AT 2026-11-25T20:02:45 ***") is None
    both = LINE.format(DUE.format("JOB REQUEUE")) + LINE.format(DUE.format("PREEMPTION"))
    assert slurm.reason_in_log(both) == "PREEMPTION"
    far = LINE.format(" DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS")
    assert slurm.reason_in_log(far) == "NODE FAILURE"


def test_slurm_is_asked_only_when_a_step_was_told_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    known = Job("7", "RUNNING", restarts=1)
    monkeypatch.setattr(slurm, "show_job", lambda job, timeout: asked.append(job) or known)
    job = at(tmp_path)
    job.attempt_dir.mkdir(parents=True)
    assert job.noticed() is None and asked == []
    (job.attempt_dir / TERM_NOTE).touch()
    assert job.noticed() is None and asked == ["7"]
    assert job.noticed() is None and asked == ["7"]  # not again at once
    known = Job("7", "RUNNING", restarts=1, preempted=True)
    job._asked_at = 0.0
    found = job.noticed()
    assert found is not None and found.exit_class == "preempted" and not found.leaving
