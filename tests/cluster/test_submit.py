"""Runs on a real Slurm: submitted, chained, joined, and every way in which a job ends or is ended."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from on_slurm import until

from launcher import slurm, store
from launcher.attempts import attempts, newest_attempt, step_of
from launcher.cluster import load_profile, place_record
from launcher.configs import Resources
from launcher.devcluster.cluster import DevCluster
from launcher.errors import UserError
from launcher.render import render_plan
from launcher.run_record import RunRecord
from launcher.spec import Limits
from launcher.state import run_state, stage_states
from launcher.steps import SlurmAttempt, slurm_place, srun_argv
from launcher.submit import cancel_jobs, read_submitted, stage_jobs, submit_run
from tests.supervisor.counting import counting_run, counting_step

SLOW = {"until": 400, "sleep": 0.1}


class OnSlurm:
    """A run of counting stages, submitted to the dev cluster."""

    def __init__(self, root: Path, cluster: DevCluster):
        self.root, self.cluster = root, cluster
        self.profile = load_profile(str(cluster.slurm_conf.parent.parent / "dev.yaml"))

    def plan(self, *stages: tuple[str, tuple[str, ...], dict[str, Any]], **resources: int) -> RunRecord:
        run = counting_run(*stages)
        limits = Limits(hang_s=30.0, save_s=5.0)
        planned = tuple(
            replace(s, spec=replace(s.spec, limits=limits), resources=Resources(mem="200M", **resources))
            for s in run.stages
        )
        return place_record(replace(run, cluster="dev", stages=planned), self.profile, self.root)

    def submit(self, record: RunRecord) -> dict[str, str]:
        return submit_run(self.root, record, self.profile)

    def states(self, record: RunRecord) -> dict[str, str]:
        jobs = stage_jobs(self.root, record)
        return {s.stage: s.state for s in stage_states(self.root, record, jobs=jobs)}

    def finish(self, record: RunRecord, seconds: float = 90.0) -> dict[str, str]:
        """Wait until nothing of the run waits or runs."""
        until(lambda: not {"queued", "running"} & set(self.states(record).values()), seconds, "the run's end")
        return self.states(record)

    def step(self, record: RunRecord, stage: str = "a") -> int:
        attempt = newest_attempt(self.root, record.stage(stage).spec)
        return step_of(attempt) if attempt else 0

    def await_step(self, record: RunRecord, step: int, stage: str = "a", seconds: float = 60.0) -> None:
        until(lambda: self.step(record, stage) >= step, seconds, f"step {step} of {stage}")

    def lives(self, stage: str = "a") -> list[str]:
        return [a.name for a, _ in attempts(self.root, "run", stage)]

    def log(self, attempt: str, stage: str = "a") -> str:
        return (store.stage_dir(self.root, "run", stage) / attempt / "count.0.log").read_text()

    def end(self, attempt: str, stage: str = "a") -> dict[str, Any]:
        path = store.stage_dir(self.root, "run", stage) / attempt / "events.jsonl"
        last: dict[str, Any] = json.loads(path.read_text().splitlines()[-1])
        return last


@pytest.fixture
def on(devcluster: DevCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OnSlurm:
    monkeypatch.setenv("SLURM_CONF", str(devcluster.slurm_conf))
    return OnSlurm(tmp_path / "root", devcluster)


def test_a_chain_runs_to_its_end_and_is_never_submitted_again(on: OnSlurm) -> None:
    record = on.plan(("a", (), {}), ("b", ("a",), {}), ("c", ("a", "b"), {}))
    first = on.submit(record)
    assert list(first) == ["a", "b", "c"]
    assert on.submit(record) == {}  # all are in the queue: joined
    assert on.finish(record) == dict.fromkeys("abc", "done")
    assert on.submit(record) == {}
    receipts = [store.read_receipt(on.root, s.spec.artifact) for s in record.stages]
    assert all(r is not None and r.cpu_seconds > 0 and r.peak_memory_bytes > 2**20 for r in receipts)
    assert [s.job for s in read_submitted(on.root, "run")] == list(first.values())


def test_what_runs_is_what_was_rendered(on: OnSlurm) -> None:
    """Every executed srun, word by word; two ranks on each of two nodes."""
    run = counting_run(("a", (), {}))
    step = replace(counting_step(until=3), nodes=2, ntasks=4, gpus=2)
    planned = replace(run.stages[0], spec=replace(run.stages[0].spec, steps=(step,)))
    planned = replace(planned, resources=Resources(nodes=2, ntasks_per_node=2, gpus_per_node=2, mem="200M"))
    record = place_record(replace(run, stages=(planned,)), on.profile, on.root)
    job = on.submit(record)["a"]
    assert on.finish(record) == {"a": "done"}
    spec = record.stages[0].spec
    events = (store.stage_dir(on.root, "run", "a") / f"{job}.0" / "events.jsonl").read_text().splitlines()
    (launched,) = (e for e in map(json.loads, events) if e["event"] == "launched")
    node = next(w for w in launched["argv"] if w.startswith("MASTER_ADDR=")).partition("=")[2]
    place = slurm_place(spec, on.root, on.profile.python, SlurmAttempt(job, "0", node))
    assert tuple(launched["argv"]) == srun_argv(spec.steps[0], place, spec.runtime)
    exits = {p.name for p in (store.stage_dir(on.root, "run", "a") / f"{job}.0").glob("exit.count.*.json")}
    assert exits == {f"exit.count.{rank}.json" for rank in range(4)}


def test_a_rendered_folder_submits_itself_and_its_jobs_are_known(on: OnSlurm, tmp_path: Path) -> None:
    record = on.plan(("a", (), {"until": 20, "sleep": 0.1}), ("b", ("a",), {}))
    render_plan(record, on.profile, tmp_path / "scripts", on.root)
    done = subprocess.run([tmp_path / "scripts" / "submit.sh"], capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    assert [s.stage for s in read_submitted(on.root, "run")] == ["a", "b"]
    assert on.submit(record) == {}
    assert on.finish(record) == {"a": "done", "b": "done"}


def test_a_failure_cancels_what_reads_it_and_nothing_else(on: OnSlurm) -> None:
    bad = {"fail_at": 2, "fail": "user"}
    record = on.plan(("bad", (), bad), ("reads-bad", ("bad",), {}), ("other", (), {}))
    on.submit(record)
    assert on.finish(record) == {"bad": "failed", "reads-bad": "stopped", "other": "done"}
    assert on.lives("bad") and len(on.lives("bad")) == 1
    again = on.submit(record)
    assert list(again) == ["bad", "reads-bad"]
    on.finish(record)


def test_a_killed_rank_is_requeued_and_goes_on(on: OnSlurm) -> None:
    record = on.plan(("a", (), {"until": 8, "fail_at": 5, "fail": "kill", "once": 1}), ("b", ("a",), {}))
    job = on.submit(record)["a"]
    assert on.finish(record) == {"a": "done", "b": "done"}
    assert on.lives() == [f"{job}.0", f"{job}.1"]
    assert on.end(f"{job}.0")["class"] == "crashed" and "from step 4" in on.log(f"{job}.1")
    receipt = store.read_receipt(on.root, record.stages[0].spec.artifact)
    assert receipt is not None and receipt.attempts == 2


def test_without_progress_it_is_given_up(on: OnSlurm) -> None:
    record = on.plan(("a", (), {"until": 8, "fail_at": 1, "fail": "kill"}), ("b", ("a",), {}))
    on.submit(record)
    assert on.finish(record, 150.0) == {"a": "failed", "b": "stopped"}
    assert len(on.lives()) == 1 + record.stages[0].spec.limits.max_no_progress
    assert stage_states(on.root, record)[0].tail == ("from step 0",)


def test_at_the_time_limit_it_saves_and_comes_back(on: OnSlurm) -> None:
    record = on.plan(("a", (), {"until": 60, "sleep": 0.1, "save": 10_000}))
    job = on.submit(record)["a"]
    on.await_step(record, 5)
    # What Slurm does before the limit, with `--signal=B:USR2@N`.
    on.cluster.call("scancel", "--signal=USR2", "--batch", job)
    assert on.finish(record) == {"a": "done"}
    assert on.end(f"{job}.0")["class"] == "time-limit"
    assert "from step 0" not in on.log(f"{job}.1")


def test_a_cancelled_run_stays_cancelled_and_resumes(on: OnSlurm) -> None:
    record = on.plan(("a", (), {**SLOW, "save": 10_000}), ("b", ("a",), {}))
    job = on.submit(record)["a"]
    on.await_step(record, 5)
    assert cancel_jobs(on.root, record) == ["a", "b"]
    assert on.finish(record) == {"a": "stopped", "b": "stopped"}
    assert on.lives() == [f"{job}.0"]
    known = slurm.show_job(job)
    assert known is None or known.restarts == 0
    again = on.submit(record)
    assert list(again) == ["a", "b"]
    until(lambda: f"{again['a']}.0" in on.lives() and on.step(record) > 0, 60.0, "the new job's first step")
    saved = int(on.log(f"{again['a']}.0").split("from step ")[1].split()[0])
    assert saved >= 5
    cancel_jobs(on.root, record)
    on.finish(record)


def test_a_hang_is_ended_with_its_stacks_and_requeued(on: OnSlurm) -> None:
    record = on.plan(("a", (), {"until": 6, "hang_at": 3}))
    limited = replace(record.stages[0].spec, limits=Limits(hang_s=6.0, save_s=2.0, max_no_progress=0))
    record = replace(record, stages=(replace(record.stages[0], spec=limited),))
    on.submit(record)
    on.finish(record)
    ended = [on.end(life) for life in on.lives()]
    assert {e["class"] for e in ended} == {"hang"}
    assert "in fail" in on.log(on.lives()[0])


def test_a_killed_supervisor_leaves_a_run_that_resumes(on: OnSlurm) -> None:
    record = on.plan(("a", (), {"until": 40, "sleep": 0.1}))
    on.submit(record)
    on.await_step(record, 5)
    attempt = newest_attempt(on.root, record.stages[0].spec)
    assert attempt is not None and attempt.owner is not None
    on.cluster.call("scancel", "--signal=KILL", "--batch", attempt.owner.job or "")
    assert on.finish(record)["a"] in ("interrupted", "failed")
    assert list(on.submit(record)) == ["a"]
    assert on.finish(record) == {"a": "done"}
    assert "from step 0" not in on.log(on.lives()[-1])


def test_a_lost_node_is_left_to_slurm_and_the_stage_goes_on(on: OnSlurm) -> None:
    record = on.plan(("a", (), {"until": 120, "sleep": 0.1}))
    job = on.submit(record)["a"]
    on.await_step(record, 5)
    known = slurm.show_job(job)
    assert known is not None
    on.cluster.kill_node(known.nodes)
    try:
        until(lambda: len(on.lives()) == 2, 90.0, "a second life")
    finally:
        for kind in ("node", "slurmd"):
            on.cluster.start(f"{kind}.{known.nodes}")
    assert on.finish(record, 120.0) == {"a": "done"}
    assert "from step 0" not in on.log(on.lives()[-1])
    on.cluster.await_idle()


def test_jobs_of_another_plan_must_end_first(on: OnSlurm) -> None:
    record = on.plan(("first", (), {}), ("a", (), SLOW))
    on.submit(record)
    on.await_step(record, 1)
    other = on.plan(("a", (), SLOW))
    with pytest.raises(UserError, match="stage a of an earlier plan is running"):
        on.submit(other)
    cancel_jobs(on.root, record)
    on.finish(record)


def test_states_without_slurm_come_from_the_files(on: OnSlurm) -> None:
    """As on a laptop that sees the store alone."""
    record = on.plan(("a", (), {}), ("b", ("a",), {"fail_at": 1, "fail": "user"}))
    on.submit(record)
    on.finish(record)
    states = stage_states(on.root, record)
    assert {s.stage: s.state for s in states} == {"a": "done", "b": "failed"} and run_state(states) == "failed"


def test_the_environment_of_the_submitting_shell_decides_nothing(on: OnSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "no-such-partition")
    record = on.plan(("a", (), {}))
    on.submit(record)
    assert on.finish(record) == {"a": "done"}
