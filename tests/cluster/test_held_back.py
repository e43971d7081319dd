"""What a profile's caps or Slurm's own limit hold back, on a real Slurm; and code that changes after submission."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from on_slurm import CHECKOUT, Prism, until
from test_arrays import fanned_out
from test_submit import OnSlurm, on

from launcher import store
from launcher.caps import read_held, waits_for_room
from launcher.cluster import place_record
from launcher.devcluster.cluster import DevCluster
from launcher.snapshot import with_snapshot
from launcher.state import stage_states
from launcher.submit import cancel_jobs, stage_jobs, submit_held

__all__ = ["on"]


def test_what_a_cap_holds_back_is_said_and_submitted_as_room_comes(on: OnSlurm) -> None:
    record = on.plan(("a", (), {}), ("b", (), {}), ("c", ("a", "b"), {}), ("d", (), {}))
    on.profile = replace(on.profile, max_submit=2)
    assert list(on.submit(record)) == ["a", "b"]
    states = {s.stage: s for s in stage_states(on.root, record, jobs=stage_jobs(on.root, record))}
    assert (states["c"].state, states["d"].state) == ("waiting", "waiting")
    assert states["c"].message == "held back: max_submit 2 reached; `prism-launch run` submits it"
    submitted: dict[str, str] = {}

    def all_in() -> bool:
        submitted.update(submit_held(on.root, record, on.profile))
        return not read_held(on.root, "run")

    until(all_in, 60.0, "room for what was held back")
    assert sorted(submitted) == ["c", "d"]
    assert on.finish(record) == dict.fromkeys("abcd", "done")


def test_what_sbatch_refuses_later_is_noted_and_ends_the_waiting(on: OnSlurm) -> None:
    """The QOS is gone by the time that there is room."""
    record = on.plan(("a", (), {}), ("b", (), {}))
    on.profile = replace(on.profile, max_submit=1)
    assert list(on.submit(record)) == ["a"] and waits_for_room(on.root, "run")
    on.finish(replace(record, stages=record.stages[:1]))
    gone = replace(on.profile, max_submit=None, qos="no-such-qos")
    assert submit_held(on.root, record, gone) == {}
    assert "qos" in read_held(on.root, "run")["b"].lower() and not waits_for_room(on.root, "run")
    assert list(on.submit(record)) == ["b"]
    on.finish(record)


def test_a_rate_counts_calls_and_what_reads_a_failure_is_not_submitted(on: OnSlurm) -> None:
    bad = {"fail_at": 1, "fail": "user"}
    record = fanned_out(
        on.plan(("bad", (), bad), ("sweep.x.0", (), {}), ("sweep.y.0", (), {}), ("c", ("bad",), {}), ("d", (), {}))
    )
    on.profile = replace(on.profile, submit_rate=2)
    assert list(on.submit(record)) == ["bad", "sweep.x.0", "sweep.y.0"], "an array is one call"
    assert "submit_rate 2 a minute" in read_held(on.root, "run")["c"]
    assert submit_held(on.root, record, on.profile) == {}
    until(lambda: on.states(record)["bad"] == "failed", 60.0, "the failure")
    on.profile = replace(on.profile, submit_rate=None)
    assert list(submit_held(on.root, record, on.profile)) == ["d"]
    assert "bad, which it reads, has not been made" in read_held(on.root, "run")["c"]
    on.finish(record)
    assert on.states(record)["c"] == "waiting"


@contextmanager
def limited(cluster: DevCluster, limit: str) -> Iterator[None]:
    """The association of root with the account, limited."""
    name = limit.partition("=")[0]
    where = ("where", "user=root", "account=dev")
    cluster.call("sacctmgr", "--immediate", "modify", "user", "set", limit, *where)
    try:
        yield
    finally:
        cluster.call("sacctmgr", "--immediate", "modify", "user", "set", f"{name}=-1", *where)


def test_where_slurm_takes_no_more_jobs_the_rest_waits(on: OnSlurm) -> None:
    slow = {"until": 400, "sleep": 0.1}
    parts = ((f"sweep.b{i}.0", (), slow) for i in range(3))
    record = fanned_out(on.plan(("a", (), slow), *parts))
    on.profile = replace(on.profile, account="dev")
    with limited(on.cluster, "MaxSubmitJobs=2"):
        assert list(on.submit(record)) == ["a", "sweep.b0.0"]
        assert "Slurm's own limit" in read_held(on.root, "run")["sweep.b2.0"]
    assert list(submit_held(on.root, record, on.profile)) == ["sweep.b1.0", "sweep.b2.0"]
    assert read_held(on.root, "run") == {}
    cancel_jobs(on.root, record)
    on.finish(record)


def test_a_requeued_job_runs_the_code_that_it_was_submitted_with(on: OnSlurm, tmp_path: Path) -> None:
    code = tmp_path / "code"
    shutil.copytree(CHECKOUT / "launcher", code / "launcher", ignore=shutil.ignore_patterns("__pycache__"))
    on.profile = replace(on.profile, code=str(code))
    plan = on.plan(("a", (), {"until": 60, "sleep": 0.1, "save": 10_000}))
    record = place_record(with_snapshot(on.root, plan, on.profile), on.profile, on.root)
    job = on.submit(record)["a"]
    on.await_step(record, 3)
    (code / "launcher" / "supervisor" / "main.py").write_text("raise SystemExit('edited since')\n")
    on.cluster.call("scancel", "--signal=USR2", "--batch", job)
    assert on.finish(record) == {"a": "done"}
    assert on.lives() == [f"{job}.0", f"{job}.1"]
    later = with_snapshot(on.root, plan, on.profile)
    assert later.stages[0].spec.snapshot != record.stages[0].spec.snapshot


_RECIPE = """
name: tiny
stages:
  prepare:
    kind: prepare
    problems: {all: {count: 5}}
    sources: {text: {kind: problems, problems: all}}
