"""A clock that ran on while its measurer stood still: suspended jobs, stopped processes, file systems that stall."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from launcher import store
from launcher.slurm import Job
from launcher.spec import Limits, StageSpec
from launcher.state import stage_states
from launcher.status import run_status
from launcher.supervisor import beats
from launcher.supervisor.beats import Heartbeats, RunningTime
from tests.left_attempts import leave_attempt
from tests.supervisor.counting import Store, counting_run, counting_stage, counting_step


class Hands:
    """A clock whose hands a test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_time_in_which_a_process_stood_still_does_not_count() -> None:
    hands = Hands()
    clock = RunningTime(hands)
    for gap in (0.05, 0.5, 3600.0, 0.05, 90.0):
        hands.now += gap
        ran = clock()
    assert 0.6 <= ran < 5.0


def spec_of(hang_s: float, ranks: int = 1) -> StageSpec:
    return counting_stage(counting_step(ntasks=ranks), limits=Limits(hang_s=hang_s, save_s=1.0))


def silence_after(
    seconds: float, heartbeats: Heartbeats, clock: RunningTime, hands: Hands, poll: float = 0.05
) -> float:
    """The silence after so many seconds of looks."""
    end = hands.now + seconds
    while hands.now < end:
        hands.now += poll
        found = heartbeats.silence(clock())
    return found


def test_a_suspension_in_the_middle_of_a_step_is_no_silence(tmp_path: Path) -> None:
    hands = Hands()
    clock = RunningTime(hands)
    heartbeats = Heartbeats(spec_of(30.0), tmp_path, clock())
    (tmp_path / "heartbeat.count.0.json").write_text("{}")
    assert silence_after(10.0, heartbeats, clock, hands) < 10.1
    for _ in range(5):  # slices of a gang
        hands.now += 600.0
        assert silence_after(2.0, heartbeats, clock, hands) < 30.0
    assert silence_after(30.0, heartbeats, clock, hands) > 30.0, "a hang is one all the same"


def test_a_file_system_that_is_away_takes_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hands = Hands()
    clock = RunningTime(hands)
    heartbeats = Heartbeats(spec_of(30.0), tmp_path, clock())
    silence_after(10.0, heartbeats, clock, hands)
    with monkeypatch.context() as patched:
        patched.setattr(beats.os, "stat", stale)
        assert silence_after(100.0, heartbeats, clock, hands) < 12.0
    assert silence_after(30.0, heartbeats, clock, hands) > 30.0


def stale(path: object) -> None:
    raise OSError(116, "Stale file handle")


@pytest.mark.parametrize("writer", [0, 1, 7])
def test_any_rank_that_beats_keeps_a_stage_from_being_called_hung(tmp_path: Path, writer: int) -> None:
    hands = Hands()
    clock = RunningTime(hands)
    spec = spec_of(40.0, ranks=8)
    heartbeats = Heartbeats(spec, tmp_path, clock())
    for rank in range(8):
        (tmp_path / f"heartbeat.count.{rank}.json").write_text("{}")
    for beat in range(30):
        written = 10**9 * (beat + 1)
        os.utime(tmp_path / f"heartbeat.count.{writer}.json", ns=(written, written))
        assert silence_after(5.0, heartbeats, clock, hands) < 40.0
    assert silence_after(60.0, heartbeats, clock, hands) > 40.0


def test_stopped_and_continued_it_goes_on(at: Store) -> None:
    """As Slurm suspends and resumes a job, and a shell a process: longer than a hang."""
    spec = counting_stage(counting_step(until=40, sleep=0.05), limits=Limits(hang_s=4.0, save_s=1.0))
    supervisor = at.start(spec)
    at.wait_for(lambda: at.step_reached(spec, 2))
    worker = next(e["pid"] for e in at.events(spec) if e["event"] == "launched")
    for pid in (supervisor.pid, worker):
        os.kill(pid, signal.SIGSTOP)
    time.sleep(5.0)
    os.kill(supervisor.pid, signal.SIGCONT)
    time.sleep(0.5)  # it looks before its worker can say anything
    os.kill(worker, signal.SIGCONT)
    assert supervisor.wait(timeout=60) == 0, at.end(spec)
    assert at.end(spec)["class"] == "finished"


def test_a_job_that_is_suspended_is_shown_as_such(tmp_path: Path) -> None:
    record = counting_run(("a", (), {}))
    leave_attempt(tmp_path, record.stages[0].spec, "7.0", time.time() - 60, steps=(1, 4))
    job = Job("7", "SUSPENDED")
    (state,) = stage_states(tmp_path, record, jobs={"a": job})
    assert (state.state, state.step) == ("running", 4)
    (shown,) = run_status(tmp_path, record, {"a": job}).stages
    assert shown.job_state == "SUSPENDED" and "suspended" in shown.reason and "waits" not in shown.reason


@pytest.fixture
def at(tmp_path: Path) -> Store:
    return Store(tmp_path)


def test_a_claim_of_a_stopped_process_is_a_living_ones(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    try:
        os.waitpid(child, os.WUNTRACED)
        assert store.is_alive(store.this_process(child)) is True
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
