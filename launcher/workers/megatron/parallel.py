"""Process groups: torch's and megatron-core's, for as long as a stage runs."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from launcher.configs import Parallelism
from launcher.progress import Stopped
from launcher.workers import devices
from launcher.workers.megatron import cpu_mode

#: One process.
ALONE = Parallelism()
#: Seconds that a collective waits at least. NCCL's own ten minutes are less than a slow file system takes for a save.
_COLLECTIVE_S = 3600.0


@contextlib.contextmanager
def process_groups(
    parallelism: Parallelism = ALONE, rank: int = 0, world_size: int = 1, seed: int = 0, hang_s: float = 1800.0
) -> Iterator[None]:
    """Join the other ranks, at MASTER_ADDR and MASTER_PORT where there are any, and seed megatron-core's generators.

    Where one of several ranks fails, its groups stay: to leave them waits for the others, who wait for it, and why it
    failed must be told first. A collective waits longer than `hang_s`, so that the supervisor, who can tell whose
    fault a hang is, sees it first, and no slow save is cut off.
    """
    _join(rank, world_size, timedelta(seconds=collective_s(hang_s)))
    try:
        parallel_state.initialize_model_parallel(
            parallelism.tensor_model_parallel_size,
            parallelism.pipeline_model_parallel_size,
            context_parallel_size=parallelism.context_parallel_size,
            distributed_timeout_minutes=math.ceil(collective_s(hang_s) / 60),
        )
        model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        yield
    except BaseException as error:
        if world_size == 1 or isinstance(error, Stopped):  # all stop at the same step
            _leave()
        raise
    _leave()


def collective_s(hang_s: float) -> float:
    """Seconds that a collective waits for its ranks."""
    return max(_COLLECTIVE_S, 2 * hang_s)


def _join(rank: int, world_size: int, timeout: timedelta) -> None:
    store = dist.HashStore() if world_size == 1 else None
    options: dict[str, Any] = {"store": store, "rank": rank, "world_size": world_size, "timeout": timeout}
    if cpu_mode.active():
        # Two threads on two busy cores wait for each other; and sums differ with their number.
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
        dist.init_process_group("gloo", **options)
    else:
        # Every collective finds its device here. Bound by `device_id`, each group would be split off the first one's
        # communicator, which made pipelines of 70B slower for others (NVIDIA-NeMo/RL, pull request 3073).
        torch.cuda.set_device(devices.ordinal(torch.cuda.device_count()))
        dist.init_process_group("nccl", **options)


def _leave() -> None:
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def sum_over_ranks(values: list[float]) -> list[float]:
    """The values summed over all ranks, one by one."""
    if dist.get_world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=torch.cuda.current_device())
    dist.all_reduce(total)
    summed: list[float] = total.tolist()
    return summed
