"""Submitting a plan to Slurm: one job a stage, each after those it reads; what is done is skipped, what runs is joined.

ROOT/runs/NAME/jobs.jsonl               every job submitted for the run: stage, fingerprint, job id
ROOT/runs/NAME/stages/STAGE/job.sbatch  the script that was submitted last
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import slurm, store
from launcher.cluster import Profile
from launcher.errors import UserError
from launcher.links import link_that_counts, newest_links, submit_links
from launcher.run_record import PlannedStage, RunRecord, claimed, write_run
from launcher.sbatch import sbatch_text
from launcher.spec import StageSpec, stage_text
from launcher.state import Jobs, stage_states

JOBS = "jobs.jsonl"


@dataclass(frozen=True)
class Submitted:
    """A job of a run; the newest one of a stage counts. `chain`: the first of the jobs that continue each other."""

    stage: str
    fingerprint: str
    job: str
    time: float
    chain: str | None = None


def read_submitted(root: Path, run: str) -> list[Submitted]:
    """Every job that was submitted for a run, the oldest first."""
    path = store.run_dir(root, run) / JOBS
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(Submitted(**json.loads(line)))
        except (ValueError, TypeError):
            continue  # half a line, from a login node that went down
    return found


def stage_jobs(root: Path, record: RunRecord) -> Jobs:
    """The newest job of every stage as Slurm tells it: one squeue, and one sacct for what has left the queue.

    A job that nothing knows any more stands as state GONE.
    """
    links = _newest(root, record)
    known = slurm.job_states(job for jobs in links.values() for job in jobs)
    specs = {s.spec.stage: s.spec for s in record.stages}
    return {stage: link_that_counts(root, specs[stage], jobs, known) for stage, jobs in links.items()}


def _newest(root: Path, record: RunRecord) -> dict[str, list[str]]:
    """The jobs of every stage's newest submission, one or the links of a chain."""
    planned = {s.spec.stage: s.spec.fingerprint for s in record.stages}
    lines: dict[str, list[Submitted]] = {}
    for line in read_submitted(root, record.run):
        if planned.get(line.stage) == line.fingerprint:
            lines.setdefault(line.stage, []).append(line)
    return {stage: [s.job for s in newest_links(of)] for stage, of in lines.items()}


def submit_run(root: Path, record: RunRecord, profile: Profile) -> dict[str, str]:
    """Submit every stage, placed on the cluster, that is neither done nor in the queue; returns this call's job ids.

    Raises UserError where another process is submitting this run or jobs of another plan of it are in the queue, and
    WorldError with what sbatch said; what has been submitted by then stays, and the next call joins it.
    """
    with claimed(root, record.run):
        _refuse_other_plans(root, record)
        write_run(root, record)
        return _submit_stages(root, record, profile)


def _refuse_other_plans(root: Path, record: RunRecord) -> None:
    planned = {s.spec.stage: s.spec.fingerprint for s in record.stages}
    others = [s for s in read_submitted(root, record.run) if planned.get(s.stage) != s.fingerprint]
    known = slurm.job_states(s.job for s in others)
    problems = [
        f"job {s.job}: stage {s.stage} of an earlier plan is {known[s.job].state.lower()}; "
        f"`prism-launch cancel {record.run}` first"
        for s in others
        if s.job in known and known[s.job].is_active
    ]
    if problems:
        raise UserError(problems)


def _submit_stages(root: Path, record: RunRecord, profile: Profile) -> dict[str, str]:
    known = stage_jobs(root, record)
    last = {stage: jobs[-1] for stage, jobs in _newest(root, record).items()}
    # A job may still be completing when its attempt has said how it ended: nothing more comes of that one.
    states = {s.stage: s.state for s in stage_states(root, record, jobs=known)}
    waiting_for: dict[str, str] = {}  # job ids of stages that are not done
    submitted: dict[str, str] = {}
    for stage in record.stages:
        name = stage.spec.stage
        if states[name] == "done":
            continue
        if name in known and states[name] in ("queued", "running"):
            waiting_for[name] = last[name]
            continue
        after = [waiting_for[d] for d in stage.depends if d in waiting_for]
        waiting_for[name] = submitted[name] = _submit_stage(root, stage, profile, after)
    return submitted


def _submit_stage(root: Path, stage: PlannedStage, profile: Profile, after: list[str]) -> str:
    folder = store.stage_dir(root, stage.spec.run, stage.spec.stage)
    store.write_atomic(folder / "stage.json", stage_text(stage.spec))
    script = folder / "job.sbatch"
    store.write_atomic(script, sbatch_text(stage, profile, root))
    return submit_links(
        str(script), stage.spec.limits, after, lambda job, chain: _write_down(root, stage.spec, job, chain)
    )


def _write_down(root: Path, spec: StageSpec, job: str, chain: str | None) -> None:
    facts: dict[str, Any] = {"stage": spec.stage, "fingerprint": spec.fingerprint, "job": job, "time": time.time()}
    with (store.run_dir(root, spec.run) / JOBS).open("a") as file:
        file.write(json.dumps({**facts, **({"chain": chain} if chain else {})}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def cancel_jobs(root: Path, record: RunRecord) -> list[str]:
    """Cancel every job of a run that waits or runs; returns the names of their stages."""
    links = _newest(root, record)
    known = slurm.job_states(job for jobs in links.values() for job in jobs)
    active = {stage: [j for j in jobs if j in known and known[j].is_active] for stage, jobs in links.items()}
    slurm.cancel(job for jobs in active.values() for job in jobs)
    return [stage for stage, jobs in active.items() if jobs]
