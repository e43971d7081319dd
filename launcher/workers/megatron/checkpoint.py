"""Checkpoints in megatron-core's torch_dist format: to resume from, to start from, and the finished artifact.

    progress/checkpoints/iter_NNNNNNN/            model, optimizer, schedule with the samples consumed
    progress/checkpoints/iter_NNNNNNN.partial/    one that is being written; renamed when whole and on disk
    progress/checkpoints/latest_checkpointed_iteration.txt

A folder without a suffix is whole, whenever a run was killed; the tracker file, written last, is for other tools.
There is no random state: training draws no random numbers (no dropout, and the order of data depends on the seed
alone), so a run goes on with the same losses, on another parallel layout too.
"""

from __future__ import annotations

import os
import pickle
import queue
import re
import shutil
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from launcher.convert.metadata import read_metadata
from launcher.errors import UserError, WorldError
from launcher.store import sync_tree, write_atomic
from launcher.workers.megatron.model import SHARDING, sharded_tensors, sharding_metadata
from launcher.workers.megatron.versions import ASYNC_SAVE

TRACKER = "latest_checkpointed_iteration.txt"
# megatron-core hands results through a process of its own: a second or more to start, and a signal to the process group
# ends it. Here a thread of this process writes, so a queue of this process will do.
filesystem_async._results_queue = queue.Queue()

