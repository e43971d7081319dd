"""A stage as several jobs, each after the one before, where a site does not put jobs back into its queue.

The submitting side writes one line a link into ROOT/runs/RUN/jobs.jsonl; all links carry the first one's id as `chain`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from launcher import store
from launcher.attempts import Attempt, attempts_at
from launcher.spec import StageSpec

#: The line of a job stands there as soon as sbatch has answered, which may be after the job's start.
_WRITTEN_S = 10.0


def read_links(root: Path, spec: StageSpec, job: str) -> tuple[str, ...]:
    """The jobs of the chain that `job` is part of, in order; the job alone where nothing is known of it."""
    end = time.monotonic() + _WRITTEN_S
    while True:
        known = [line for line in _lines(root, spec) if line.get("stage") == spec.stage]
        chain = next((line.get("chain") for line in known if line.get("job") == job), None)
        if chain is not None:
            return tuple(str(line["job"]) for line in known if line.get("chain") == chain)
        if time.monotonic() > end:
            return (job,)
        time.sleep(0.2)


def _lines(root: Path, spec: StageSpec) -> list[dict[str, Any]]:
    path = store.run_dir(root, spec.run) / "jobs.jsonl"
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def is_over(root: Path, spec: StageSpec, job: str) -> tuple[int, str] | None:
    """Exit code and reason where a link has nothing to do: the stage is made, or has failed for good in an earlier one.

    The jobs that read the stage wait for its last link, so that must fail as the stage did.
    """
    if store.read_receipt(root, spec.artifact) is not None:
        return 0, "made by an earlier job of the chain"
    earlier = [life for life in attempts_at(root, spec) if is_of(life, read_links(root, spec, job))]
    last = earlier[-1].end if earlier else None
    if last is None or last.get("action") != "stop":
        return None
    return 1, f"{earlier[-1].name} has failed for good: {last.get('class')}: {last.get('message')}"


def is_of(life: Attempt, jobs: tuple[str, ...]) -> bool:
    """Whether an attempt is a life of one of these jobs."""
    return life.name.partition(".")[0] in jobs
