"""The local driver: order, failure, and going on after anything was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher import local, store
from launcher.attempts import attempts
from launcher.errors import UserError
from launcher.local import cancel_run, run_local
from launcher.run_record import RunRecord, read_run, write_run
from launcher.spec import StageSpec
from launcher.state import run_state, stage_states
from launcher.watch import watch_run
from tests.supervisor.counting import CHECKOUT, Store, counting_run

PROGRAM = """
import sys
from pathlib import Path
from launcher.local import run_local
from launcher.errors import PrismError
from launcher.run_record import read_run
root = Path(sys.argv[1])
try:
    sys.exit(run_local(root, read_run(root, "run"), int(sys.argv[2])))
except PrismError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


class Driven(Store):
    """A run of counting stages."""

    def plan(self, *stages: tuple[str, tuple[str, ...], dict[str, Any]]) -> RunRecord:
        """Write `run.json`: stages of (name, those it reads, options of the worker)."""
        record = counting_run(*stages)
        write_run(self.root, record)
        return record

    def drive(self, slots: int = 2) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PROGRAM, str(self.root), str(slots)]
        environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
        return subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=self.root
        )

    def driven(self, slots: int = 2) -> tuple[int, str, str]:
        process = self.drive(slots)
        out, err = process.communicate(timeout=90)
        return process.returncode, out, err

    def states(self) -> dict[str, str]:
        return {s.stage: s.state for s in stage_states(self.root, read_run(self.root, "run"))}

    def stage(self, name: str) -> StageSpec:
        return read_run(self.root, "run").stage(name).spec

    def count(self, name: str) -> int:
        return len(attempts(self.root, "run", name))


@pytest.fixture
def run(tmp_path: Path) -> Driven:
    return Driven(tmp_path)


LONG = {"until": 1000, "sleep": 0.05}


def test_stages_follow_what_they_read_and_a_second_run_makes_nothing(run: Driven) -> None:
    run.plan(("a", (), {}), ("b", ("a",), {}), ("c", ("a", "b"), {}))
    code, out, err = run.driven()
    assert (code, err) == (0, "")
    assert [out.index(f"{name}: done") for name in "abc"] == sorted(out.index(f"{name}: done") for name in "abc")
    assert run.states() == dict.fromkeys("abc", "done")
    assert run.driven()[0] == 0
    assert [run.count(name) for name in "abc"] == [1, 1, 1]


def test_what_this_version_cannot_run_is_refused_by_name_before_anything_starts(run: Driven) -> None:
    record = run.plan(("a", (), {}), ("b", ("a",), {}))
    stages = (record.stages[0], replace(record.stages[1], not_built="the reward server"))
    with pytest.raises(UserError, match="stage b: not built yet: the reward server"):
        run_local(run.root, replace(record, stages=stages), 2)
    unseen = (replace(record.stages[0], absent=("/data/text",)), record.stages[1])
    with pytest.raises(UserError, match="stage a: not there when this was planned: /data/text"):
        run_local(run.root, replace(record, stages=unseen), 2)
    assert not (run.root / "artifacts").exists() and not list(run.root.glob("runs/run/stages/*/local.*"))
    assert run.driven()[0] == 0  # what is made already needs no running
    assert run_local(run.root, replace(record, stages=stages), 2) == 0


def test_what_does_not_depend_on_a_failure_is_made(run: Driven) -> None:
    run.plan(("bad", (), {"fail_at": 2, "fail": "user"}), ("after-bad", ("bad",), {}), ("good", (), {"until": 30}))
    code, _, err = run.driven(slots=1)
    assert code == 2
    assert "stage bad failed: user-error: data.jsonl:3: not text; mend it" in err and "logs run bad" in err
    assert run.states() == {"bad": "failed", "after-bad": "waiting", "good": "done"}
    assert run.count("bad") == 1


