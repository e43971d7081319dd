"""What heartbeats, claims and the supervisor's looks ask of a shared file system, by a clock that the test moves."""

from __future__ import annotations

import builtins
import io
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher import progress, store
from launcher.progress import StageJob
from launcher.spec import Limits, StageSpec
from launcher.steps import SlurmAttempt
from launcher.supervisor import main as supervising
from launcher.supervisor.beats import Heartbeats
from launcher.supervisor.main import Supervisor
from launcher.supervisor.slurm_job import SlurmJob
from tests.supervisor.counting import counting_stage, counting_step

GPUS = 8
MOST_A_SECOND = 50


class Counted:
    """The clock of everything here, and the file operations of each of its seconds."""

    def __init__(self, root: Path):
        self.root, self.now, self.by_second = str(root), 100_000.0, Counter[int]()

    def __call__(self) -> float:
        return self.now

    def counting(self, call: Any) -> Any:
        def counted(path: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(self.root):
                self.by_second[int(self.now)] += 1
            return call(path, *args, **kwargs)

        return counted


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    made = Counted(tmp_path)
    with monkeypatch.context() as patched:
        for name in ("time", "monotonic"):
            patched.setattr(progress.time, name, made)
        for name in ("stat", "lstat", "replace", "rename", "scandir", "listdir", "unlink", "mkdir", "open", "utime"):
            patched.setattr(os, name, made.counting(getattr(os, name)))
        opened = made.counting(io.open)
        patched.setattr(io, "open", opened)
        patched.setattr(builtins, "open", opened)
        yield made


def stage_of(ranks: int, hang_s: float) -> StageSpec:
    step = replace(counting_step(ntasks=ranks), nodes=max(1, ranks // GPUS))
    return counting_stage(step, limits=Limits(hang_s=hang_s, save_s=60.0))


class Stage:
    """All ranks of a stage and its supervisor, as far as they touch files while all is well."""

    def __init__(self, root: Path, spec: StageSpec, now: float):
        (self.step,) = spec.steps
        place = SlurmJob(spec, root, "python", SlurmAttempt("7", "0", "n1"), "n1", self.step.nodes, ("7",))
        self.supervisor = Supervisor(spec, root, place)
        folder = place.attempt_dir
        folder.mkdir(parents=True)
        store.claim(self.supervisor.claim, self.supervisor.owner)
        ranks = range(self.step.ntasks)
        self.jobs = [StageJob(spec, root, folder, "count", r, self.step.ntasks) for r in ranks]
        self.heartbeats = Heartbeats(spec, folder, now)
        for job in self.jobs:
            job._end_if_given_up()  # as each does once, when it starts

    def go_on(self, counted: Counted, seconds: int, silent: int = -1) -> float:
        """A step a second on every rank but `silent`; returns for how long the supervisor has seen no heartbeat."""
        silence = 0.0
        for _ in range(seconds):
            for job in self.jobs:
                if job.rank != silent:
                    job.beat(int(counted.now), 10**6, pause_s=1.0, loss=1.0)
            for _ in range(20):
                counted.now += 0.05
                self.supervisor._noticed()
                silence = self.heartbeats.silence(counted.now)
        return silence


@pytest.mark.parametrize(("ranks", "hang_s"), [(1024, 1800.0), (1024, 900.0), (128, 1800.0), (8, 600.0)])
def test_a_stage_that_runs_asks_little_of_its_file_system(
    tmp_path: Path, counted: Counted, ranks: int, hang_s: float
) -> None:
    stage = Stage(tmp_path, stage_of(ranks, hang_s), counted.now)
    counted.by_second.clear()
    assert stage.go_on(counted, 300) < hang_s / 100
    assert 0 < max(counted.by_second.values()) <= MOST_A_SECOND
    written = list(stage.supervisor.attempt_dir.glob("heartbeat.*.json"))
    assert len(written) > ranks / 2, "every rank beats, each at its time"


def test_ranks_beside_a_silent_first_one_are_looked_at_seldom(tmp_path: Path, counted: Counted) -> None:
    stage = Stage(tmp_path, stage_of(256, 400.0), counted.now)
    counted.by_second.clear()
    assert stage.go_on(counted, 600, silent=0) < 400.0
    assert sum(counted.by_second.values()) / 600 <= MOST_A_SECOND


@pytest.mark.parametrize("hang_s", [4.0, 60.0, 1800.0])
def test_a_hang_is_seen_in_time(tmp_path: Path, hang_s: float) -> None:
    spec = stage_of(64, hang_s)
    for rank in range(64):
        (tmp_path / f"heartbeat.count.{rank}.json").write_text("{}")
    now, heartbeats = 0.0, Heartbeats(spec, tmp_path, 0.0)
    while heartbeats.silence(now) <= hang_s:
        now += hang_s / 400
    assert hang_s < now < 1.05 * hang_s


def test_a_stage_of_one_process_says_every_step(tmp_path: Path) -> None:
    job = StageJob(counting_stage(counting_step()), tmp_path, tmp_path, "count")
    for step in range(1, 4):
        job.beat(step, 3)
        found = store.read_json(tmp_path / "heartbeat.count.0.json")
        assert found["step"] == step and found["first"]["step"] == 1


def test_the_first_process_of_each_node_reads_the_claim_and_the_others_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, reads = Counted(tmp_path), Counter[int]()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    spec = stage_of(16, 1800.0)
    jobs = [StageJob(spec, tmp_path, tmp_path, "count", r, 16) for r in range(16)]
    for _ in range(160):
        clock.now += 1.0
        for job in jobs:
            monkeypatch.setattr(progress.store, "claim_holder", lambda _, rank=job.rank: reads.update([rank]))
            job._end_if_given_up()
    assert {rank for rank, count in reads.items() if count > 20} == {0, 8} and all(reads[r] >= 10 for r in range(16))


def test_the_supervisor_gives_an_earlier_life_time_for_its_looks() -> None:
    """At 128 nodes a claim is read every 16 seconds, and the next life waits for three of these."""
    assert progress.claim_s(stage_of(8, 60.0)) == 2.0
    assert progress.claim_s(stage_of(1024, 1800.0)) == 16.0
    assert supervising.claim_s is progress.claim_s
