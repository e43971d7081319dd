"""Process groups: torch's and megatron-core's, for as long as a stage runs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from launcher.configs import Parallelism
from launcher.workers.megatron import cpu_mode

#: One process.
ALONE = Parallelism()


@contextlib.contextmanager
def process_groups(
    parallelism: Parallelism = ALONE, rank: int = 0, world_size: int = 1, seed: int = 0
) -> Iterator[None]:
    """Join the other ranks, at MASTER_ADDR and MASTER_PORT where there are any, and seed megatron-core's generators."""
    if cpu_mode.active():
        # Two threads on two busy cores wait for each other; and sums differ with their number.
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
    else:
        # A task that Slurm binds to one GPU sees that alone, as number 0.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    store = dist.HashStore() if world_size == 1 else None
    dist.init_process_group("gloo" if cpu_mode.active() else "nccl", store=store, rank=rank, world_size=world_size)
    try:
        parallel_state.initialize_model_parallel(
            parallelism.tensor_model_parallel_size,
            parallelism.pipeline_model_parallel_size,
            context_parallel_size=parallelism.context_parallel_size,
        )
        model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def sum_over_ranks(values: list[float]) -> list[float]:
    """The values summed over all ranks, one by one."""
    if dist.get_world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=torch.cuda.current_device())
    dist.all_reduce(total)
    return total.tolist()
