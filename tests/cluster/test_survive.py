"""What clusters do to jobs: preemption, bad nodes, nodes that go, sites that requeue nothing. Each made to happen.

Where several faults can happen side by side they share a test, since most of its time is Slurm's own: a job that goes
back into the queue waits 11 s here, and a node is down half a minute after its slurmd has gone.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from on_slurm import lacking, shown, submit, until
from test_submit import OnSlurm

from launcher import slurm, store
from launcher.cluster import place_record
from launcher.configs import Resources
from launcher.devcluster import nodes
from launcher.devcluster.cluster import DevCluster
from launcher.render import render_plan
from launcher.run_record import RunRecord
from launcher.spec import AllReduce, Preflight
from launcher.state import StageState, stage_states
from launcher.steps import SlurmAttempt, preflight_argv, preflight_place, preflight_steps, slurm_place
from launcher.submit import cancel_jobs, read_submitted, stage_jobs

#: Saves when it is asked to and at no other time.
WHEN_ASKED = {"until": 90, "sleep": 0.1, "save": 10_000}
#: Runs for longer than Slurm needs to give up a node and to start the job again.
SLOW = {"until": 400, "sleep": 0.2}


class Surviving(OnSlurm):
    """A run of counting stages, and what its attempts say of themselves."""

    def spread(self, record: RunRecord, stage: str, count: int, gpus: int = 0, **limits: Any) -> RunRecord:
        """The same run with a stage on several nodes, one task each."""
        planned = record.stage(stage)
        step = replace(planned.spec.steps[0], nodes=count, ntasks=count, gpus=gpus)
        spec = replace(planned.spec, steps=(step,), limits=replace(planned.spec.limits, **limits))
        resources = Resources(nodes=count, gpus_per_node=gpus, mem="200M")
        return self.with_stage(record, replace(planned, spec=spec, resources=resources))

    def with_stage(self, record: RunRecord, stage: Any) -> RunRecord:
        stages = tuple(stage if s.spec.stage == stage.spec.stage else s for s in record.stages)
        return place_record(replace(record, stages=stages), self.profile, self.root)

    def events(self, attempt: str, stage: str = "a") -> list[dict[str, Any]]:
        path = store.stage_dir(self.root, "run", stage) / attempt / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def started_from(self, attempt: str, stage: str = "a") -> int:
        until(lambda: "from step " in self.log(attempt, stage), 30.0, "a worker's first words")
        return int(self.log(attempt, stage).split("from step ")[1].split()[0])

    def state_of(self, record: RunRecord, stage: str) -> StageState:
        states = stage_states(self.root, record, jobs=stage_jobs(self.root, record))
        return next(s for s in states if s.stage == stage)

    def message(self, record: RunRecord, stage: str = "a") -> str:
        return self.state_of(record, stage).message

    def await_queued(self, record: RunRecord, stage: str, words: str) -> None:
        """Wait until the stage is shown in the queue, with the reason why it is there again."""

        def queued() -> bool:
            now = self.state_of(record, stage)
            return now.state == "queued" and words in now.message

        until(queued, 60.0, f"{stage} in the queue again, {words}")

    def node_of(self, job: str) -> str:
        known = slurm.show_job(job)
        assert known is not None
        return known.nodes

    def await_lives(self, count: int, stage: str = "a", seconds: float = 60.0) -> None:
        until(lambda: len(self.lives(stage)) >= count, seconds, f"life {count} of {stage}")

    def tell(self, name: str, first: str, second: str, stage: str = "a", since: float | None = None) -> None:
        """Print seconds from the fault, or from the end of a life, to the next one's start of its steps."""
        ended, begun = self.events(first, stage)[-1], self.events(second, stage)
        launched = next((e["time"] for e in begun if e["event"] == "launched"), begun[-1]["time"])
        since = since or ended["time"]
        lost = self.last_step(first, stage) - self.started_from(second, stage)
        print(f"\n{name}: {launched - since:.1f} s, {lost} steps lost: {ended.get('message')}")

    def last_step(self, attempt: str, stage: str = "a") -> int:
        """The last step of rank 0, which is the one that saves."""
        path = store.stage_dir(self.root, "run", stage) / attempt / "heartbeat.count.0.json"
        return int((store.read_json(path) or {"step": 0})["step"])


