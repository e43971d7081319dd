"""Looking at a run on a real Slurm: status, watch, logs, the hook, clean, through a requeue and a failure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from on_slurm import CHECKOUT, Prism
from test_submit import OnSlurm, on  # noqa: F401  (a fixture)

from launcher import slurm
from launcher.costs import cost_of, lives_of, queue_seconds
from launcher.run_record import RunRecord, write_run
from launcher.submit import read_submitted, stage_jobs
from launcher.watch import watch_run

HEAR = "import sys; open(sys.argv[1], 'a').write(sys.stdin.read())"


def hooked(record: RunRecord, path: Path) -> RunRecord:
    """Every stage tells a file, in one write a change."""
    argv = (sys.executable, "-c", HEAR, str(path))
    return replace(record, stages=tuple(replace(s, spec=replace(s.spec, notify=argv)) for s in record.stages))


def heard(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Any]:
    """Starts `prism-launch ARGS…` beside the test; ends what is left of it."""
    started: list[subprocess.Popen[str]] = []

    def start(*args: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "launcher.cli", *args]
        env = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, env=env, text=True, cwd=tmp_path, **pipes))  # type: ignore[call-overload]
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_run_is_watched_through_a_requeue_and_a_failure(
    on: OnSlurm,  # noqa: F811
    prism: Prism,
    begin: Any,
    tmp_path: Path,
) -> None:
    told = tmp_path / "told"
    slow, failing = {"until": 60, "sleep": 0.1, "save": 10_000}, {"fail_at": 2, "fail": "user"}
    record = on.plan(("a", (), slow), ("b", ("a",), failing), ("c", ("b",), {}), gpus_per_node=2)
    profile = tmp_path / "often.yaml"  # as dev, but looked at every second
    profile.write_text((on.cluster.slurm_conf.parent.parent / "dev.yaml").read_text() + "\npoll_s: 1\n")
    record = hooked(replace(record, cluster=str(profile)), told)
    write_run(on.root, record)
    root = ("--root", str(on.root))
    running = begin("resume", "run", "--json", *root)
    submitted = json.loads(running.stdout.readline())
    jobs = submitted["jobs"]
    assert submitted["event"] == "submitted" and list(jobs) == ["a", "b", "c"]
    watching, following = begin("watch", *root), begin("logs", "a", "-f", *root)
    on.await_step(record, 5)

    def look(*args: str) -> Any:
        done = prism(*args, *root)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    now = look("status", "--json")
    a, b, c = now["stages"]
    assert (now["state"], a["state"], b["state"], c["state"]) == ("running", "running", "queued", "queued")
    assert (a["job"], a["job_state"], a["attempt"]) == (jobs["a"], "RUNNING", f"{jobs['a']}.0")
    assert a["nodes"].startswith("n") and 0 < a["limit_left_seconds"] <= 3600 and a["left_seconds"] > 0
    assert a["gpu_hours"] > 0 and now["gpu_hours"] == a["gpu_hours"] and now["trouble"] is None
    assert b["reason"] == f"job {jobs['b']} waits for the stages it reads"
    cleaned = look("clean", "--artifacts", "--json")
    assert cleaned["removed"] == cleaned["held"] == []
    assert "still in use" in prism("clean", "run", "--forget", *root).stderr
    # What Slurm does before the limit.
    on.cluster.call("scancel", "--signal=USR2", "--batch", jobs["a"])
    assert on.finish(record) == {"a": "done", "b": "failed", "c": "stopped"}
    assert on.lives() == [f"{jobs['a']}.0", f"{jobs['a']}.1"]

    out, err = running.communicate(timeout=60)
    assert running.returncode == 1, err
    lines = [json.loads(line) for line in out.splitlines()]
    states: dict[str, list[str]] = {"a": [], "b": [], "c": []}
    for line in lines:
        if line["event"] == "stage" and states[line["stage"]][-1:] != [line["state"]]:
            states[line["stage"]].append(line["state"])
    assert states["a"][-4:] == ["running", "queued", "running", "done"]
    assert states["b"][-1] == "failed" and states["c"][-1] == "stopped" and lines[-1]["event"] == "end"
    assert "data.jsonl:3: not text; mend it" in err  # the end of the failed stage's log
    out, err = watching.communicate(timeout=60)
    assert watching.returncode == 1, err
    assert f"a: started ({jobs['a']}.0, job {jobs['a']} on n" in out and "b: failed: user-error: data.jsonl:3" in out
    assert "c: stopped: cancelled" in out
    out, err = following.communicate(timeout=60)
    assert out.splitlines()[0] == "from step 0" and out.splitlines()[-1] != "from step 0" and err.count("==>") == 2
    assert "from step" in out.splitlines()[-1]

    changes = [(t["stage"], t["old_state"], t["new_state"], t["exit_class"]) for t in heard(told)]
    a_told = [change[1:] for change in changes if change[0] == "a"]
    assert a_told == [
        ("queued", "running", None),
        ("running", "queued", "time-limit"),
        ("queued", "running", None),
        ("running", "done", "finished"),
    ]
    assert [c[1:] for c in changes if c[0] == "b"] == [("queued", "running", None), ("running", "failed", "user-error")]
    # It never started: told by `resume` or by `watch`, once.
    assert [c[1:] for c in changes if c[0] == "c"] == [("queued", "stopped", "cancelled")]
    log = prism("logs", "a", "--component", "supervisor", *root).stdout
    assert "a: time-limit" in log and "a: finished" in log  # both lives

    lives = lives_of(on.root, record.stages[0], 0.0, running=False)
    cost = cost_of(lives, record.stages[0])
    assert cost.classes == {"time-limit": 1, "finished": 1} and cost.gpus == 2 and cost.lost_seconds == 0
    waited = queue_seconds(lives, {s.job: s.time for s in read_submitted(on.root, "run")}, 0.0)
    assert waited is not None and waited > lives[1].started - lives[0].ended > 0
    assert cost.seconds < lives[1].ended - lives[0].started  # the wait between them is nobody's GPU-hours
    assert prism("clean", "run", "--forget", *root).returncode == 0


def test_a_look_is_one_question_to_a_real_controller(on: OnSlurm, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    asked: list[str] = []
    real = slurm.call

    def call(*argv: str, timeout: float = 10.0) -> slurm.Answer:
        asked.append(argv[0])
        return real(*argv, timeout=timeout)

    record = on.plan(*((name, (), {"until": 20, "sleep": 0.1}) for name in "abcd"))
    on.submit(record)
    monkeypatch.setattr(slurm, "call", call)
    looks: list[int] = []
    answers = [stage_jobs(on.root, record)]

    def ask(ended: Any) -> Any:
        looks.append(len(asked))
        answers.append(stage_jobs(on.root, record, ended, answers[-1]))
        return answers[-1]

    assert watch_run(on.root, record, ask, 0.5).state == "done"
    each = [asked[i:j] for i, j in zip(looks, [*looks[1:], len(asked)], strict=True)]
    assert len(each) > 2 and all(questions in (["squeue"], ["squeue", "sacct"], []) for questions in each)
