"""Submitting against commands that answer as Slurm does at awkward moments; tests/cluster has a real one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launcher import slurm, store
from launcher.cluster import Profile, load_profile, place_record
from launcher.run_record import RunRecord
from launcher.spec import Limits
from launcher.submit import read_submitted, submit_run
from tests.supervisor.counting import counting_run

Says = Callable[..., Path]


@pytest.fixture
def says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Says:
    """Puts a command on PATH that prints, or fails with, what it is told; returns where it keeps its arguments."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def put(name: str, text: str = "", code: int = 0) -> Path:
        (folder / f"{name}.says").write_text(text)
        stream = ">&2" if code else ""
        script = f'#!/bin/sh\necho "$@" >> {folder}/{name}.argv\ncat {folder}/{name}.says {stream}\nexit {code}\n'
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
        return folder / f"{name}.argv"

    for name in ("squeue", "sacct", "sbatch"):
        put(name)
    return put


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    path = tmp_path / "site.yaml"
    path.write_text("scheduler: slurm\npython: python3\n")
    return load_profile(str(path))


def planned(root: Path, profile: Profile, visibility_s: float = 0.0) -> RunRecord:
    run = counting_run(("a", (), {}), ("b", ("a",), {}))
    stages = tuple(replace(s, spec=replace(s.spec, limits=Limits(visibility_s=visibility_s))) for s in run.stages)
    return place_record(replace(run, stages=stages), profile, root)


def script(root: Path, stage: str) -> str:
    return str(store.stage_dir(root, "run", stage) / "job.sbatch")


def test_a_job_that_was_taken_in_unheard_is_found_by_its_script(says: Says, profile: Profile, tmp_path: Path) -> None:
    record = planned(tmp_path, profile)
    says("sbatch", "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", 1)
    with pytest.raises(slurm.NoAnswer, match="found and joined"):
        submit_run(tmp_path, record, profile)
    assert read_submitted(tmp_path, "run") == []
    says("squeue", f"7|{script(tmp_path, 'a')}\n7|PENDING||N/A|1:00:00|Priority\n9|/elsewhere/job.sbatch\n")
    asked = says("sbatch", "8\n")
    asked.unlink()
    assert submit_run(tmp_path, record, profile) == {"b": "8"}
    assert "--dependency=afterok:7" in asked.read_text()
    assert [(s.stage, s.job) for s in read_submitted(tmp_path, "run")] == [("a", "7"), ("b", "8")]


def test_nothing_is_submitted_while_the_controller_is_silent(says: Says, profile: Profile, tmp_path: Path) -> None:
    says("squeue", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)", 1)
    with pytest.raises(slurm.NoAnswer, match="the controller does not answer"):
        submit_run(tmp_path, planned(tmp_path, profile), profile)
    assert not Path(script(tmp_path, "a")).exists() and read_submitted(tmp_path, "run") == []


def test_no_stage_depends_on_a_job_that_has_ended(says: Says, profile: Profile, tmp_path: Path) -> None:
    """It finished a moment ago and its artifact is not seen here yet; `afterok` holds for whatever was forgotten."""
    record = planned(tmp_path, profile, visibility_s=600.0)
    says("sbatch", "7\n")
    submit_run(tmp_path, record, profile)
    ended = time.strftime("%Y-%m-%dT%H:%M:%S")
    says("squeue", f"7|COMPLETED|n1|{ended}|0:00|None\n")
    (store.run_dir(tmp_path, "run") / "jobs.jsonl").write_text(
        (store.run_dir(tmp_path, "run") / "jobs.jsonl").read_text().splitlines()[0] + "\n"
    )
    asked = says("sbatch", "8\n")
    asked.unlink()
    assert submit_run(tmp_path, record, profile) == {"b": "8"}
    assert "--dependency" not in asked.read_text()
