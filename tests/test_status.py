"""What is shown of a run, as a table and as JSON that programs may rely on."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from launcher import store
from launcher.run_record import RunRecord, read_run, write_run
from launcher.slurm import Job
from launcher.spec import encode
from launcher.state import StageState
from launcher.status import RunStatus, StageStatus, failure_tails, left_seconds, reason_of, run_status
from tests.left_attempts import leave_attempt, watched_record, watched_status

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "watching.md").read_text()


@pytest.fixture
def record() -> RunRecord:
    return watched_record()


@pytest.fixture
def now(tmp_path: Path, record: RunRecord) -> RunStatus:
    return watched_status(tmp_path, record)


def test_a_row_holds_job_nodes_attempts_pace_and_cost(now: RunStatus) -> None:
    a, b, c, d = now.stages
    assert (a.state, a.attempts, a.reason, a.job) == ("failed", 2, "diverged: nan !", "12")
    assert a.gpu_hours == pytest.approx(8 * 1200 / 3600)
    assert (b.state, b.nodes, b.step, b.total, b.loss, b.tokens_per_s) == ("running", "n[1-2]", 21, 100, 2.5, 16400.0)
    assert b.left_seconds == pytest.approx(79 * 100 / 20)  # 20 steps in the 100 s between its first and last beat
    assert b.limit_left_seconds == 86400 + 2 * 3600 + 3 * 60 + 4
    assert b.seconds == pytest.approx(now.time - 3000) and b.gpu_hours == pytest.approx(8 * b.seconds / 3600)
    assert (c.state, c.reason, c.attempts) == ("queued", "job 14 waits for the stages it reads", 0)
    assert (d.state, d.job, d.reason, d.gpu_hours) == ("waiting", None, "", 0)
    assert now.gpu_hours == pytest.approx(a.gpu_hours + b.gpu_hours)


def test_the_keys_and_types_of_the_json_are_those_that_are_promised(now: RunStatus) -> None:
    """A change here breaks programs that read it: count SCHEMA up, and say so in docs/watching.md."""
    number = (int, float)
    maybe = lambda *kinds: (*kinds, type(None))  # noqa: E731
    body = json.loads(json.dumps(encode(now)))
    stages = body.pop("stages")
    run_types: dict[str, Any] = {
        "schema": int, "run": str, "root": str, "cluster": str, "state": str, "time": number,
        "gpu_hours": number, "core_hours": number, "trouble": maybe(str),
    }  # fmt: skip
    stage_types: dict[str, Any] = {
        "stage": str, "kind": str, "state": str, "inserted": bool, "job": maybe(str), "job_state": maybe(str),
        "nodes": maybe(str), "attempt": maybe(str), "attempts": int, "exit_class": maybe(str), "message": str,
        "reason": str, "step": maybe(int), "total": maybe(int), "loss": maybe(*number), "tokens_per_s": maybe(*number),
        "figures": dict, "started": maybe(*number), "seconds": maybe(*number), "left_seconds": maybe(*number),
        "limit_left_seconds": maybe(*number), "gpu_hours": number, "core_hours": number, "folder": maybe(str),
        "log": maybe(str), "damage": list,
    }  # fmt: skip
    assert body["schema"] == 1
    for found, types in ((body, run_types), *((stage, stage_types) for stage in stages)):
        assert set(found) == set(types)
        assert {key: value for key, value in found.items() if not isinstance(value, types[key])} == {}


def test_every_key_stands_in_the_documentation() -> None:
    listed = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.M))
    assert {f.name for cls in (StageStatus, RunStatus) for f in fields(cls)} <= listed


def test_the_log_of_a_failed_stage_ends_the_status(now: RunStatus) -> None:
    head, *lines = failure_tails(now, 3)
    assert head.endswith("/a/12.1/count.0.log <==") and lines == ["line 47", "line 48", "line 49"]


def test_without_slurm_and_after_its_records_aged_out_the_files_say_it(tmp_path: Path, record: RunRecord) -> None:
    leave_attempt(tmp_path, record.stage("a").spec, "12.0", 1000, 1600, "crashed", (1, 40), message="exit code 7")
    gone = {name: Job(str(12 + i), "GONE") for i, name in enumerate("abcd")}
    for jobs in ({}, {"a": gone["a"]}):
        a = run_status(tmp_path, record, jobs).stages[0]
        assert (a.state, a.reason, a.job, a.nodes) == ("failed", "crashed: exit code 7", "12", "elsewhere")


def test_a_run_directory_that_was_moved_tells_the_same(tmp_path: Path, record: RunRecord, now: RunStatus) -> None:
    write_run(tmp_path, record)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").rename(tmp_path / "elsewhere" / "runs")  # the whole store
    (tmp_path / "elsewhere" / "runs" / "run").rename(tmp_path / "elsewhere" / "runs" / "kept")  # and the run in it
    status = run_status(tmp_path / "elsewhere", read_run(tmp_path / "elsewhere", "kept"))
    a = status.stages[0]
    assert (status.run, a.state, a.attempts, a.reason) == ("kept", "failed", 2, "diverged: nan !")
    assert a.log is not None and Path(a.log).read_text().endswith("line 49\n")


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (Job("9", "PENDING", "Priority"), "job 9 waits behind jobs of higher priority"),
        (Job("9", "PENDING", "(Resources)"), "job 9 waits for free nodes"),
        (Job("9", "PENDING", "ReqNodeNotAvail, UnavailableNodes:n3"), "job 9 waits for nodes that are down"),
        (Job("9", "PENDING", "QOSMaxJobsPerUserLimit"), "job 9 waits (QOSMaxJobsPerUserLimit)"),
        (Job("9", "PENDING", "None"), "job 9 waits in the queue"),
    ],
)
def test_why_a_job_waits_in_words(job: Job, words: str) -> None:
    assert reason_of(StageState("a", "train", "queued", False), job).startswith(words)


def test_a_limit_that_is_none_is_no_number(tmp_path: Path, record: RunRecord) -> None:
    leave_attempt(tmp_path, record.stage("a").spec, "12.0", 1000, None, steps=(1, 4))
    for text in ("UNLIMITED", "NOT_SET", ""):
        status = run_status(tmp_path, record, {"a": Job("12", "RUNNING", time_left=text)})
        assert status.stages[0].state == "running" and status.stages[0].limit_left_seconds is None


def test_time_left_is_not_told_from_one_beat(tmp_path: Path, record: RunRecord) -> None:
    from launcher.costs import lives_of

    stage = record.stage("a")
    leave_attempt(tmp_path, stage.spec, "12.0", 1000, None, steps=(5, 5))
    (life,) = lives_of(tmp_path, stage, 2000.0, running=True)
    assert left_seconds(life) is None and left_seconds(None) is None


def test_a_worker_of_an_older_version_that_names_no_first_beat_is_shown(tmp_path: Path, record: RunRecord) -> None:
    folder = leave_attempt(tmp_path, record.stage("a").spec, "local.1", 1000, None, owner=store.this_process())
    (folder / "heartbeat.count.0.json").write_text('{"time": 1010, "step": 3, "total": 9, "figures": {}}')
    a = run_status(tmp_path, record).stages[0]
    assert (a.state, a.step, a.left_seconds) == ("running", 3, None)