"""


def test_the_dev_profile_finds_its_own_slurm(devcluster: DevCluster, prism: Prism, tmp_path: Path) -> None:
    """No SLURM_CONF in the shell: the profile names it, for each command; cancelled before it has run."""
    (tmp_path / "tiny.yaml").write_text(_RECIPE)
    root, profile = str(tmp_path / "root"), str(devcluster.folder / "dev.yaml")
    nowhere = {"SLURM_CONF": str(tmp_path / "no-slurm.conf")}
    hold = ("--set", "resources.time=20:00")
    done = prism("run", str(tmp_path / "tiny.yaml"), "--cluster", profile, "--root", root, "--detach", *hold, **nowhere)
    assert done.returncode == 0 and done.stdout.startswith("prepare: job "), done.stdout + done.stderr
    told = prism("status", "--root", root, "--json", **nowhere)
    assert told.returncode == 0 and told.stderr == "", told.stderr
    assert json.loads(told.stdout)["stages"][0]["state"] in ("queued", "running", "done")
    done = prism("cancel", "--root", root, **nowhere)
    assert done.returncode == 0, done.stderr
    (run,) = (Path(root) / "runs").iterdir()
    (snapshot,) = (run / "snapshot").iterdir()
    facts = json.loads((snapshot / "snapshot.json").read_text())
    assert facts["recipe"]["folder"] == str(tmp_path) and (snapshot / "recipe.yaml").read_text() == _RECIPE
    assert (snapshot / "launcher" / "supervisor" / "main.py").is_file()
    assert store.read_json(run / "run.json")["stages"][0]["spec"]["snapshot"].endswith(snapshot.name)
    spec_env = store.read_json(run / "run.json")["stages"][0]["spec"]["steps"][0]["env"]
    assert spec_env["PYTHONPATH"] == str(snapshot)
