"""Accounting tells how a job ended, never that it lives; what is left of a job that completes is not what it had."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from launcher import slurm, store, submitted
from launcher.state import stage_states
from launcher.status import run_status
from launcher.submit import stage_jobs, submit_run
from tests.faults.slurm_stand_in import StandIn
from tests.left_attempts import leave_attempt


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(tmp_path, monkeypatch)


@pytest.mark.parametrize("state", ["RUNNING", "PENDING", "SUSPENDED", "REQUEUED", "COMPLETING", "RESIZING"])
@pytest.mark.parametrize("others", [0, 1])
def test_a_job_that_only_accounting_calls_alive_is_gone(site: StandIn, state: str, others: int) -> None:
    """slurmctld lost it, and nobody told slurmdbd: a runaway job."""
    record = site.plan()
    submit_run(site.root, record, site.profile)
    site.queue(*[("102", site.script("b"), "PENDING")][:others])
    site.accounts(f"101|{state}|n1|Unknown|None", *([] if others else ["102|PENDING||Unknown|Dependency"]))
    jobs = stage_jobs(site.root, record)
    assert (jobs["a"].state, jobs["b"].state) == ("GONE", "PENDING" if others else "GONE")
    assert submitted.lives(site.root, "101") is False, "its claims are free"
    told = json.loads(site.prism("status", "--json").stdout)["stages"][0]
    assert told["state"] == "interrupted" and "no longer knows job 101" in told["reason"]
    done = site.prism("resume", "--detach")
    assert done.returncode == 0 and "a: job 103" in done.stdout


def test_how_it_ended_is_believed(site: StandIn) -> None:
    record = site.plan()
    submit_run(site.root, record, site.profile)
    site.queue()
    now = time.strftime("%Y-%m-%dT%H:%M:%S")
    site.accounts(f"101|TIMEOUT|n1|{now}|None", f"102|CANCELLED by 0|None assigned|{now}|Dependency")
    states = [s.state for s in stage_states(site.root, record, jobs=stage_jobs(site.root, record))]
    assert states == ["interrupted", "stopped"]


def test_a_job_that_is_completing_ran_where_it_was_started(site: StandIn) -> None:
    site.put("squeue", 'echo "101|COMPLETING|n3|N/A|0:00|None"')
    site.accounts("101|COMPLETING|n[1-3]|Unknown|None")
    assert slurm.job_states(["101"])["101"].nodes == "n[1-3]"
    site.accounts()  # without accounting nothing is said rather than a part
    assert slurm.job_states(["101"])["101"].nodes == ""


@pytest.mark.parametrize("state", ["SUSPENDED", "STOPPED"])
@pytest.mark.parametrize("begun", [True, False])
def test_a_suspended_job_is_shown_as_such(site: StandIn, state: str, begun: bool) -> None:
    record = site.plan()
    submit_run(site.root, record, site.profile)
    if begun:
        leave_attempt(site.root, record.stages[0].spec, "101.0", 10.0, steps=(1, 10))
    site.queue(("101", site.script("a"), state), ("102", site.script("b"), "PENDING"))
    told = run_status(site.root, record, stage_jobs(site.root, record)).stages[0]
    assert (told.state, told.job_state, told.reason) == (
        "running",
        state,
        f"job 101 is {state.lower()}: its processes stand still until Slurm lets them go on",
    )
    assert "waits" not in told.reason and (told.step == 10) is begun
    assert "suspended" in site.prism("status").stdout or state != "SUSPENDED"
    assert store.read_receipt(site.root, record.stages[0].spec.artifact) is None
    assert submit_run(site.root, record, site.profile) == {}, "it goes on by itself"


@pytest.mark.parametrize(
    ("word", "state"), [("slurm_load_jobs error: Invalid job id specified", "GONE"), ("timed out", "RUNNING")]
)
def test_where_squeue_only_greets_the_controller_is_asked_by_name(site: StandIn, word: str, state: str) -> None:
    site.put("squeue", 'echo "Welcome to the Example Computer"')
    site.put("scontrol", f'echo "{word}" >&2; exit 1')
    site.accounts("101|RUNNING|n1|Unknown|None")
    assert slurm.job_states(["101"])["101"].state == state
