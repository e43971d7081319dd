"""The worker of a `train` stage: next-token training with megatron-core, from random weights or a checkpoint."""

from __future__ import annotations

from launcher.progress import StageJob, run_worker
from launcher.workers.devices import require_cuda


def main(job: StageJob) -> None:
    """Train the stage's model and leave a finished checkpoint in the port `checkpoint`."""
    # Late, so that an absent library is reported as the stage's failure, and the processes that write
    # checkpoints, which import this module too, start at once.
    require_cuda()
    from launcher.convert.folders import check_beside
    from launcher.workers.megatron.stage import train

    if job.rank == 0 and "checkpoint" in job.spec.inputs:
        for note in check_beside(job.input("checkpoint")):
            print(f"checkpoint: {note}", flush=True)
    train(job)


if __name__ == "__main__":
    run_worker(main)
