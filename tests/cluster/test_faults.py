"""What goes wrong beside the nodes: memory, disks, file systems, Slurm's own daemons, jobs that nobody remembers.

Stages that can fail side by side share a test: most of its time is Slurm's own, a requeued job waits 11 s here.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from on_slurm import Prism, lacking, state, until
from test_submit import OnSlurm

from launcher import slurm, store
from launcher.attempts import attempts, newest_attempt
from launcher.cluster import place_record
from launcher.devcluster import nodes
from launcher.devcluster.cluster import DevCluster
from launcher.errors import WorldError
from launcher.run_record import RunRecord, write_run
from launcher.spec import Limits
from launcher.state import StageState, stage_states
from launcher.submit import read_submitted, stage_jobs
from launcher.watch import watch_run

#: Long enough for a daemon to be missed meanwhile.
LONG = {"until": 150, "sleep": 0.1}


@pytest.fixture
def on(devcluster: DevCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OnSlurm:
    monkeypatch.setenv("SLURM_CONF", str(devcluster.slurm_conf))
    return OnSlurm(tmp_path / "root", devcluster)


def told(on: OnSlurm, record: RunRecord) -> dict[str, StageState]:
    return {s.stage: s for s in stage_states(on.root, record, jobs=stage_jobs(on.root, record))}


def limited(on: OnSlurm, record: RunRecord, limits: Limits) -> RunRecord:
    stages = tuple(replace(s, spec=replace(s.spec, limits=limits)) for s in record.stages)
    return place_record(replace(record, stages=stages), on.profile, on.root)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's commands are given two seconds, so that a silent controller costs a test no more."""
    call = slurm.call
    monkeypatch.setattr(slurm, "call", lambda *argv, timeout=2.0: call(*argv, timeout=min(timeout, 2.0)))