@pytest.fixture
def on(devcluster: DevCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Surviving:
    monkeypatch.setenv("SLURM_CONF", str(devcluster.slurm_conf))
    return Surviving(tmp_path / "root", devcluster)


# ------------------------------------------------------------------------------------------------------- preemption


def test_preempted_with_and_without_grace_it_saves_and_goes_on(on: Surviving) -> None:
    record = on.plan(("a", (), WHEN_ASKED), ("b", (), WHEN_ASKED))
    for stage, partition in (("a", "grace"), ("b", "low")):
        planned = record.stage(stage)
        record = on.with_stage(record, replace(planned, resources=replace(planned.resources, partition=partition)))
    jobs = on.submit(record)
    for stage in "ab":
        on.await_step(record, 5, stage)
    taken = sorted({on.node_of(job) for job in jobs.values()})
    above = ("--partition=high", f"--nodes={len(taken)}", f"--nodelist={','.join(taken)}", "--exclusive")
    other = submit(on.cluster, *above, script="sleep 1")
    for stage in "ab":
        on.await_queued(record, stage, "before: preempted by")
    assert on.finish(record, 120.0) == {"a": "done", "b": "done"}
    assert shown(on.cluster, other)["JobState"] == "COMPLETED"
    for stage, job in jobs.items():
        assert on.lives(stage) == [f"{job}.0", f"{job}.1"]
        end = on.end(f"{job}.0", stage)
        assert (end["class"], end["action"]) == ("preempted", "again") and "preempted by" in end["message"]
        assert on.started_from(f"{job}.1", stage) == on.last_step(f"{job}.0", stage) >= 5
        on.tell(f"preemption of {stage}", f"{job}.0", f"{job}.1", stage)
    # With grace time nobody tells the supervisor before it is over; it has left by then.
    assert not [e for e in on.events(f"{jobs['a']}.0") if e.get("signal") == "SIGTERM"]
    on.cluster.await_idle()


# -------------------------------------------------------------------------------------------------------- bad nodes


@contextmanager
def unmounted(on: Surviving, node: str) -> Iterator[None]:
    """A node that has lost the file system of the store: an empty one lies in its place, there alone."""
    holder = on.cluster.processes.get(f"node.{node}")
    if on.cluster.site.isolation == "none" or holder is None:
        lacking("nodes of this dev cluster share all file systems: no namespaces for this user")
    inside = [*nodes.entering(on.cluster.site, holder), "sh", "-c"]
    subprocess.run([*inside, 'mount -t tmpfs none "$1"', "sh", str(on.root)], check=True)
    try:
        yield
    finally:
        subprocess.run([*inside, 'umount "$1"', "sh", str(on.root)], check=True)


def test_bad_nodes_are_named_and_left_out(on: Surviving) -> None:
    """One that does not see the store fails the preflight; on another the GPU of a stage turns out to be broken."""
    on.profile = replace(on.profile, sbatch={"exclude": "n4"})
    broken = {"until": 30, "sleep": 0.1, "fail_at": 5, "fail": "gpu", "fail_on": "n1"}
    record = on.plan(("a", (), {"until": 10}), ("b", (), broken))
    record = on.spread(on.spread(record, "a", 2), "b", 1, gpus=1)
    on.root.mkdir(parents=True)
    with unmounted(on, "n2"):
        jobs = on.submit(record)
        first, second = (f"{jobs['a']}.{n}" for n in (0, 1))
        until(lambda: first in on.lives() and on.events(first)[-1]["event"] == "end", 60.0, "the preflight's end")
    assert on.finish(record) == {"a": "done", "b": "done"}
    end = on.end(first)
    assert (end["class"], end["excluded"]) == ("preflight", ["n2"])
    assert "n2: " in end["message"] and "n1: " not in end["message"] and str(on.root) in end["message"]
    assert not [e for e in on.events(first) if e["event"] == "launched"]
    looked = [e for e in on.events(second) if e["event"] == "preflight"]
    assert [e["nodes"] for e in looked] == [["n1", "n3"]] and looked[0]["failed"] == {}
    spec, attempt = record.stage("a").spec, SlurmAttempt(jobs["a"], "1", "n1")
    place = preflight_place(slurm_place(spec, on.root, on.profile.python, attempt), "n1", attempt)
    rendered = [preflight_argv(s, place, spec.runtime) for s in preflight_steps(spec, 2, on.profile.python)]
    assert [tuple(argv) for argv in looked[0]["argv"]] == rendered
    assert shown(on.cluster, jobs["a"])["ExcNodeList"] == "n4,n2"
    end = on.end(f"{jobs['b']}.0", "b")
    assert (end["class"], end["excluded"]) == ("gpu-fault", ["n1"])
    assert "rank 0 on n1: " in end["message"] and "busy or unavailable" in end["message"]
    assert on.started_from(f"{jobs['b']}.1", "b") == 4
    on.tell("GPU fault", f"{jobs['b']}.0", f"{jobs['b']}.1", "b")
    print(f"preflight: {on.events(second)[0]['time'] - on.events(first)[-1]['time']:.1f} s: {on.end(first)['message']}")


def test_a_slow_network_is_refused_and_a_fast_one_measured(on: Surviving) -> None:
    """gloo between CPUs, and said so."""
    record = on.plan(("slow", (), {}), ("fast", (), {}))
    for stage, floor in (("slow", 1e6), ("fast", 1e-6)):
        planned = on.spread(record, stage, 2, max_no_progress=0).stage(stage)
        on.profile = replace(on.profile, preflight=Preflight(all_reduce=AllReduce(floor, size_mb=1, rounds=3)))
        record = replace(record, stages=tuple(planned if s.spec.stage == stage else s for s in record.stages))
        placed = place_record(replace(record, stages=(planned,)), on.profile, on.root).stages[0]
        record = replace(record, stages=tuple(placed if s.spec.stage == stage else s for s in record.stages))
    jobs = on.submit(record)
    assert on.finish(record) == {"slow": "failed", "fast": "done"}
    end = on.end(f"{jobs['slow']}.0", "slow")
    assert (end["class"], end["action"]) == ("preflight", "stop")
    assert "gloo on CPUs" in end["message"] and "below the floor of 1e+06, over n1, n2" in end["message"]
    (looked,) = (e for e in on.events(f"{jobs['fast']}.0", "fast") if e["event"] == "preflight")
    assert looked["mode"] == "gloo on CPUs" and looked["ranks"] == 2 and looked["correct"] and looked["bus_gbs"] > 0


# ----------------------------------------------------------------------------------------------------------- chains


def chained(on: Surviving, record: RunRecord, links: int = 3, **limits: Any) -> RunRecord:
    """The same run in chains of jobs."""
    for planned in record.stages:
        own = replace(planned.spec.limits, continuation="chain", chain_jobs=links, **limits)
        record = on.with_stage(record, replace(planned, spec=replace(planned.spec, limits=own)))
    return record


def links_of(on: Surviving, stage: str) -> list[str]:
    return [line.job for line in read_submitted(on.root, "run") if line.stage == stage]


def test_a_chain_goes_on_where_no_job_is_requeued(on: Surviving) -> None:
    """Beside it one stage that fails for good in its first link, and one that gets no further in any."""
    wrong, dies = {"fail_at": 2, "fail": "user"}, {"fail_at": 2, "fail": "kill", "save": 10}
    plan = (
        ("a", (), WHEN_ASKED),
        ("b", ("a",), {}),
        ("wrong", (), wrong),
        ("reads", ("wrong",), {}),
        ("dies", (), dies),
    )
    record = chained(on, on.plan(*plan), 4, max_no_progress=1)
    last = on.submit(record)
    links = links_of(on, "a")
    assert len(links) == 4 and last["a"] == links[-1]
    assert shown(on.cluster, links[0])["Requeue"] == "0"
    on.await_step(record, 5)
    assert on.states(record)["a"] == "running"
    on.cluster.call("scancel", "--signal=USR2", "--batch", links[0])
    until(lambda: on.lives() == [f"{links[0]}.0", f"{links[1]}.0"] and on.step(record) > 0, 30.0, "the second link")
    assert on.states(record)["a"] == "running"
    found = on.finish(record)
    assert found == {"a": "done", "b": "done", "wrong": "failed", "reads": "stopped", "dies": "failed"}
    assert on.end(f"{links[0]}.0")["class"] == "time-limit"
    assert on.started_from(f"{links[1]}.0") == on.last_step(f"{links[0]}.0") >= 5
    on.tell("chain", f"{links[0]}.0", f"{links[1]}.0")
    until(lambda: shown(on.cluster, links[3])["JobState"] == "COMPLETED", 30.0, "the links that have nothing to do")
    assert on.lives() == [f"{links[0]}.0", f"{links[1]}.0"]
    assert len(on.lives("wrong")) == 1 and "data.jsonl:3: not text" in on.message(record, "wrong")
    assert {shown(on.cluster, job)["JobState"] for job in links_of(on, "wrong")} == {"FAILED"}
    # The first life got to a step; neither of the next two got further.
    assert len(on.lives("dies")) == 3 and "given up: 2 lives" in on.message(record, "dies")


def test_cancel_takes_every_link_and_the_rendered_script_submits_the_same(on: Surviving, tmp_path: Path) -> None:
    record = chained(on, on.plan(("a", (), WHEN_ASKED), ("b", ("a",), {})), links=2)
    render_plan(record, on.profile, tmp_path / "scripts", on.root)
    done = subprocess.run([tmp_path / "scripts" / "submit.sh"], capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    links = links_of(on, "a")
    assert len(links) == 2 and len(links_of(on, "b")) == 2
    assert shown(on.cluster, links[1])["Dependency"].startswith(f"afterany:{links[0]}(")
    assert {f"afterok:{links[1]}(" in shown(on.cluster, job)["Dependency"] for job in links_of(on, "b")} == {True}
    on.await_step(record, 3)
    assert on.submit(record) == {}
    assert cancel_jobs(on.root, record) == ["a", "b"]
    assert on.finish(record) == {"a": "stopped", "b": "stopped"}
    assert on.lives() == [f"{links[0]}.0"]


def test_a_requeue_that_is_refused_says_what_to_set(on: Surviving) -> None:
    record = on.plan(("a", (), WHEN_ASKED))
    job = on.submit(record)["a"]
    on.await_step(record, 3)
    on.cluster.call("scontrol", "update", f"jobid={job}", "Requeue=0")
    on.cluster.call("scancel", "--signal=USR2", "--batch", job)
    assert on.finish(record)["a"] in ("stopped", "failed")
    assert "continuation: chain" in on.message(record) and "time limit" in on.message(record)


# -------------------------------------------------------------------------------------------------- nodes that go


def lose(on: Surviving, record: RunRecord, what: str, which: int, whole: bool = False) -> None:
    """Lose a node, or its slurmd alone, of a stage on two nodes; the run goes on elsewhere and ends well."""
    job = on.submit(record)["a"]
    on.await_step(record, 5)
    node = slurm.hostnames(on.node_of(job))[which]
    fault = time.time()
    if whole:
        on.cluster.kill_node(node)
    else:
        subprocess.run(["kill", "-KILL", str(on.cluster.processes[f"slurmd.{node}"].pid)], check=True)
    before = on.last_step(f"{job}.0")
    try:
        on.await_lives(2, seconds=120.0)
        until(lambda: on.step(record) > 0, 60.0, "the second life's first step")
    finally:
        for kind in ("node", "slurmd") if whole else ("slurmd",):
            on.cluster.start(f"{kind}.{node}")
    assert node not in on.events(f"{job}.1")[0]["owner"]["host"]
    assert on.finish(record, 120.0) == {"a": "done"}
    assert on.started_from(f"{job}.1") >= before - 1  # one checkpoint interval at most
    ends = [e for e in on.events(f"{job}.0") if e["event"] == "end"]
    assert {e["class"] for e in ends} <= {"node-failure", "requeued"} and (ends or which == 0)
    on.tell(what, f"{job}.0", f"{job}.1", since=fault)
    on.cluster.await_idle(60)


def two_nodes(on: Surviving) -> RunRecord:
    return on.spread(on.plan(("a", (), SLOW)), "a", 2)


def test_without_the_first_nodes_slurmd_two_lives_never_write_side_by_side(on: Surviving) -> None:
    """Slurm gives up the node and starts the job elsewhere, while supervisor and worker live on untold."""
    record = on.plan(("a", (), SLOW))
    lose(on, record, "slurmd of the first node", 0)
    first, second = on.lives()
    end = on.events(first)[-1]
    assert end["event"] == "end" and end["action"] == "again"
    launched = next(e["time"] for e in on.events(second) if e["event"] == "launched")
    folder = store.stage_dir(on.root, "run", "a") / first
    last_written = max(store.read_json(path)["time"] for path in folder.glob("heartbeat.*.json"))
    assert end["time"] < launched and last_written < launched
    receipt = store.read_receipt(on.root, record.stages[0].spec.artifact)
    assert receipt is not None and receipt.record == {"steps": SLOW["until"]}


@pytest.mark.soak
def test_without_another_nodes_slurmd_it_goes_on(on: Surviving) -> None:
    lose(on, two_nodes(on), "slurmd of another node", 1)


@pytest.mark.soak
@pytest.mark.parametrize("which", [0, 1])
def test_without_a_whole_node_it_goes_on(on: Surviving, which: int) -> None:
    lose(on, two_nodes(on), f"node {which} of two", which, whole=True)
