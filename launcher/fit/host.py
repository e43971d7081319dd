"""What training needs of a node beside its GPUs: memory of the host, and time to save before a limit. Pure.

A checkpoint to resume from is written by every rank: its share of the optimizer's states and of the weights, copied
into pinned memory and written from there; a run that goes on reads as much.
"""

from __future__ import annotations

from launcher.fit.layers import Architecture, rank_parameters
from launcher.fit.memory import Layout

#: Bytes of a process before it saves: Python, the libraries of torch and CUDA, batches. Taken; not measured on a GPU.
_PROCESS = 3e9
#: torch rounds each piece of pinned memory up to a power of two and keeps it: half as much again on average.
_ROUNDING = 1.5
#: Bytes a second that a node is taken to write; a shared file system may give less.
NODE_RATE = 1e9


def save_bytes(parameters: float, shards: int, width: int = 2) -> float:
    """Bytes that a rank holds on the host while it saves, or reads when it resumes.

    `parameters` are those of its model shard, `shards` the ranks that share their states: data times context parallel
    size. `width` is the bytes of a weight: 2 with fp32 master weights and two moments, 4 with the moments alone.
    """
    return (checkpoint_bytes(1, width) / shards + width) * parameters


def checkpoint_bytes(parameters: float, width: int = 2) -> float:
    """Bytes on disk of a checkpoint to resume from."""
    return (width + (12 if width == 2 else 8)) * parameters


def node_bytes(a: Architecture, layout: Layout, ranks: int) -> float:
    """The most that `ranks` processes of a node hold on the host, while they save."""
    parameters = max(rank_parameters(a, layout.tp, layout.pp, stage) for stage in range(layout.pp))
    shards = layout.dp * layout.cp if layout.distributed_optimizer else 1
    return ranks * (_PROCESS + _ROUNDING * save_bytes(parameters, shards, layout.width))


def stop_seconds(parameters: float, layout: Layout, ranks: int, step_seconds: float) -> float:
    """Seconds from a request to stop to a whole checkpoint, on nodes of `ranks` processes.

    The step that runs ends first, and so does the checkpoint that is being written.
    """
    nodes = max(1, layout.gpus // ranks)
    return step_seconds + 2 * checkpoint_bytes(parameters, layout.width) / (nodes * NODE_RATE)