def test_a_killed_worker_is_tried_again_and_goes_on_from_what_it_saved(run: Driven) -> None:
    run.plan(("a", (), {"until": 6, "fail_at": 4, "fail": "kill", "once": 1}))
    assert run.driven()[0] == 0
    assert run.count("a") == 2
    assert "from step 3" in (run.attempt_dir(run.stage("a"), 2) / "count.0.log").read_text()


def test_without_progress_it_gives_up(run: Driven) -> None:
    run.plan(("a", (), {"until": 6, "fail_at": 1, "fail": "kill"}))
    code, _, err = run.driven()
    assert code == 1 and "killed by SIGKILL" in err
    assert run.count("a") == 1 + run.stage("a").limits.max_no_progress


def test_a_supervisor_that_cannot_begin_is_not_judged_by_an_earlier_attempt(
    run: Driven, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The earlier one had been stopped and had got further than any before it, which speaks for trying again."""
    run.plan(("a", (), {**LONG, "save": 10_000}))
    driver = run.drive()
    run.wait_for(lambda: run.count("a") and run.step_reached(run.stage("a"), 3))
    ((attempt, _),) = attempts(run.root, "run", "a")
    assert attempt.owner is not None
    driver.kill()
    driver.communicate()
    os.kill(attempt.owner.pid, signal.SIGUSR2)
    run.wait_for(lambda: run.states() == {"a": "stopped"} and not run.processes())
    begun = []

    def broken(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        begun.append(command)
        assert len(begun) < 10
        return Popen(["false"], **options)

    Popen = subprocess.Popen
    monkeypatch.setattr(local.subprocess, "Popen", broken)
    assert local.run_local(run.root, read_run(run.root, "run"), 2) == 1
    assert len(begun) == 1


def test_a_killed_driver_leaves_living_stages_that_the_next_one_rejoins(run: Driven) -> None:
    run.plan(("a", (), {"until": 100, "sleep": 0.05}), ("b", ("a",), {}))
    driver = run.drive()
    run.wait_for(lambda: run.count("a") and run.step_reached(run.stage("a"), 2))
    driver.kill()
    driver.communicate()
    assert run.states()["a"] == "running"
    assert run.driven()[0] == 0
    assert run.states() == {"a": "done", "b": "done"}
    assert run.count("a") == 1


def test_a_killed_supervisor_is_replaced(run: Driven) -> None:
    run.plan(("a", (), {"until": 100, "sleep": 0.05}))
    driver = run.drive()
    run.wait_for(lambda: run.count("a") and run.step_reached(run.stage("a"), 3))
    ((attempt, _),) = attempts(run.root, "run", "a")
    assert attempt.owner is not None
    os.kill(attempt.owner.pid, signal.SIGKILL)
    assert driver.wait(timeout=60) == 0
    assert run.count("a") == 2 and run.states() == {"a": "done"}


def test_everything_killed_at_once_and_run_again(run: Driven) -> None:
    run.plan(("a", (), {"until": 100, "sleep": 0.05}), ("b", ("a",), {}))
    driver = run.drive()
    run.wait_for(lambda: run.count("a") and run.step_reached(run.stage("a"), 3))
    for pid in [driver.pid, *run.processes()]:
        os.kill(pid, signal.SIGKILL)
    driver.communicate()
    run.wait_for(lambda: run.states() == {"a": "interrupted", "b": "waiting"} and not run.processes())
    assert run.driven()[0] == 0
    log = (run.attempt_dir(run.stage("a"), 2) / "count.0.log").read_text()
    assert "from step 0" not in log and "from step" in log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_lets_stages_save_and_says_how_to_go_on(run: Driven, number: signal.Signals) -> None:
    run.plan(("a", (), {**LONG, "save": 10_000}))
    driver = run.drive()
    run.wait_for(lambda: run.count("a") and run.step_reached(run.stage("a"), 3))
    driver.send_signal(number)
    out, _ = driver.communicate(timeout=60)
    assert driver.returncode == 130 and "prism-launch resume run" in out
    assert run.states() == {"a": "stopped"} and not run.processes()
    saved = int((store.partial_dir(run.root, run.stage("a").artifact) / "progress" / "count").read_text())
    assert saved >= 3


def test_a_second_driver_of_the_same_run_is_refused(run: Driven) -> None:
    run.plan(("a", (), LONG))
    driver = run.drive()
    run.wait_for(lambda: run.count("a") and run.step_reached(run.stage("a"), 1))
    code, _, err = run.driven()
    assert code == 2 and f"process {driver.pid}" in err and "prism-launch watch run" in err
    assert run.count("a") == 1
    driver.terminate()
    driver.communicate(timeout=60)


def test_a_driver_on_a_machine_that_may_be_gone_can_be_got_rid_of(run: Driven) -> None:
    run.plan(("a", (), {}))
    claim = run.root / "runs" / "run" / "driver.claim"
    assert store.claim(claim, store.Owner("elsewhere", "boot", 1, "1")) is None
    code, _, err = run.driven()
    assert code == 2 and f"if elsewhere is gone, remove {claim}" in err and run.count("a") == 0


def test_a_changed_plan_waits_until_the_old_one_is_stopped(run: Driven) -> None:
    run.plan(("first", (), {}), ("a", (), LONG))
    driver = run.drive()
    run.wait_for(lambda: run.states() == {"first": "done", "a": "running"})
    driver.kill()
    driver.communicate()
    record = run.plan(("a", (), LONG))  # another fingerprint for the same stage
    code, _, err = run.driven()
    assert code == 2 and "stage a of an earlier plan still runs" in err
    run.plan(("first", (), {}), ("a", (), LONG))
    assert cancel_run(run.root, read_run(run.root, "run")) == ["a"]
    assert record.stages[0].spec.fingerprint != run.stage("a").fingerprint
    assert not run.processes()


def test_cancel_stops_driver_and_stages(run: Driven) -> None:
    record = run.plan(("a", (), LONG), ("b", (), LONG), ("c", ("a",), {}))
    driver = run.drive()
    run.wait_for(lambda: all(run.count(n) and run.step_reached(run.stage(n), 1) for n in "ab"))
    assert cancel_run(run.root, record) == ["a", "b"]
    out, _ = driver.communicate(timeout=60)
    assert driver.returncode == 130, out
    assert run.states() == {"a": "stopped", "b": "stopped", "c": "waiting"}
    assert run_state(stage_states(run.root, record)) == "stopped"
    assert cancel_run(run.root, record) == []


def test_watching_lasts_from_detaching_to_the_end(run: Driven, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also before the first stage has begun and between two."""
    record = run.plan(("a", (), {}), ("b", ("a",), {}))
    monkeypatch.chdir(run.root)
    assert run_local(run.root, record, 2, detach=True) == 0
    assert {s.state for s in watch_run(run.root, record, poll_s=0.01).stages} == {"done"}


def test_slots_bound_what_runs_side_by_side(run: Driven) -> None:
    options = {"until": 10, "sleep": 0.05}
    run.plan(*((name, (), options) for name in "abc"))
    driver, most = run.drive(slots=2), 0
    while driver.poll() is None:
        most = max(most, sum(state == "running" for state in run.states().values()))
        time.sleep(0.02)
    driver.communicate()
    assert most == 2 and set(run.states().values()) == {"done"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_is_named_and_once_there_is_room_the_run_goes_on(small_disk: Path) -> None:
    run = Driven(small_disk)
    run.plan(("a", (), {"until": 3, "fill": 4 << 20}), ("b", ("a",), {}))
    code, _, err = run.driven()
    assert code == 1 and "stage a failed: storage" in err and "No space left on device" in err, err
    assert run.states() == {"a": "failed", "b": "waiting"} and not run.processes()
    assert store.read_receipt(run.root, run.stage("a").artifact) is None
    subprocess.run(["mount", "-o", "remount,size=32m", small_disk], check=True)
    assert run.driven()[0] == 0
    assert run.states() == {"a": "done", "b": "done"}
