"""Stages of several components on a real Slurm: in one allocation, and as a heterogeneous job."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from on_slurm import until
from test_submit import OnSlurm

from launcher import slurm, store
from launcher.attempts import newest_attempt
from launcher.cluster import place_record
from launcher.configs import Component, Resources
from launcher.devcluster.cluster import DevCluster
from launcher.run_record import PlannedStage, RunRecord
from launcher.spec import Limits, Probe, Step
from launcher.steps import SlurmAttempt, is_elsewhere, slurm_place, srun_argv
from launcher.submit import cancel_jobs, stage_jobs
from tests.supervisor.counting import WORKER, counting_run

#: Answers at its port; with a second argument it dies so many seconds after its first caller.
SERVER = """
import socket, sys, time
print("on", socket.gethostname(), flush=True)
with socket.create_server(("", int(sys.argv[1]))) as listening:
    while True:
        listening.accept()[0].close()
        if len(sys.argv) > 2:
            time.sleep(float(sys.argv[2]))
            sys.exit(3)
"""
#: Calls the server from every rank, then counts.
ACTOR = """
import runpy, socket, sys
worker, stage, host, port, *options = sys.argv[1:]
print("on", socket.gethostname(), flush=True)
socket.create_connection((host, int(port)), timeout=20).close()
sys.argv = [worker, stage, *options]
runpy.run_path(worker, run_name="__main__")
"""
READY = Probe("tcp", "{host:server}:{port:server}", deadline=60.0)


def server(*options: str, code: str = SERVER, probe: Probe = READY, name: str = "server", **where: Any) -> Step:
    argv = ("{python}", "-c", code, f"{{port:{name}}}", *options)
    return Step(name=name, argv=argv, role="server", probe=probe, **where)


def actor(nodes: int = 2, ntasks: int = 4, where: dict[str, Any] | None = None, **options: Any) -> Step:
    words = tuple(f"{k}={v}" for k, v in options.items())
    argv = ("{python}", "-c", ACTOR, str(WORKER), "{stage_json}", "{host:server}", "{port:server}", *words)
    return Step(name="actor", argv=argv, nodes=nodes, ntasks=ntasks, **(where or {}))


class Components(OnSlurm):
    """A run of one stage `a` whose steps are given."""

    def plan_steps(self, *steps: Step, **resources: Any) -> RunRecord:
        run = counting_run(("a", (), {}))
        spec = replace(run.stages[0].spec, steps=steps, limits=Limits(hang_s=60.0, save_s=5.0))
        stage = PlannedStage(spec, (), Resources(mem="200M", ntasks_per_node=2, **resources))
        return place_record(replace(run, cluster="dev", stages=(stage,)), self.profile, self.root)

    def folder(self, attempt: str) -> Path:
        return store.stage_dir(self.root, "run", "a") / attempt

    def launched(self, attempt: str) -> dict[str, list[str]]:
        """The srun command of every step that was started."""
        lines = (self.folder(attempt) / "events.jsonl").read_text().splitlines()
        return {e["step"]: e["argv"] for e in map(json.loads, lines) if e["event"] == "launched"}

    def node_of(self, attempt: str, step: str, rank: int = 0) -> str:
        return (self.folder(attempt) / f"{step}.{rank}.log").read_text().split()[1]

    def expect_rendered(self, record: RunRecord, attempt: str, hosts: dict[str, str]) -> None:
        """Every executed srun is the rendered one, with the job's id and nodes in place of references."""
        job, restarts = attempt.split(".")
        spec = record.stages[0].spec
        away = {s.name: hosts[s.name] for s in spec.steps if is_elsewhere(s)}
        node = next(hosts[s.name] for s in spec.steps if not is_elsewhere(s))
        place = slurm_place(spec, self.root, self.profile.python, SlurmAttempt(job, restarts, node, hosts=away))
        rendered = {s.name: list(srun_argv(s, place, spec.runtime)) for s in spec.steps}
        assert self.launched(attempt) == rendered

    def steps_of(self, job: str) -> list[str]:
        """Steps that Slurm still has of a job."""
        text = self.cluster.call("squeue", "--steps", "--noheader", f"--jobs={job}", "--format=%j")
        return [name for name in text.split() if name in ("server", "actor", "second")]


