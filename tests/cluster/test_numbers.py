"""Numbers that name somebody else's job, a suspended job, and wrapped commands, on a real Slurm."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from on_slurm import shown, state, submit, until
from test_submit import SLOW, OnSlurm, on

from launcher import slurm, store
from launcher.status import run_status
from launcher.submit import cancel_jobs, read_submitted, stage_jobs
from launcher.submitted import JOBS, lives

__all__ = ["on"]


def test_a_number_that_names_another_job_now_is_left_alone(on: OnSlurm) -> None:
    record = on.plan(("a", (), SLOW), ("b", ("a",), {}))
    first = on.submit(record)
    cancel_jobs(on.root, record)
    on.finish(record)
    stranger = submit(on.cluster, script="sleep 300")
    notes = store.run_dir(on.root, "run") / JOBS
    notes.write_text(notes.read_text().replace(f'"{first["a"]}"', f'"{stranger}"'))
    own = stage_jobs(on.root, record)["a"]  # still known by its script
    assert (own.id, own.state) == (first["a"], "CANCELLED") and lives(on.root, stranger) is False
    assert cancel_jobs(on.root, record) == []
    again = on.submit(record)
    try:
        assert list(again) == ["a", "b"]
        assert shown(on.cluster, again["b"])["Dependency"].startswith(f"afterok:{again['a']}")
        assert lives(on.root, again["a"]) is True
        assert cancel_jobs(on.root, record) == ["a", "b"]
        assert state(on.cluster, stranger) in ("RUNNING", "PENDING")
    finally:
        on.cluster.call("scancel", stranger)
    on.finish(record)


def test_a_suspended_job_is_shown_as_such_and_goes_on(on: OnSlurm) -> None:
    record = on.plan(("a", (), {"until": 60, "sleep": 0.1}))
    job = on.submit(record)["a"]
    on.await_step(record, 3)
    on.cluster.call("scontrol", "suspend", job)
    try:
        until(lambda: state(on.cluster, job) == "SUSPENDED", 30.0, "the suspension")
        told = run_status(on.root, record, stage_jobs(on.root, record)).stages[0]
        assert (told.state, told.job_state) == ("running", "SUSPENDED") and "suspended" in told.reason
        assert on.submit(record) == {}
    finally:
        on.cluster.call("scontrol", "resume", job)
    assert on.finish(record) == {"a": "done"}


def test_an_sbatch_that_greets_charges_and_is_cut_off(
    on: OnSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapper = tmp_path / "bin" / "sbatch"
    wrapper.parent.mkdir()
    real = shutil.which("sbatch")
    wrapper.write_text(f'#!/bin/sh\necho "Welcome to site 7"\n{real} "$@" >&2\necho 1234\nexit 1\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}{os.pathsep}{os.environ['PATH']}")
    record = on.plan(("a", (), {}), ("b", ("a",), {}))
    first = on.submit(record)
    known = slurm.own_scripts()
    for stage in ("a", "b"):
        script = store.stage_dir(on.root, "run", stage) / "job.sbatch"
        assert known[str(script)] == (first[stage],)
    assert [s.job for s in read_submitted(on.root, "run")] == list(first.values())
    assert on.finish(record) == {"a": "done", "b": "done"}
