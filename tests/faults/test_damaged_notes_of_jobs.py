"""A damaged line of jobs.jsonl, or a damaged held.json, costs itself and no command, and is told."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from launcher import slurm, store
from launcher.caps import HELD
from launcher.submit import read_submitted, submit_run
from launcher.submitted import JOBS, Submitted, damaged_lines, write_down
from tests.faults.slurm_stand_in import StandIn

GOOD = {"stage": "b", "fingerprint": "00000000000000000001", "job": "102", "time": 1.0, "user": "ann"}


def line(**changes: object) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


DAMAGE = {
    "not UTF-8": b"\xff\xfe\x00",
    "not UTF-8 inside": line().replace(b"102", b"\xff02"),
    "not an object": b"[1]",
    "a word": b'"stage"',
    "null": b"null",
    "half a line": line()[:30],
    "two lines in one": line()[:30] + line(),
    "keys are missing": b'{"stage": "b"}',
    "a job that is no number": line(job="; rm -rf /"),
    "a job that is an option": line(job="--all"),
    "a job that is a list": line(job=["102"]),
    "an empty job": line(job=""),
    "job 0": line(job="0"),
    "a job beyond all": line(job="4294967295"),
    "a job of many digits": line(job="9" * 5000),
    "an element of no array": line(job="77_[1,2]"),
    "no time": line(time=None),
    "a time that is text": line(time="now"),
    "a time beyond all clocks": line(time=1e300),
    "a time before all": line(time=-1.0),
    "a time without end": line().replace(b"1.0", b"Infinity"),
    "NaN": line().replace(b"1.0", b"NaN"),
    "deep": b"[" * 100_000,
    "NUL": b"\x00" * 512,
}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(tmp_path, monkeypatch)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_line_is_left_out_and_named(tmp_path: Path, damage: bytes) -> None:
    path = store.run_dir(tmp_path, "run") / JOBS
    path.parent.mkdir(parents=True)
    path.write_bytes(line(job="101", stage="a") + b"\n" + damage + b"\n" + line(job="103", of_later="versions") + b"\n")
    assert [s.job for s in read_submitted(tmp_path, "run")] == ["101", "103"]
    (told,) = damaged_lines(tmp_path, "run")
    assert told.startswith(f"{path}: line 2: damaged")


def test_an_id_that_no_job_can_have_costs_no_other_its_answer(site: StandIn) -> None:
    """squeue refuses a whole list for one such id, with words like those for jobs that it has forgotten."""
    squeue = (site.bin / "squeue").read_text()
    refusal = 'case "$*" in *=0,*|*,0,*) echo "squeue: error: Invalid job id: 0" >&2; exit 1;; esac\n'
    site.put("squeue", refusal + squeue)
    site.queue(("101", site.script("a"), "RUNNING"))
    assert list(slurm.job_states(["101", "0", "4294967296", "7_[1,2]", "--all", "\x1b"])) == ["101"]
    assert slurm.scripts_of_jobs(["0", "101"]) == {site.script("a"): ("101",)}


def test_a_clock_that_was_set_back_holds_nothing_back(site: StandIn) -> None:
    site.site.write_text(site.site.read_text() + "submit_rate: 2\n")
    record = site.plan()
    of_tomorrow = [Submitted("a", "f", str(n), time.time() + 86400.0) for n in range(50, 60)]
    write_down(site.root, "run", of_tomorrow)
    assert submit_run(site.root, record, site.profile) == {"a": "101", "b": "102"}


def test_a_record_of_impossible_steps_is_told(site: StandIn) -> None:
    site.plan()
    path = store.run_dir(site.root, "run") / "run.json"
    whole = path.read_text()
    for wrong in ('"nodes": -3', '"nodes": 0', '"ntasks": 0'):
        key = wrong.partition(":")[0]
        path.write_text(re.sub(rf"{key}: 1\b", wrong, whole))
        for command in ("status", "cancel"):
            done = site.prism(command, "run")
            assert done.returncode == 2 and "must be at least 1, got" in done.stderr, done.stderr


def test_what_is_written_after_half_a_line_stands_on_its_own(tmp_path: Path) -> None:
    path = store.run_dir(tmp_path, "run") / JOBS
    path.parent.mkdir(parents=True)
    path.write_bytes(line()[:30])
    job = Submitted("a", "f", "7", 1.0, script="/r/l\udce9a \"'\n/job.sbatch")
    write_down(tmp_path, "run", [job])
    assert read_submitted(tmp_path, "run") == [job] and len(path.read_bytes().splitlines()) == 2


def test_many_damaged_lines_are_counted(tmp_path: Path) -> None:
    path = store.run_dir(tmp_path, "run") / JOBS
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x\n" * 50)
    (told,) = damaged_lines(tmp_path, "run")
    assert " 20 and 30 more" in told and " 21" not in told


@pytest.mark.parametrize(
    "command", [["status"], ["logs", "a"], ["clean", "--dry-run"], ["cancel"], ["resume", "--detach"]]
)
def test_no_command_ends_of_it_and_the_job_is_found_again(site: StandIn, command: list[str]) -> None:
    submit_run(site.root, site.plan(), site.profile)
    path = store.run_dir(site.root, "run") / JOBS
    path.write_bytes(b"\xff\n" + path.read_bytes().splitlines(keepends=True)[1])
    (store.run_dir(site.root, "run") / HELD).write_bytes(b"\xff[")
    done = site.prism(*command)  # no traceback
    assert done.returncode == (2 if command[0] == "logs" else 0), done.stderr
    if command[0] != "clean":
        assert f"{path}: line 1: damaged" in done.stderr and f"{HELD}: damaged" in done.stderr
    if command[0] == "cancel":
        assert site.calls("scancel") == ["101 102"]
    if command[0] == "resume":
        assert done.stdout.startswith("follow it") and len(site.in_queue) == 2