@pytest.fixture
def on(devcluster: DevCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Components:
    monkeypatch.setenv("SLURM_CONF", str(devcluster.slurm_conf))
    return Components(tmp_path / "root", devcluster)


#: First nodes of server, second server and the actor, which has two, among the job's three.
LAYOUTS = {"servers first": (0, 0, 1), "one beside the actor, one behind it": (2, 0, 0)}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_components_run_where_the_plan_has_them(on: Components, layout: tuple[int, int, int]) -> None:
    first = dict(zip(("server", "second", "actor"), layout, strict=True))
    probe = Probe("tcp", "{host:second}:{port:second}", 60.0)
    servers = (server(first_node=first["server"]), server(name="second", probe=probe, first_node=first["second"]))
    record = on.plan_steps(*servers, actor(where={"first_node": first["actor"]}, until=3))
    job = on.submit(record)["a"]
    assert on.finish(record) == {"a": "done"}
    nodes = slurm.hostnames(stage_jobs(on.root, record)["a"].nodes)
    assert len(nodes) == 3
    life = f"{job}.0"
    assert {name: on.node_of(life, name) for name in first} == {name: nodes[n] for name, n in first.items()}
    assert [on.node_of(life, "actor", rank) for rank in (1, 2, 3)] == [nodes[first["actor"] + n] for n in (0, 1, 1)]
    on.expect_rendered(record, life, {name: nodes[n] for name, n in first.items()})
    assert on.steps_of(job) == [], "a server must not outlive the work"


def test_a_server_that_dies_ends_the_stage_at_once(on: Components) -> None:
    record = on.plan_steps(server("0.5", first_node=2), actor(until=100_000, sleep=0.05))
    job = on.submit(record)["a"]
    assert on.finish(record) == {"a": "failed"}
    end = on.end(f"{job}.0")
    assert (end["class"], end["action"]) == ("crashed", "stop")
    assert re.search(r"step server, rank 0 on n\d+: exit code 3", end["message"])
    assert on.steps_of(job) == []


def test_a_server_that_is_never_ready_is_named_and_nothing_else_starts(on: Components) -> None:
    silent = server(code="import time; time.sleep(600)", probe=replace(READY, deadline=2.0), first_node=1)
    record = on.plan_steps(silent, actor(nodes=1, ntasks=1, until=3))
    job = on.submit(record)["a"]
    assert on.finish(record) == {"a": "failed"}
    assert "step server did not become ready" in on.end(f"{job}.0")["message"]
    assert list(on.launched(f"{job}.0")) == ["server"] and on.steps_of(job) == []


# ------------------------------------------------------------------------------------------------- heterogeneous jobs


def heterogeneous(on: Components, **options: Any) -> RunRecord:
    """The actor on two nodes with GPUs of one partition, the server on a node without of another."""
    own = Component(nodes=1, partition="high", mem="150M")
    main = replace(actor(where={"het_group": 0}, save=10_000, **options), gpus=2)
    return on.plan_steps(
        server(het_group=1),
        main,
        nodes=2,
        gpus_per_node=2,
        components={"server": own},
        placement="heterogeneous",
    )


def test_a_heterogeneous_job_runs_is_joined_and_goes_on_after_its_time_limit(on: Components) -> None:
    record = heterogeneous(on, until=60, sleep=0.1)
    job = on.submit(record)["a"]
    on.await_step(record, 5)
    assert on.states(record) == {"a": "running"} and on.submit(record) == {}
    partitions = on.cluster.call("squeue", "--noheader", f"--jobs={job}", "--format=%i %P %D %b").split("\n")
    asked = {row.split()[0]: row.split()[1:3] for row in partitions if row}
    assert asked == {f"{job}+0": ["batch", "2"], f"{job}+1": ["high", "1"]}
    on.cluster.call("scancel", "--signal=USR2", "--batch", job)
    assert on.finish(record) == {"a": "done"}
    assert on.lives() == [f"{job}.0", f"{job}.1"] and on.end(f"{job}.0")["class"] == "time-limit"
    assert "from step 0" not in (on.folder(f"{job}.1") / "actor.0.log").read_text()
    for life in on.lives():
        hosts = {name: on.node_of(life, name) for name in ("server", "actor")}
        assert len({*hosts.values(), on.node_of(life, "actor", 2)}) == 3
        on.expect_rendered(record, life, hosts)
    assert on.submit(record) == {}


def test_a_heterogeneous_job_is_cancelled_whole(on: Components) -> None:
    record = heterogeneous(on, until=100_000, sleep=0.05)
    job = on.submit(record)["a"]
    on.await_step(record, 1)
    assert cancel_jobs(on.root, record) == ["a"]
    assert on.finish(record) == {"a": "stopped"}
    attempt = newest_attempt(on.root, record.stages[0].spec)
    assert attempt is not None and attempt.name == f"{job}.0" and on.end(f"{job}.0")["class"] == "cancelled"
    active = "--states=PENDING,RUNNING,COMPLETING"
    until(lambda: not on.cluster.call("squeue", "--noheader", active, f"--jobs={job}", "--format=%i"), 60.0, "its end")
    assert on.lives() == [f"{job}.0"]
