"""An all-reduce over all ranks of a step, by NCCL where torch sees GPUs and by gloo where it does not."""

from __future__ import annotations

import os
import re
import time
from datetime import timedelta
from typing import Any

from launcher import store
from launcher.site.probe import attempt_dir
from launcher.workers import devices

_TIMES = 5


def reduce(stage_json: str) -> int:
    """Rank 0 writes backend, size and bus bandwidth as nccl-tests define it: bytes / seconds × 2(n-1)/n."""
    import torch
    import torch.distributed as dist

    rank, ranks = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", devices.ordinal(gpus)) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    log = attempt_dir() / f"{os.environ['PRISM_STEP']}.nccl.{rank}.log"
    os.environ |= {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": str(log)}
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
        if gpus:
            report["nccl"] = read_nccl(log.read_text(encoding="utf-8", errors="replace")) if log.exists() else {}
        store.write_json(attempt_dir() / f"{os.environ['PRISM_STEP']}.0.json", report)
    dist.destroy_process_group()
    return 0


def read_nccl(text: str) -> dict[str, Any]:
    """What NCCL says at NCCL_DEBUG=INFO of its way between the nodes and between GPUs.

    `network` is `IB`, `Socket` or a plug-in's name, `devices` what it uses of that, `via` how channels go:
    `NET/IB/GDRDMA` from node to node, `P2P/CUMEM` or `SHM/direct` on one.
    """
    told = re.findall(r"NCCL INFO (?:Using network|Assigned NET plugin) ([^\n]+?)(?: to comm)?\s*$", text, re.MULTILINE)
    used = re.findall(r"NCCL INFO NET/\S+\s*: Using (\[\d+\][^\n;]*)", text)
    names = (name for line in used for name in re.findall(r"\[\d+\](?:\{\d+\}\s*)?([\w.+-]+)", line))
    ways = re.findall(r"NCCL INFO Channel .*? via (\S+)", text)
    via = {re.sub(r"/\d+(?:\(\d+\))?(?=/|$)", "", way) for way in ways}
    return {"network": told[-1] if told else "", "devices": list(dict.fromkeys(names)), "via": sorted(via)}


def _now(gpus: int) -> float:
    import torch

    if gpus:
        torch.cuda.synchronize()
    return time.monotonic()