_NAME = re.compile(r"iter_(\d{7,})")


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint to resume from, or None."""
    whole = [p for p in folder.glob("iter_*") if _NAME.fullmatch(p.name)]
    return max(whole, key=_iteration, default=None)


def _iteration(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


@dataclass
class Saver:
    """Writes what a later attempt resumes from, beside the training that goes on; all ranks call it alike.

    `start` copies what there is and returns; a thread writes the copy; `finish` gives the checkpoint its name once
    every rank's thread has ended (`is_written`), and raises what a thread could not do.
    """

    folder: Path
    model: nn.Module
    optimizer: Any
    scheduler: Any
    keep_last: int
    keep_every: int | None
    pending: _Pending | None = None

    def start(self, iteration: int) -> None:
        """Begin to write the checkpoint of an iteration; one that is under way is finished first."""
        self.finish()
        sharded = _progress_state(self.model, self.optimizer, self.scheduler, loading=False)
        path = self.folder / f"iter_{iteration:07d}.partial"
        _make_fresh(path)
        request = dist_checkpointing.save(
            sharded, str(path), async_sharded_save=True, content_metadata=dict(SHARDING), **ASYNC_SAVE
        )
        self.pending = _Pending(iteration, path, request, _storages(self.model, self.optimizer))
        self.pending.start()

    @property
    def is_written(self) -> bool:
        """Whether this rank's part of a checkpoint is written and not yet finished."""
        return self.pending is not None and not self.pending.thread.is_alive()

    def finish(self) -> None:
        """Wait for the checkpoint that is under way, if any, and give it its name."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        try:
            pending.join()
        except CheckpointException as error:
            raise _not_written(pending.path, error) from None
        if dist.get_rank() == 0:
            sync_tree(pending.path)
            os.replace(pending.path, pending.path.with_suffix(""))
            write_atomic(self.folder / TRACKER, str(pending.iteration))
            _prune(self.folder, self.keep_last, self.keep_every)
        dist.barrier()


class _Pending:
    """A checkpoint under way: megatron-core's request, and the thread that carries it out on a copy of the tensors."""

    def __init__(self, iteration: int, path: Path, request: Any, alive: set[int]) -> None:
        self.iteration, self.path, self.request = iteration, path, request
        self.error: BaseException | None = None
        arguments = list(request.async_fn_args)
        if request.preload_fn is not None:
            arguments[1] = _own(request.preload_fn(), alive)
        self.thread = threading.Thread(target=self._write, args=arguments, daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self.thread.start()

    def _write(self, *arguments: Any) -> None:
        try:
            if self.request.async_fn is not None:
                self.request.async_fn(*arguments, **self.request.async_fn_kwargs)
        except BaseException as error:
            self.error = error

    def join(self) -> None:
        """Wait for every rank's writer, then let megatron-core write what describes the whole."""
        self.thread.join()
        if self.error is not None:
            raise self.error
        dist.barrier()
        for finalize in self.request.finalize_fns:
            finalize()


def _storages(model: nn.Module, optimizer: Any) -> set[int]:
    """Where the weights and the optimizer's tensors lie in memory: what training goes on to change."""
    alive: list[Any] = [*model.parameters(), *model.buffers()]
    for part in optimizer.chained_optimizers:
        alive += [p for group in part.optimizer.param_groups for p in group["params"]]
        alive += [value for state in part.optimizer.state.values() for value in state.values()]
    return {t.untyped_storage().data_ptr() for t in alive if isinstance(t, torch.Tensor)}


def _own(buckets: list[Any], alive: set[int]) -> list[Any]:
    """The tensors to write, copied where they are living ones.

    megatron-core 0.16.1 has copies already of what was on a GPU, of views, as weights are of their buffer, and of the
    optimizer's tensors, which it gathers; another version may not.
    """

    def own(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone() if tensor.untyped_storage().data_ptr() in alive else tensor

    return [
        (name, key, (data, [(item, own(tensor)) for item, tensor in tensors])) for name, key, (data, tensors) in buckets
    ]


def load_progress(path: Path, model: nn.Module, optimizer: Any, scheduler: Any) -> int:
    """Put everything back as it was when the checkpoint was written; returns its iteration."""
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.Adam):
            _ready_to_load(part)
    state = dist_checkpointing.load(_progress_state(model, optimizer, scheduler, loading=True), str(path))
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    return _iteration(path)


def _ready_to_load(part: DistributedOptimizer) -> None:
    """Let megatron-core load into torch's Adam, which stands in where Transformer Engine and Apex are not.

    In 0.16.1 it takes Adam's state to be there already, misses `step` among what it loads for each parameter, and
    gives all parameters one tensor `step`, which each of them would then count up.
    """
    adam, put = part.optimizer, part._set_main_param_and_optimizer_states
    for group in adam.param_groups:
        for parameter in group["params"]:
            adam.state[parameter] = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            adam.state[parameter]["step"] = torch.tensor(0.0)

    def put_with_step(parameter: nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, place = part.model_param_group_index_map[parameter]
        state = adam.state[adam.param_groups[group]["params"][place]]
        state["step"] = state["step"].clone()
        put(parameter, {**tensors, "step": state["step"]})

    part._set_main_param_and_optimizer_states = put_with_step


def _progress_state(model: nn.Module, optimizer: Any, scheduler: Any, loading: bool) -> dict[str, Any]:
    metadata = sharding_metadata()
    sharded = model.sharded_state_dict(metadata=metadata)
    return {
        "model": sharded,
        "optimizer": optimizer.sharded_state_dict(sharded, is_loading=loading, metadata=metadata),
        "scheduler": scheduler.state_dict(),
    }


def _write(sharded: dict[str, Any], path: Path) -> None:
    """Write a sharded state dict into a fresh folder and push it to disk; all ranks call it."""
    _make_fresh(path)
    try:
        dist_checkpointing.save(sharded, str(path), content_metadata=dict(SHARDING))
    except CheckpointException as error:
        raise _not_written(path, error) from None
    if dist.get_rank() == 0:
        sync_tree(path)


def _make_fresh(path: Path) -> None:
    if dist.get_rank() == 0:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    dist.barrier()


def _not_written(path: Path, error: CheckpointException) -> Exception:
    """Why a checkpoint could not be written: torch says on a full disk no more than that a position is unexpected."""
    try:
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(bytes(1 << 20))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as found:
        shutil.rmtree(path, ignore_errors=True)  # the run's own words need room too
        return OSError(found.errno, f"the checkpoint was not written: {found.strerror}", str(path))
    return WorldError(f"{path}: the checkpoint was not written: {str(error).strip().splitlines()[-1]}")


def _prune(folder: Path, keep_last: int, keep_every: int | None) -> None:
    """Remove what a killed attempt left behind and all whole checkpoints but the newest and those of every so often."""
    whole = sorted((p for p in folder.glob("iter_*") if _NAME.fullmatch(p.name)), key=_iteration)
    for path in (p for p in whole[:-keep_last] if not keep_every or _iteration(p) % keep_every):
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
    # Objects are pickles, which torch would load without a look. What is there are `_extra_state`s, empty but for fp8.
    objects = {name for name, value in sharded.items() if isinstance(value, ShardedObject)}
    tensors = {name: value for name, value in sharded.items() if name not in objects}
    names = set(tensors)
    try:
        state, _, _ = dist_checkpointing.load(tensors, str(path), strict="return_all")
    except pickle.UnpicklingError as error:  # of common.pt, where others keep their arguments; nothing in it is needed
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise UserError(
            f"{path / 'common.pt'}: refused: it names {named[1] if named else 'more than plain values'}; convert the "
            "checkpoint to hf and back, which leaves that file out"
        ) from None
    model.load_state_dict({k: v for k, v in state.items() if k in names} | dict.fromkeys(objects))


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
        text = (folder / TRACKER).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{folder}: no {TRACKER}; is it a checkpoint of format megatron?") from None
    if text != "release" and not text.isdecimal():
        raise UserError(f"{folder / TRACKER}: says {text[:40]!r}; a number of steps or `release` is expected")
    path = folder / (text if text == "release" else f"iter_{int(text):07d}")
    if not (path / ".metadata").is_file():
        raise UserError(f"{path}: named by {TRACKER}, but no torch_dist checkpoint is there")
    read_metadata(path / ".metadata")  # refuses what torch would unpickle without a look
    return path
