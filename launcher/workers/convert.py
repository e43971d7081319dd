"""convert: a checkpoint in another format, verified."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from launcher.configs import ConvertConfig
from launcher.progress import StageJob, Stopped, run_worker


def main(job: StageJob) -> None:
    """Fill the port `checkpoint`, and record the verification."""
    from launcher.convert.conversion import convert

    config: ConvertConfig = job.config(ConvertConfig)
    target, final = emptied(job), job.root / job.spec.outputs["checkpoint"].path
    assert config.target in ("hf", "megatron", "nemo"), "the plan converts nothing but checkpoints"
    found = convert(job.input("checkpoint"), target, config.target, config.verify, beating(job), final=final)
    for name in found["not_finite"] or ():
        print(f"warning: {name} holds nan or infinity, which is kept", file=sys.stderr)
    job.record(verification=found)


def emptied(job: StageJob) -> Path:
    """The folder of the port `checkpoint`, without what an attempt that was cut off has left."""
    target = job.output("checkpoint")
    shutil.rmtree(target)
    target.mkdir()
    return target


def beating(job: StageJob) -> Callable[[int, int], None]:
    """Tells of bytes done, of those there are, as the stage's heartbeat; raises Stopped when asked to stop."""
    began, last = time.monotonic(), [0.0]

    def progress(done: int, total: int) -> None:
        if job.stop_requested:
            raise Stopped("stopped before the end; a later attempt starts this stage anew")
        now = time.monotonic()
        if now - last[0] > 1 or done == total:
            last[0] = now
            job.beat(done, total, bytes_per_s=round(done / max(now - began, 1e-9)))

    return progress


if __name__ == "__main__":
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # see launcher.convert.__main__
    run_worker(main)
