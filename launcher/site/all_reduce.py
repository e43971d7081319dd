"""An all-reduce over all ranks of a step, by NCCL where torch sees GPUs and by gloo where it does not."""

from __future__ import annotations

import os
import time
from datetime import timedelta

from launcher import store
from launcher.site.probe import attempt_dir

_TIMES = 5


def reduce(stage_json: str) -> int:
    """Rank 0 writes backend, size and bus bandwidth as nccl-tests define it: bytes / seconds × 2(n-1)/n."""
    import torch
    import torch.distributed as dist

    rank, ranks = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    local = int(os.environ["SLURM_LOCALID"])
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", local % gpus) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    backend = "nccl" if gpus else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=ranks, timeout=timedelta(seconds=90))
    size = 2**30 if gpus else 2**24
    data = torch.ones(size // 4, device=device)
    dist.all_reduce(data)  # the first one makes the connections
    right = bool((data == ranks).all())
    began = _now(gpus)
    for _ in range(_TIMES):
        dist.all_reduce(data)
    seconds = (_now(gpus) - began) / _TIMES
    if rank == 0:
        bandwidth = size / seconds * 2 * (ranks - 1) / ranks / 1e9
        report = {"backend": backend, "ranks": ranks, "bytes": size, "right": right, "bus_gb_s": bandwidth}
        store.write_json(attempt_dir() / f"{os.environ['PRISM_STEP']}.0.json", report)
    dist.destroy_process_group()
    return 0


def _now(gpus: int) -> float:
    import torch

    if gpus:
        torch.cuda.synchronize()
    return time.monotonic()
