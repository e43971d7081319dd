"""Attempts as supervisors and workers would leave them, with times of the test's choice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher import store
from launcher.configs import Resources
from launcher.run_record import RunRecord
from launcher.slurm import Job
from launcher.spec import StageSpec, encode
from launcher.status import RunStatus, run_status
from tests.supervisor.counting import asking, counting_run


def watched_record() -> RunRecord:
    """A run of four stages, of two nodes with four GPUs each."""
    run = counting_run(("a", (), {}), ("b", ("a",), {}), ("c", ("b",), {}), ("d", ("c",), {}))
    resources = Resources(nodes=2, gpus_per_node=4)
    return replace(run, cluster="dev", stages=tuple(asking(s, resources) for s in run.stages))


def watched_status(root: Path, record: RunRecord) -> RunStatus:
    """a has run twice and failed, b is running, c waits in the queue, d has not been submitted."""
    leave_attempt(root, record.stage("a").spec, "12.0", 1000, 1600, "preempted", (1, 40))
    failed = leave_attempt(root, record.stage("a").spec, "12.1", 2000, 2600, "diverged", (41, 60), message="nan\n!")
    (failed / "count.0.log").write_text("".join(f"line {i}\n" for i in range(50)))
    leave_attempt(root, record.stage("b").spec, "13.0", 3000, None, steps=(1, 21))
    jobs = {
        "a": Job("12", "FAILED"),
        "b": Job("13", "RUNNING", nodes="n[1-2]", time_left="1-02:03:04"),
        "c": Job("14", "PENDING", "Dependency"),
    }
    return run_status(root, record, jobs)


def leave_attempt(
    root: Path,
    spec: StageSpec,
    name: str,
    started: float,
    ended: float | None = None,
    exit_class: str = "finished",
    steps: tuple[int, int] | None = None,
    owner: store.Owner | None = None,
    **end: Any,
) -> Path:
    """An attempt that beat at the first and last of `steps`, ten seconds after its start and at its end."""
    folder = store.stage_dir(root, spec.run, spec.stage) / name
    folder.mkdir(parents=True)
    job = name.partition(".")[0] if name[0].isdigit() else None
    owner = owner or store.Owner("elsewhere", "boot", 7, "1", job)
    events: list[dict[str, Any]] = [
        {"time": started, "event": "start", "owner": encode(owner), "fingerprint": spec.fingerprint}
    ]
    if ended is not None:
        facts = {"class": exit_class, "message": "", "action": "stop", "seconds": ended - started - 2, **end}
        events.append({"time": ended, "event": "end", **facts})
    (folder / "events.jsonl").write_text("".join(f"{json.dumps(e)}\n" for e in events))
    if steps is not None:
        beat = {
            "time": ended or started + 110,
            "step": steps[1],
            "total": 100,
            "figures": {"loss": 2.5, "tokens_per_s": 16400.0},
            "first": {"step": steps[0], "time": started + 10},
        }
        (folder / "heartbeat.count.0.json").write_text(json.dumps(beat))
    return folder