@contextmanager
def stopped(cluster: DevCluster, name: str) -> Iterator[None]:
    """A daemon that is there and does not answer."""
    os.kill(cluster.processes[name].pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(cluster.processes[name].pid, signal.SIGCONT)


@contextmanager
def killed(cluster: DevCluster, *names: str) -> Iterator[None]:
    """Daemons that are gone, once slurmctld has saved what it knows; then started again, the last one first."""
    now, saved = time.time(), cluster.folder / "state" / "job_state"
    until(lambda: "slurmctld" not in names or saved.stat().st_mtime > now, 30, "slurmctld saves its state")
    for name in names:
        os.kill(cluster.processes[name].pid, signal.SIGKILL)
    until(lambda: set(names) <= set(cluster.dead()), 10, "the daemons' death")
    try:
        yield
    finally:
        for name in reversed(names):
            cluster.start(name)
            port = {"slurmdbd": cluster.site.dbd_port, "slurmctld": cluster.site.ctld_port}[name]
            until(lambda port=port: answers(port), 30, f"{name} answers")  # type: ignore[misc]


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def on_node(on: OnSlurm, node: str, *command: object) -> None:
    """Run a command in a node's namespaces."""
    if on.cluster.site.isolation == "none":
        lacking("without namespaces nodes have no mounts of their own")
    argv = [*nodes.entering(on.cluster.site, on.cluster.processes[f"node.{node}"]), *map(str, command)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode and command[0] == "mount":
        lacking(f"nothing can be mounted on {node}: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr


# --------------------------------------------------------------------------------------------------- faults of the work


def test_what_would_happen_again_is_stopped_named_and_shown_with_its_last_lines(
    on: OnSlurm, small_memory: Path
) -> None:
    """The machine's memory (Linux kills, in a control group), Python's and the GPU's; NaN; a sudden death."""
    faults: dict[str, tuple[dict[str, Any], str, str, str]] = {
        "killed": ({"fail": "oom", "cgroup": small_memory}, "out-of-memory", ": killed because", "taking memory"),
        "python": ({"fail": "memory"}, "out-of-memory", "out of memory of the machine n", "MemoryError"),
        "gpu": ({"fail": "gpu-memory"}, "out-of-memory", "out of GPU memory: CUDA", "OutOfMemoryError"),
        "nan": ({"fail": "diverge"}, "diverged", "step 3: loss is nan", "step 3: loss is nan"),
        "dies": ({"fail": "exit"}, "crashed", "exit code 7", "the last words"),
    }
    stages = [(name, (), {"until": 8, "fail_at": 3, **fault[0]}) for name, fault in faults.items()]
    record = on.plan(*stages, ("reader", ("nan",), {}))
    on.submit(record)
    assert on.finish(record) == dict.fromkeys(faults, "failed") | {"reader": "stopped"}
    for name, (_, exit_class, message, last_line) in faults.items():
        found = told(on, record)[name]
        assert (found.exit_class, found.step) == (exit_class, 2), found
        assert message in found.message and "\n" not in found.message
        assert last_line in found.tail[-1]
        assert len(on.lives(name)) == 1, "not requeued"


def test_a_full_disk_leaves_the_last_checkpoint_and_with_room_the_run_goes_on(on: OnSlurm) -> None:
    on.profile = replace(on.profile, sbatch={"nodelist": "n2"})
    record = on.plan(("a", (), {"until": 6, "heavy": 600_000}), ("b", ("a",), {}))
    saves = store.partial_dir(on.root, record.stage("a").spec.artifact) / "progress"
    saves.mkdir(parents=True)
    on_node(on, "n2", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", saves)
    try:
        on.submit(record)
        assert on.finish(record) == {"a": "failed", "b": "stopped"}
        found = told(on, record)["a"]
        assert found.exit_class == "storage" and "No space left on device; free some room" in found.message
        on_node(on, "n2", "mount", "-o", "remount,size=16m", saves)
        assert list(on.submit(record)) == ["a", "b"]
        assert on.finish(record) == {"a": "done", "b": "done"}
    finally:
        here = store.partial_dir(on.root, record.stage("a").spec.artifact)
        whole = on.root / record.stage("a").spec.artifact
        on_node(on, "n2", "umount", "--lazy", (whole if whole.exists() else here) / "progress")
    assert "from step 1" in on.log(on.lives()[-1])


def test_an_artifact_that_a_node_sees_late_is_waited_for(on: OnSlurm) -> None:
    """As with NFS's attribute cache: on n2 an empty folder hides the artifact, which is whole."""
    record = on.plan(("a", (), {}))
    on.submit(record)
    assert on.finish(record) == {"a": "done"}
    on.profile = replace(on.profile, sbatch={"nodelist": "n2"})
    record = on.plan(("a", (), {}), ("b", ("a",), {}), ("never", ("a",), {}))
    patient = limited(on, record, Limits(hang_s=30.0, save_s=5.0, visibility_s=60.0))
    artifact = on.root / record.stage("a").spec.artifact
    (on.root / "empty").mkdir()
    on_node(on, "n2", "mount", "--bind", on.root / "empty", artifact)
    try:
        # One stage may wait, the other may not.
        mixed = replace(record, stages=(record.stages[0], patient.stages[1], record.stages[2]))
        on.submit(mixed)
        until(lambda: told(on, mixed)["never"].state == "failed", 60.0, "the end of a stage that does not wait")
        assert f"{artifact}: input a is not whole" in told(on, mixed)["never"].message
        until(lambda: told(on, mixed)["b"].state == "running", 30.0, "a stage that waits")
    finally:
        on_node(on, "n2", "umount", artifact)
    assert on.finish(mixed)["b"] == "done"


def test_a_job_cancelled_while_it_waits_for_another_life_stays_cancelled(on: OnSlurm) -> None:
    record = on.plan(("a", (), {"until": 8, "fail_at": 5, "fail": "kill", "once": 1}), ("b", ("a",), {}))
    job = on.submit(record)["a"]
    until(lambda: state(on.cluster, job) == "PENDING" and len(on.lives()) == 1, 60.0, "a job that waits again")
    on.cluster.call("scancel", job)
    assert on.finish(record) == {"a": "stopped", "b": "stopped"}
    found = told(on, record)["a"]
    assert found.exit_class == "cancelled" and found.message == f"job {job} ended as CANCELLED"
    assert list(on.submit(record)) == ["a", "b"]
    assert on.finish(record) == {"a": "done", "b": "done"}
    assert "from step 4" in on.log(on.lives()[-1])


# ----------------------------------------------------------------------------------------------- faults of Slurm itself


def test_a_controller_that_is_silent_while_submitting(
    on: OnSlurm, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    """sbatch gives up, the controller takes its job in all the same: the next run finds it and submits the rest."""
    record = on.plan(("a", (), LONG), ("b", ("a",), {}))
    look = slurm.own_scripts
    with stopped(on.cluster, "slurmctld"):
        with pytest.raises(slurm.NoAnswer, match="the controller does not answer"):
            on.submit(record)
        assert read_submitted(on.root, "run") == []
        monkeypatch.setattr(slurm, "own_scripts", dict)  # it answered just before
        with pytest.raises(
            slurm.NoAnswer, match="job.sbatch: sbatch: the controller does not answer.*found and joined"
        ):
            on.submit(record)
    monkeypatch.setattr(slurm, "own_scripts", look)
    script = str(store.stage_dir(on.root, "run", "a") / "job.sbatch")
    until(lambda: bool(look().get(script)), 30.0, "the controller takes in what sbatch had sent")
    assert list(on.submit(record)) == ["b"]
    (lost,) = look()[script]
    assert [(s.stage, s.job) for s in read_submitted(on.root, "run")][0] == ("a", lost)
    assert on.submit(record) == {}
    assert on.finish(record) == {"a": "done", "b": "done"}
    assert {life.partition(".")[0] for life in on.lives()} == {lost}


def test_daemons_that_die_while_a_run_is_watched(on: OnSlurm, prism: Prism, impatient: None) -> None:
    """Neither slurmctld nor slurmdbd: states come from the files, the work goes on, and so does who watches it."""
    record = on.plan(("a", (), {**LONG, "until": 300}), ("b", ("a",), {}))
    write_run(on.root, record)
    on.submit(record)
    on.await_step(record, 3)
    seen: list[Any] = []
    watcher = threading.Thread(target=lambda: seen.append(watch_run(on.root, record, asking(on, record), 0.5)))
    watcher.start()
    with killed(on.cluster, "slurmctld", "slurmdbd"):
        step = on.step(record)
        with pytest.raises(slurm.NoAnswer):
            stage_jobs(on.root, record)
        done = prism("status", "run", "--root", str(on.root), "--json", SLURM_CONF=str(on.cluster.slurm_conf))
        assert done.returncode == 0 and "does not answer" in done.stderr, done.stderr
        assert '"state": "running"' in done.stdout
        on.await_step(record, step + 5)
        assert watcher.is_alive()
    assert on.finish(record) == {"a": "done", "b": "done"}
    assert len(on.lives()) == 1
    watcher.join(60)
    assert not watcher.is_alive() and seen
    on.cluster.await_idle()


def asking(on: OnSlurm, record: RunRecord) -> Callable[..., Any]:
    return lambda *known: stage_jobs(on.root, record)


@contextmanager
def short_memory(cluster: DevCluster) -> Iterator[None]:
    """A controller that forgets ended jobs within seconds."""
    before = cluster.slurm_conf.read_text()
    cluster.slurm_conf.write_text(before.replace("MinJobAge=300", "MinJobAge=2"))
    assert cluster.slurm_conf.read_text() != before
    cluster.call("scontrol", "reconfigure")
    try:
        yield
    finally:
        cluster.slurm_conf.write_text(before)
        cluster.call("scontrol", "reconfigure")


def test_jobs_that_nobody_remembers(on: OnSlurm, tmp_path: Path) -> None:
    """Aged out of the controller, no accounting, the run's folder moved: receipts and attempts tell all the same.

    `afterok` on a job that failed and was forgotten holds: the stage that reads it must not take that for success.
    """
    fails = {"until": 5, "fail_at": 3, "fail": "user"}
    record = on.plan(("good", (), {}), ("bad", (), fails), ("reader", ("bad",), {}))
    jobs = on.submit(record)
    assert on.finish(record) == {"good": "done", "bad": "failed", "reader": "stopped"}
    with short_memory(on.cluster):
        until(lambda: not any(slurm.show_job(j) for j in jobs.values()), 90.0, "the controller forgets the jobs")
        with killed(on.cluster, "slurmdbd"):
            known = stage_jobs(on.root, record)
            assert {j.state for j in known.values()} == {"GONE"}
            states = on.states(record)
            assert (states["good"], states["bad"]) == ("done", "failed")
            assert told(on, record)["bad"].message == "data.jsonl:3: not text; mend it"
            script = store.stage_dir(on.root, "run", "reader") / "job.sbatch"
            taken: list[str] = []

            def is_taken() -> bool:
                with contextlib.suppress(WorldError):  # for some seconds Slurm calls this a dependency problem
                    taken.append(slurm.submit(str(script), f"--dependency=afterok:{jobs['bad']}"))
                return bool(taken)

            until(is_taken, 60.0, "a dependency on a job that is forgotten")
            (late,) = taken
            until(lambda: bool(on.lives("reader")) and ended(on, "reader"), 60.0, "the reader's end")
            assert (
                "input bad is not whole; `prism-launch run` makes it anew" in on.end(f"{late}.0", "reader")["message"]
            )
            again = on.submit(record)
            assert list(again) == ["bad", "reader"]
    on.finish(record)
    moved = on.root.rename(tmp_path / "elsewhere")
    states = {s.stage: s for s in stage_states(moved, record)}
    assert (states["good"].state, states["bad"].state) == ("done", "failed")
    assert states["bad"].tail and states["bad"].log and Path(states["bad"].log).is_relative_to(moved)
    on.cluster.await_idle()


def ended(on: OnSlurm, stage: str) -> bool:
    return all(a.end is not None for a, _ in attempts(on.root, "run", stage))


# ----------------------------------------------------------------------------------------------------------------- soak


@pytest.mark.soak
def test_a_rank_that_dies_while_the_controller_is_dead_is_requeued_later(on: OnSlurm) -> None:
    """Slurm needs more than a minute after that until the job may start again."""
    record = on.plan(("a", (), LONG))
    on.submit(record)
    on.await_step(record, 3)
    with killed(on.cluster, "slurmctld"):
        os.kill(worker(on, record, "a"), signal.SIGKILL)
        until(lambda: ended(on, "a"), 30.0, "the end of the first life")
    assert on.finish(record, 300.0) == {"a": "done"}
    assert len(on.lives()) == 2 and "from step 0" not in on.log(on.lives()[1])
    on.cluster.await_idle()


def worker(on: OnSlurm, record: RunRecord, stage: str) -> int:
    """The process of a stage's rank 0; nodes share this machine's process ids."""
    attempt = newest_attempt(on.root, record.stage(stage).spec)
    assert attempt is not None
    return int(store.read_json(attempt.folder / "heartbeat.count.0.json")["pid"])


@pytest.mark.soak
@pytest.mark.parametrize("repetition", range(3))
def test_recovery_times(on: OnSlurm, repetition: int) -> None:
    """Prints how long each fault keeps a stage from its next step; the table in docs/clusters.md has them."""
    plain = {"until": 60, "sleep": 0.1}
    fails = {**plain, "fail_at": 20, "once": 1}
    stages = {"rank": {**fails, "fail": "kill"}, "hang": {**fails, "fail": "hang"}, "limit": plain, "supervisor": plain}
    record = on.plan(*((name, (), options) for name, options in stages.items()))
    record = limited(on, record, Limits(hang_s=6.0, save_s=5.0))
    jobs = on.submit(record)
    for name, signalled in (("limit", "USR2"), ("supervisor", "KILL")):
        on.await_step(record, 20, name)
        on.cluster.call("scancel", f"--signal={signalled}", "--batch", jobs[name])
    until(lambda: told(on, record)["supervisor"].state in ("failed", "interrupted"), 30.0, "the job's end")
    on.submit(record)
    assert set(on.finish(record).values()) == {"done"}
    for name in stages:
        print(f"recovery: {name}: {recovery_s(on, name):.1f} s")
        assert int(on.log(on.lives(name)[1], name).split("from step ")[1].split()[0]) >= 19


def recovery_s(on: OnSlurm, stage: str) -> float:
    """Seconds from the last step of a stage's first life to the start of the processes of its second."""
    first, second = (store.stage_dir(on.root, "run", stage) / life for life in on.lives(stage))
    events = [json.loads(line) for line in (second / "events.jsonl").read_text().splitlines()]
    launched: float = next(e["time"] for e in events if e["event"] == "launched")
    return launched - (first / "heartbeat.count.0.json").stat().st_mtime
