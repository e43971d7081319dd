"""merge: a linear combination of checkpoints, verified."""

from __future__ import annotations

import os
import sys

from launcher.configs import MergeConfig
from launcher.progress import StageJob, run_worker
from launcher.workers.convert import beating, emptied


def main(job: StageJob) -> None:
    """Fill the port `checkpoint`, and record the verification."""
    from launcher.convert.merge import merge

    config: MergeConfig = job.config(MergeConfig)
    sources = [job.input(ref) for ref in config.checkpoints]
    found = merge(sources, config.weights, emptied(job), config.verify, beating(job))
    for note in found["notes"]:
        print(f"warning: {note}", file=sys.stderr)
    for name in found["not_finite"]:
        print(f"warning: {name} holds nan or infinity, which is kept", file=sys.stderr)
    job.record(verification=found)


if __name__ == "__main__":
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # see launcher.convert.__main__
    run_worker(main)
