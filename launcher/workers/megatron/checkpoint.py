"""Checkpoints in megatron-core's torch_dist format: to resume from, to start from, and the finished artifact.

    progress/checkpoints/iter_NNNNNNN/            model, optimizer, schedule, random state, samples consumed
    progress/checkpoints/iter_NNNNNNN.partial/    one that is being written; renamed when whole and on disk
    progress/checkpoints/latest_checkpointed_iteration.txt

A folder without a suffix is whole, whenever a run was killed; the tracker file, written last, is for other tools.
"""

from __future__ import annotations

import os
import queue
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import nn

from launcher.errors import UserError
from launcher.store import sync_tree, write_atomic
from launcher.workers.megatron.model import SHARDING, sharded_tensors, sharding_metadata

TRACKER = "latest_checkpointed_iteration.txt"
_KEEP = 2
# megatron-core hands results through a process of its own, for asynchronous saves: a second or more to start, and a
# signal to the process group ends it. Here the writer is waited for, so a queue of this process will do.
filesystem_async._results_queue = queue.Queue()

_NAME = re.compile(r"iter_(\d{7,})")


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint to resume from, or None."""
    whole = [p for p in folder.glob("iter_*") if _NAME.fullmatch(p.name)]
    return max(whole, key=_iteration, default=None)


def _iteration(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def save_progress(folder: Path, iteration: int, model: nn.Module, optimizer: Any, scheduler: Any) -> Path:
    """Write what a later attempt resumes from; all ranks call it. Returns the checkpoint's folder."""
    sharded = _progress_state(model, optimizer, scheduler, loading=False)
    path = folder / f"iter_{iteration:07d}"
    _write(sharded, path.with_name(f"{path.name}.partial"))
    if dist.get_rank() == 0:
        os.replace(path.with_name(f"{path.name}.partial"), path)
        write_atomic(folder / TRACKER, str(iteration))
        _prune(folder)
    dist.barrier()
    return path


def load_progress(path: Path, model: nn.Module, optimizer: Any, scheduler: Any) -> int:
    """Put everything back as it was when the checkpoint was written; returns its iteration."""
    state = dist_checkpointing.load(_progress_state(model, optimizer, scheduler, loading=True), str(path))
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    torch.set_rng_state(state["random"]["torch"])
    torch.cuda.set_rng_state(state["random"]["cuda"])
    get_cuda_rng_tracker().set_states(state["random"]["tracker"])
    return _iteration(path)


def _progress_state(model: nn.Module, optimizer: Any, scheduler: Any, loading: bool) -> dict[str, Any]:
    metadata = sharding_metadata()
    sharded = model.sharded_state_dict(metadata=metadata)
    return {
        "model": sharded,
        "optimizer": optimizer.sharded_state_dict(sharded, is_loading=loading, metadata=metadata),
        "scheduler": scheduler.state_dict(),
        "random": _random_state(),
    }


def _random_state() -> ShardedObject:
    """The state of every generator: one of each pipeline and tensor-parallel rank, the same over data-parallel ones."""
    state = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    pipeline, tensor = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    sizes = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return ShardedObject("random", state, sizes, (pipeline, tensor), replica_id=replica)


def _write(sharded: dict[str, Any], path: Path) -> None:
    """Write a sharded state dict into a fresh folder and push it to disk; all ranks call it."""
    if dist.get_rank() == 0:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(sharded, str(path), content_metadata=dict(SHARDING))
    if dist.get_rank() == 0:
        sync_tree(path)


def _prune(folder: Path) -> None:
    """Remove what a killed attempt left behind and all but the newest whole checkpoints."""
    whole = sorted((p for p in folder.glob("iter_*") if _NAME.fullmatch(p.name)), key=_iteration)
    for path in whole[:-_KEEP]:
        os.replace(path, path.with_name(f"{path.name}.gone"))  # a half-removed one must not look whole
    for path in folder.glob("iter_*.*"):
        shutil.rmtree(path, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------- weights alone


def save_weights(folder: Path, iteration: int, model: nn.Module) -> None:
    """Write the finished checkpoint into the port's folder: weights alone, and the tracker; all ranks call it."""
    sharded = model.sharded_state_dict(metadata=sharding_metadata())
    sharded |= {"iteration": iteration, "checkpoint_version": 3.0}
    _write(sharded, folder / f"iter_{iteration:07d}")
    if dist.get_rank() == 0:
        write_atomic(folder / TRACKER, str(iteration))


def load_weights(folder: Path, model: nn.Module) -> None:
    """Fill the model from a checkpoint of format `megatron`, whatever layout wrote it.

    Every parameter must be there: only Transformer Engine's `_extra_state` may be missing, and a vocabulary without
    its padding is padded. Raises UserError where the checkpoint does not fit.
    """
    path = _weights_dir(folder)
    _check_tensors(path, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    sharded = model.sharded_state_dict(metadata=sharding_metadata())
    names = set(sharded)
    state, _, _ = dist_checkpointing.load(sharded, str(path), strict="return_all")
    model.load_state_dict({k: v for k, v in state.items() if k in names})


def _check_tensors(path: Path, model: nn.Module) -> None:
    there = dist_checkpointing.load_tensors_metadata(str(path))
    problems = []
    for wanted in {piece.key: piece for piece in sharded_tensors(model)}.values():
        found = there.get(wanted.key)
        if found is None:
            problems.append(f"{path}: the checkpoint lacks {wanted.key} {list(wanted.global_shape)}")
        elif found.global_shape != wanted.global_shape and not wanted.allow_shape_mismatch:
            problems.append(
                f"{path}: {wanted.key} is {list(found.global_shape)}, the model wants {list(wanted.global_shape)}"
            )
    if problems:
        raise UserError(problems)


def _weights_dir(folder: Path) -> Path:
    try:
        text = (folder / TRACKER).read_text().strip()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{folder}: no {TRACKER}; is it a checkpoint of format megatron?") from None
    if text != "release" and not text.isdecimal():
        raise UserError(f"{folder / TRACKER}: says {text[:40]!r}; a number of steps or `release` is expected")
    path = folder / (text if text == "release" else f"iter_{int(text):07d}")
    if not (path / ".metadata").is_file():
        raise UserError(f"{path}: named by {TRACKER}, but no torch_dist checkpoint is there")
    return path
