"""The jobs of a stage: one, or a chain of them, each after the one before (`limits.continuation: chain`).

Whatever reads the stage waits for the last one; those that find it made end at once, and those that find that it has
failed for good fail in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Protocol, TypeVar

from launcher import slurm
from launcher.attempts import newest_attempt
from launcher.errors import WorldError
from launcher.slurm import Job
from launcher.spec import Limits, StageSpec


class Line(Protocol):
    """A line of jobs.jsonl: a job, and the first one of its chain."""

    @property
    def job(self) -> str:
        """The job's id."""

    @property
    def chain(self) -> str | None:
        """The id of the chain's first job; None where there is no chain."""


L = TypeVar("L", bound=Line)


def job_count(limits: Limits) -> int:
    """How many jobs a stage is submitted as."""
    return limits.chain_jobs if limits.continuation == "chain" else 1


def submit_links(
    script: str,
    limits: Limits,
    after: Sequence[str],
    write_down: Callable[[str, str | None], None],
    known: Set[str] = frozenset(),
    before: Sequence[str] = (),
) -> str:
    """Submit a stage's jobs and write each down, with its chain, as soon as it is there; returns the last one's id.

    `known` are jobs that were submitted for the run already, `before` those of this chain among them. Raises WorldError
    with what sbatch said; then none of the jobs that this call submitted is left.
    """
    jobs = list(before)
    count = job_count(limits)
    while len(jobs) < count:
        try:
            jobs.append(slurm.submit(script, *dependency(after, jobs[-1:]), known={*known, *jobs}))
        except WorldError:
            slurm.cancel(jobs[len(before) :])
            raise
        write_down(jobs[-1], jobs[0] if count > 1 else None)
    return jobs[-1]


def dependency(after: Sequence[str], before: Sequence[str] = ()) -> list[str]:
    """sbatch's option for a job after others that must succeed, and after those before it, however they end."""
    # Every link names the inputs' jobs too: the one before may have been cancelled because those failed.
    conditions = [*([f"afterok:{':'.join(after)}"] if after else []), *(f"afterany:{job}" for job in before)]
    return [f"--dependency={','.join(conditions)}"] if conditions else []


def newest_links(lines: Iterable[L]) -> list[L]:
    """Of the lines of one stage those of its newest submission, in order."""
    known = list(lines)
    chain = known[-1].chain if known else None
    return known[-1:] if chain is None else [line for line in known if line.chain == chain]


def link_that_counts(root: Path, spec: StageSpec, jobs: Sequence[str], known: Mapping[str, Job]) -> Job:
    """The job of a chain that tells how its stage is doing.

    It is the one that has failed for good; else the one that runs; else the next one in the queue; else the last that
    ran. A job that nothing knows any more stands as state GONE.
    """
    there = [known.get(job) or Job(job, "GONE") for job in jobs]
    if len(there) == 1:
        return there[0]
    attempt = newest_attempt(root, spec)
    tried = [job for job in there if attempt is not None and job.id == attempt.job]
    failed = tried if attempt is not None and attempt.end and attempt.end.action == "stop" else []
    waiting = [job for job in there if job.is_active]
    running = [job for job in waiting if job.state != "PENDING"]
    return next(iter([*failed, *running[-1:], *waiting, *tried, there[-1]]))
