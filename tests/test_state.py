"""What a stage is said to be doing, from its attempts' files and from what Slurm says of its job."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher import store
from launcher.attempts import Beat
from launcher.run_record import RunRecord
from launcher.slurm import Job
from launcher.spec import Limits, encode
from launcher.state import StageState, stage_states
from launcher.store import Owner
from tests.supervisor.counting import counting_run

CRASHED = {"class": "crashed", "message": "killed by SIGKILL", "action": "again", "log": "count.0.log", "tail": ["one"]}
GIVEN_UP = {**CRASHED, "action": "stop"}
FINISHED = {"class": "finished", "message": "", "action": "done"}


def attempt(root: Path, record: RunRecord, name: str, end: dict[str, Any] | None = None) -> None:
    """What a supervisor on another node leaves: its first word, a heartbeat and perhaps its last word."""
    spec = record.stages[0].spec
    folder = store.stage_dir(root, record.run, spec.stage) / name
    folder.mkdir(parents=True)
    owner = encode(Owner("elsewhere", "boot", 1, "1", name.partition(".")[0]))
    events = [{"time": time.time(), "event": "start", "owner": owner, "fingerprint": spec.fingerprint}]
    if end is not None:
        events.append({"time": time.time(), "event": "end", "seconds": 1.0, **end})
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    beat = {"time": time.time(), "pid": 1, "step": 4, "total": 9, "figures": {}}
    (folder / "heartbeat.count.0.json").write_text(json.dumps(beat))


def told(root: Path, record: RunRecord, job: Job | None) -> StageState:
    (state,) = stage_states(root, record, jobs={"a": job} if job else {})
    return state


@pytest.fixture
def record() -> RunRecord:
    return counting_run(("a", (), {}))


@pytest.mark.parametrize(
    ("end", "job", "state", "exit_class"),
    [
        (None, Job("7", "RUNNING"), "running", None),
        (None, Job("7", "COMPLETING"), "queued", None),
        (None, Job("7", "EXPEDITING"), "queued", None),
        (None, Job("7", "CANCELLED"), "stopped", "cancelled"),
        (None, Job("7", "NODE_FAIL"), "interrupted", "node-failure"),
        (None, Job("7", "OUT_OF_MEMORY"), "failed", "out-of-memory"),
        (None, Job("7", "FAILED"), "interrupted", "crashed"),
        (None, Job("7", "GONE"), "interrupted", "crashed"),
        (CRASHED, Job("7", "PENDING"), "queued", None),
        (CRASHED, Job("7", "CANCELLED"), "stopped", "cancelled"),  # while it waited for another life
        (CRASHED, Job("7", "TIMEOUT"), "interrupted", "time-limit"),
        (GIVEN_UP, Job("7", "FAILED"), "failed", "crashed"),
        (GIVEN_UP, Job("7", "COMPLETING"), "failed", "crashed"),
        (GIVEN_UP, Job("7", "GONE"), "failed", "crashed"),
        (GIVEN_UP, Job("8", "PENDING"), "queued", None),  # submitted again
        (GIVEN_UP, None, "failed", "crashed"),
        (None, None, "running", None),  # nobody can tell from here that it does not
    ],
)
def test_an_attempt_and_its_job(
    tmp_path: Path, record: RunRecord, end: dict[str, Any] | None, job: Job | None, state: str, exit_class: str | None
) -> None:
    attempt(tmp_path, record, "7.0", end)
    found = told(tmp_path, record, job)
    assert (found.state, found.exit_class, found.step) == (state, exit_class, 4)


def test_the_last_lines_of_the_log_come_with_a_failure(tmp_path: Path, record: RunRecord) -> None:
    attempt(tmp_path, record, "7.0", GIVEN_UP)
    found = told(tmp_path, record, Job("7", "FAILED"))
    assert found.tail == ("one",)
    assert found.log == str(store.stage_dir(tmp_path, "run", "a") / "7.0" / "count.0.log")


def test_a_job_that_failed_before_its_supervisor_began_shows_its_own_log(tmp_path: Path, record: RunRecord) -> None:
    folder = store.stage_dir(tmp_path, "run", "a")
    folder.mkdir(parents=True)
    (folder / "7_0_log.out").write_text("module: command not found\n\n/opt/py: No such file or directory\n")
    found = told(tmp_path, record, Job("7", "FAILED"))
    assert (found.state, found.message) == ("failed", "job 7 failed before its supervisor began")
    assert found.tail == ("module: command not found", "/opt/py: No such file or directory")


def test_a_forgotten_job_is_not_called_ended(tmp_path: Path, record: RunRecord) -> None:
    assert told(tmp_path, record, Job("7", "GONE")).message == "Slurm no longer knows job 7"


@pytest.mark.parametrize("told_by", ["attempt", "job"])
def test_what_finished_a_moment_ago_may_not_be_seen_yet(tmp_path: Path, record: RunRecord, told_by: str) -> None:
    """Where files may come late: not missing before that time is over."""
    stage = record.stages[0]
    late = replace(record, stages=(replace(stage, spec=replace(stage.spec, limits=Limits(visibility_s=65.0))),))
    job = Job("7", "COMPLETED", ended=time.time() - 5)
    if told_by == "attempt":
        attempt(tmp_path, record, "7.0", FINISHED)
        job = replace(job, ended=None)
    assert told(tmp_path, late, job).state == "running"
    assert told(tmp_path, record, job).state in ("waiting", "interrupted")
    if told_by == "job":
        assert told(tmp_path, late, replace(job, ended=time.time() - 66)).state == "interrupted"


def test_a_figure_of_a_heartbeat_is_asked_for_by_its_name() -> None:
    beat = Beat(time=5.0, step=3, total=9, figures={"loss": 1.5, "step": "not this one"})
    assert [beat.get(name) for name in ("step", "total", "time", "loss", "absent")] == [3, 9, 5.0, 1.5, None]
    assert beat.get("absent", 0) == 0
