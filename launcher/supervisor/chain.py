"""A stage as several jobs, each after the one before, where a site does not put jobs back into its queue.

The submitting side writes one line a link into ROOT/runs/RUN/jobs.jsonl; all links carry the first one's id as `chain`.
"""

from __future__ import annotations

import time
from pathlib import Path

from launcher import store
from launcher.attempts import Attempt, attempts_at
from launcher.spec import StageSpec
from launcher.submitted import read_submitted

#: The line of a job stands there as soon as sbatch has answered, which may be after the job's start.
_WRITTEN_S = 10.0


def read_links(root: Path, spec: StageSpec, job: str) -> tuple[str, ...]:
    """The jobs of the chain that `job` is part of, in order; the job alone where nothing is known of it."""
    end = time.monotonic() + _WRITTEN_S
    while True:
        known = [line for line in read_submitted(root, spec.run) if line.stage == spec.stage]
        chain = next((line.chain for line in known if line.job == job), None)
        if chain is not None:
            return tuple(line.job for line in known if line.chain == chain)
        if time.monotonic() > end:
            return (job,)
        time.sleep(0.2)


def is_over(root: Path, spec: StageSpec, job: str) -> tuple[int, str] | None:
    """Exit code and reason where a link has nothing to do: the stage is made, or has failed for good in an earlier one.

    The jobs that read the stage wait for its last link, so that must fail as the stage did.
    """
    if store.read_receipt(root, spec.artifact) is not None:
        return 0, "made by an earlier job of the chain"
    earlier = [life for life in attempts_at(root, spec) if is_of(life, read_links(root, spec, job))]
    last = earlier[-1].end if earlier else None
    if last is None or last.action != "stop":
        return None
    return 1, f"{earlier[-1].name} has failed for good: {last.exit_class}: {last.message}"


def is_of(life: Attempt, jobs: tuple[str, ...]) -> bool:
    """Whether an attempt is a life of one of these jobs."""
    return life.job in jobs
