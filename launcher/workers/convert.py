"""convert: a checkpoint in another format, verified."""

from __future__ import annotations

import shutil

from launcher.configs import ConvertConfig
from launcher.errors import UserError
from launcher.progress import StageJob, Stopped, run_worker

_PAIRS = {("hf", "megatron"), ("megatron", "hf")}


def main(job: StageJob) -> None:
    """Fill the port `checkpoint`, and record the verification."""
    from launcher.convert.conversion import convert

    config: ConvertConfig = job.config(ConvertConfig)
    if (config.source, config.target) not in _PAIRS:
        raise UserError(f"convert: there is no conversion from {config.source} to {config.target}")
    target = job.output("checkpoint")
    shutil.rmtree(target)  # what an attempt that was cut off has left
    target.mkdir()

    def progress(done: int, total: int) -> None:
        if job.stop_requested:
            raise Stopped("stopped before the end; a later attempt starts this stage anew")
        job.beat(done, total)

    job.record(verification=convert(job.input("checkpoint"), target, config.target, config.verify, progress))


if __name__ == "__main__":
    run_worker(main)
