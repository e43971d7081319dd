"""Stages that fan out, as job arrays on a real Slurm: submitted at once, redone one by one, known by one name."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

from on_slurm import shown
from test_submit import OnSlurm, on

from launcher import slurm
from launcher.attempts import newest_attempt
from launcher.render import render_plan
from launcher.run_record import RunRecord
from launcher.submit import cancel_jobs, read_submitted

__all__ = ["on"]


def fanned_out(record: RunRecord) -> RunRecord:
    """The stages called `sweep.…` as parts of one."""
    parts = (replace(s, part_of="sweep") if s.spec.stage.startswith("sweep.") else s for s in record.stages)
    return replace(record, stages=tuple(parts))


def test_each_element_ends_in_its_own_way_and_what_failed_is_redone_alone(on: OnSlurm) -> None:
    """One finishes, one is at fault, one is killed and requeued; what reads all waits for the array as a whole."""
    names = ["sweep.good.0", "sweep.bad.0", "sweep.killed.0"]
    record = fanned_out(
        on.plan(
            (names[0], (), {}),
            (names[1], (), {"fail_at": 2, "fail": "user", "once": 1}),
            (names[2], (), {"until": 8, "fail_at": 5, "fail": "kill", "once": 1}),
            ("reads-two", (names[0], names[2]), {}),
            ("reads-all", tuple(names), {}),
        )
    )
    jobs = on.submit(record)
    array = jobs[names[0]].partition("_")[0]
    assert [jobs[name] for name in names] == [f"{array}_{i}" for i in range(3)]
    waits = {name: shown(on.cluster, jobs[name])["Dependency"] for name in ("reads-two", "reads-all")}
    assert f"afterok:{array}_*" in waits["reads-all"], waits
    assert f"{array}_0" in waits["reads-two"] and f"{array}_1" not in waits["reads-two"], waits
    assert on.submit(record) == {}  # all are in the queue: joined

    states = on.finish(record)
    wanted = {names[0]: "done", names[1]: "failed", names[2]: "done", "reads-two": "done", "reads-all": "stopped"}
    assert states == wanted
    assert on.lives(names[2]) == [f"{array}_2.0", f"{array}_2.1"], "the element alone was requeued"
    attempt = newest_attempt(on.root, record.stage(names[2]).spec)
    assert attempt is not None and attempt.owner is not None and attempt.owner.job == f"{array}_2"
    known = slurm.show_job(f"{array}_2")
    assert known is not None and (known.id, known.restarts) == (f"{array}_2", 1)

    again = on.submit(record)
    assert list(again) == [names[1], "reads-all"] and again[names[1]].endswith("_1"), "its index stays"
    assert on.finish(record) == dict.fromkeys(wanted, "done")
    assert [s.job for s in read_submitted(on.root, "run") if s.stage == names[1]] == [f"{array}_1", again[names[1]]]


def test_arrays_keep_to_the_sites_size_and_are_cancelled_whole(on: OnSlurm) -> None:
    slow = {"until": 400, "sleep": 0.1}
    record = fanned_out(on.plan(*((f"sweep.b{i}.0", (), slow) for i in range(5))))
    on.profile = replace(on.profile, max_array=3, max_array_running=2)
    jobs = list(on.submit(record).values())
    first, second = (job.partition("_")[0] for job in (jobs[0], jobs[3]))
    assert jobs == [f"{first}_0", f"{first}_1", f"{first}_2", f"{second}_0", f"{second}_1"]
    on.await_step(record, 1, "sweep.b0.0")
    states = {job: known.state for job, known in slurm.job_states(jobs).items()}
    assert states[f"{first}_2"] == "PENDING", "two of an array at a time"
    assert cancel_jobs(on.root, record) == [s.spec.stage for s in record.stages]
    assert set(on.finish(record).values()) == {"stopped"}


def test_submit_sh_submits_arrays_by_hand(on: OnSlurm, tmp_path: Path) -> None:
    record = fanned_out(on.plan(("sweep.x.0", (), {}), ("sweep.y.0", (), {}), ("c", ("sweep.x.0", "sweep.y.0"), {})))
    render_plan(record, on.profile, tmp_path / "scripts", on.root)
    done = subprocess.run([tmp_path / "scripts" / "submit.sh"], capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    jobs = {s.stage: s.job for s in read_submitted(on.root, "run")}
    array = jobs["sweep.x.0"].removesuffix("_0")
    assert jobs["sweep.y.0"] == f"{array}_1" and set(jobs) == {"sweep.x.0", "sweep.y.0", "c"}
    assert on.submit(record) == {}
    assert on.finish(record) == dict.fromkeys(jobs, "done")
