"""Checkpoints: to resume from, in files of this project's own; the finished one, in megatron-core's torch_dist format.

    progress/checkpoints/iter_NNNNNNN/            master weights, moments, schedule with the samples consumed
        00000.bin                                 what rank 0 holds of them (`shares`); a file a rank
        progress.json                             what the files hold, by parameter; written last
    progress/checkpoints/iter_NNNNNNN.partial/    one that is being written; renamed when whole and on disk
    progress/checkpoints/latest_checkpointed_iteration.txt

A folder without a suffix is whole, whenever a run was killed; the tracker file, written last, is for other tools.
There is no random state: training draws no random numbers (no dropout, and the order of data depends on the seed
alone), so a run goes on with the same losses, on another parallel layout too. Nothing is gathered, no process is
forked, and weights that are trained are not written beside their masters, of which they are the rounded copy.
"""

from __future__ import annotations

import json
import os
import pickle
import queue
import re
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from launcher.convert.metadata import read_metadata
from launcher.errors import UserError, WorldError
from launcher.store import sync_tree, write_atomic
from launcher.workers.megatron import shares
from launcher.workers.megatron.model import SHARDING, sharded_tensors, sharding_metadata
from launcher.workers.megatron.parallel import sum_over_ranks
from launcher.workers.megatron.versions import ASYNC_SAVE

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
    from megatron.core.dist_checkpointing.strategies.base import LoadShardedStrategy

TRACKER = "latest_checkpointed_iteration.txt"
# megatron-core hands results through a process of its own: a second or more to start, and a signal to the process group
# ends it. Here this process writes, so a queue of this process will do.
filesystem_async._results_queue = queue.Queue()

_NAME = re.compile(r"iter_(\d{7,})")
#: Seconds between looks at whether all ranks have written: no collective waits for a slow disk longer than that.
_LOOK_S = 1.0


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint to resume from, or None, as this node sees the folder."""
    whole = [p for p in folder.glob("iter_*") if _NAME.fullmatch(p.name)]
    return max(whole, key=_iteration, default=None)


def newest_for_all(folder: Path) -> Path | None:
    """The newest whole checkpoint, the same on every rank; all ranks call it.

    Rank 0's word: on a network file system others may not see yet what it sees, and would go on from another one.
    """
    found = newest(folder) if dist.get_rank() == 0 else None
    [iteration] = sum_over_ranks([0.0 if found is None else float(_iteration(found))])
    return folder / f"iter_{int(iteration):07d}" if iteration else None


def _iteration(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


@dataclass
class Saver:
    """Writes what a later attempt resumes from, beside the training that goes on; all ranks call it alike.

    `start` copies what this rank holds and returns; a thread writes the copy; `finish` gives the checkpoint its name
    once every rank's thread has ended (`is_written`), and raises, on every rank, what a thread of any could not do.
    The memory of the first copy is kept for those that follow: none of them can find it gone. `waiting` is called once
    a second for as long as a disk is waited for.
    """

    folder: Path
    model: nn.Module
    optimizer: ChainedOptimizer
    scheduler: OptimizerParamScheduler
    keep_last: int
    keep_every: int | None
    waiting: Callable[[], object] = lambda: None
    pending: _Pending | None = None
    room: Sequence[Tensor] = ()
    removing: threading.Thread | None = None

    def start(self, iteration: int) -> None:
        """Begin to write the checkpoint of an iteration; one that is under way is finished first."""
        self.finish()
        while self.removing is not None and self.removing.is_alive():
            self.removing.join(_LOOK_S)
            self.waiting()
        path = self.folder / f"iter_{iteration:07d}.partial"
        _make_fresh(path)
        content = shares.copy(self.model, self.optimizer, self.room)
        self.room = content.chunks
        plans = _gather(content.plan)
        about = {"version": shares.VERSION, "iteration": iteration, "scheduler": self.scheduler.state_dict()}
        self.pending = _Pending(path, content.chunks, about, plans)

    @property
    def is_written(self) -> bool:
        """Whether this rank's part of a checkpoint is written and not yet finished."""
        return self.pending is not None and not self.pending.thread.is_alive()

    def finish(self) -> None:
        """Wait for the checkpoint that is under way, if any, and give it its name."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        _wait_for_all(pending.thread, self.waiting)
        _agree(pending.path, pending.thread.error)
        naming = _Work(lambda: self._name(pending) if dist.get_rank() == 0 else None)
        _wait_for_all(naming, self.waiting)
        _agree(pending.path, naming.error)

    def _name(self, pending: _Pending) -> None:
        path, index = pending.path, shares.merge([json.loads(plan) for plan in pending.plans])
        (path / shares.INDEX).write_text(json.dumps(pending.about | index), encoding="utf-8")
        sync_tree(path)
        os.replace(path, path.with_suffix(""))
        write_atomic(self.folder / TRACKER, str(pending.about["iteration"]))
        retired = _retire(self.folder, self.keep_last, self.keep_every)
        # Not waited for before the next checkpoint begins: on a parallel file system each file takes a while.
        self.removing = threading.Thread(target=_remove, args=(retired,))
        self.removing.start()


class _Work(threading.Thread):
    """A thread that begins at once and keeps what it raised."""

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.work = work
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Work, and keep whatever goes wrong: whoever waits for the thread raises it."""
        try:
            self.work()
        except BaseException as error:
            self.error = error


class _Pending:
    """A checkpoint under way: what its index will say, and the thread that writes this rank's file."""

    def __init__(self, path: Path, chunks: Sequence[Tensor], about: dict[str, Any], plans: list[str]) -> None:
        self.path, self.about, self.plans = path, about, plans
        self.thread = _Work(lambda: write_share(path / shares.file_name(dist.get_rank()), chunks))


def write_share(path: Path, chunks: Sequence[Tensor]) -> None:
    """Write one rank's file and push it to disk; nothing where the rank holds nothing."""
    if not chunks:
        return
    with path.open("wb", buffering=0) as file:
        for chunk in chunks:
            left = memoryview(chunk.numpy())
            while left:
                left = left[file.write(left) :]
        os.fsync(file.fileno())


def _wait_for_all(thread: threading.Thread, while_waiting: Callable[[], object]) -> None:
    """Wait until every rank's thread has ended; calls `while_waiting` at each look.

    Ranks ask each other once a second, so that none sits in a collective for as long as the slowest disk takes: NCCL
    and gloo would give up after ten minutes or half an hour.
    """
    waiting = True
    while waiting:
        thread.join(_LOOK_S)
        while_waiting()
        waiting = sum_over_ranks([float(thread.is_alive())])[0] > 0


def _agree(path: Path, error: BaseException | None) -> None:
    """Go on where no rank has failed; else raise on all of them, and leave nothing half written."""
    failed = _failed(error)
    if failed is None:
        return
    if dist.get_rank() == 0:
        shutil.rmtree(path, ignore_errors=True)  # on a full disk the run's own words need room
    code, words = failed
    if code is not None:
        raise OSError(code, f"the checkpoint was not written: {words}", str(path)) from error
    raise WorldError(f"{path}: the checkpoint was not written: {words}") from error


def _failed(error: BaseException | None) -> tuple[int | None, str] | None:
    """What went wrong on the first rank where something did, with the number of an OSError; all ranks call it."""
    if not sum_over_ranks([float(error is not None)])[0]:
        return None
    mine = None
    if error is not None:
        words = error.strerror if isinstance(error, OSError) else str(error)
        words = words if isinstance(error, OSError | UserError) else f"{type(error).__name__}: {words}"
        mine = getattr(error, "errno", None), f"{words} (rank {dist.get_rank()} on {socket.gethostname()})"
    said: list[tuple[int | None, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(said, mine)
    return next(one for one in said if one)


def _gather(plan: dict[str, Any]) -> list[str]:
    """What every rank says, as JSON, on rank 0; nothing on others."""
    if dist.get_world_size() == 1:
        return [json.dumps(plan)]
    text, device = json.dumps(plan).encode(), torch.cuda.current_device()
    longest = torch.tensor([len(text)], device=device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    mine = torch.frombuffer(bytearray(text.ljust(int(longest))), dtype=torch.uint8).to(device)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
    dist.gather(mine, found)
    return [bytes(one.cpu().numpy()).decode() for one in found or ()]


def load_progress(path: Path, model: nn.Module, optimizer: ChainedOptimizer, scheduler: OptimizerParamScheduler) -> int:
    """Put everything back as it was when the checkpoint was written; returns its iteration.

    A rank reads its own share and no other's: weights that are trained are rounded from the masters and exchanged as
    after any step, others are exchanged too. Raises UserError for progress that does not fit.
    """
    sharded = model.sharded_state_dict(metadata=sharding_metadata())
    error: Exception | None = None
    try:
        index = _read(path, model, sharded, optimizer)
    except (UserError, OSError) as found:
        error = found
    failed = _failed(error)  # what one rank cannot read ends all: none waits for it in a collective
    if error is not None:
        raise error
    if failed is not None:
        code, words = failed
        raise UserError(words) if code is None else OSError(code, f"not read: {words}", str(path))
    shares.exchange_frozen(sharded)
    _exchange_trained(optimizer.chained_optimizers)
    scheduler.load_state_dict(index["scheduler"])
    return _iteration(path)


def _read(path: Path, model: nn.Module, sharded: dict[str, Any], optimizer: ChainedOptimizer) -> dict[str, Any]:
    """Read this rank's share into the live tensors; returns the index."""
    with shares.Files(path) as files:
        for part in optimizer.chained_optimizers:
            _allocate(part, files.index["step"])
        held = [*shares.trained(sharded, optimizer), *shares.frozen(sharded)]
        if problems := files.problems(held):
            raise UserError(problems)
        for share in held:
            files.fill(share)
        kept = {name: files.object(value.unique_key) for name, value in shares.objects(sharded)}
    model.load_state_dict({name: value for name, value in kept.items() if value is not None}, strict=False)
    return files.index


def _allocate(part: DistributedOptimizer, step: int) -> None:
    """Make room for the moments, as megatron-core does before it loads them, and note the steps taken."""
    groups = [{k: v for k, v in g.items() if k != "params"} | {"step": step} for g in part.optimizer.param_groups]
    part.load_state_dict({"optimizer": {"param_groups": groups}})
    for state in part.optimizer.state.values():
        if "step" in state:  # torch's Adam would count up one tensor once for each parameter that shares it
            state["step"] = state["step"].clone()


def _exchange_trained(parts: Sequence[DistributedOptimizer]) -> None:
    """Let weights be what their masters say, on all data-parallel ranks: the end of every optimizer step."""
    for part in parts:
        part._copy_main_params_to_model_params()
    for chunk in {id(chunk): chunk for part in parts for chunk in part.model_chunks}.values():
        chunk.start_param_sync(force_sync=True)


def _write(sharded: dict[str, Any], path: Path, waiting: Callable[[], object] = lambda: None) -> None:
    """Write a sharded state dict into a fresh folder and push it to disk; all ranks call it.

    Data-parallel ranks, which hold the same weights, write a part each.
    """
    _make_fresh(path)
    strategy, group = get_default_save_sharded_strategy(), sharding_metadata()["dp_cp_group"]
    try:
        request = dist_checkpointing.save(
            sharded,
            str(path),
            FullyParallelSaveStrategyWrapper(strategy, group) if group.size() > 1 else strategy,
            async_sharded_save=True,
            content_metadata=dict(SHARDING),
            **ASYNC_SAVE,
        )
        _carry_out(request, waiting)
        for finalize in request.finalize_fns:
            finalize()
    except CheckpointException as error:
        raise _not_written(path, error) from None
    if dist.get_rank() == 0:
        sync_tree(path)


def _carry_out(request: AsyncRequest, waiting: Callable[[], object]) -> None:
    """Write what megatron-core has prepared, in this process: it would fork processes, and wait for one that has died.

    What could not be written comes out, on all ranks, as it finishes the checkpoint.
    """
    work = None
    if request.async_fn is not None:
        transforms, (_, _, results) = request.async_fn.args[0], request.async_fn_args
        buckets = request.preload_fn()
        work = _Work(lambda: results.put(_written(transforms, buckets)))
    work = work or _Work(lambda: None)
    _wait_for_all(work, waiting)
    if work.error is not None:
        raise work.error


def _written(transforms: list[Any], buckets: list[Any]) -> dict[int, Any] | Exception:
    done: dict[int, Any] = {}
    for number, bucket in enumerate(buckets):
        said: queue.Queue[Any] = queue.Queue()
        counted: queue.Queue[int] = queue.Queue()
        counted.put(number)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            transforms, number, bucket, said, counted, use_fsync=True
        )
        found = said.get_nowait()[1]
        if isinstance(found, Exception):
            return found
        done[number] = found
    return done


def _make_fresh(path: Path) -> None:
    error: OSError | None = None
    if dist.get_rank() == 0:
        try:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
        except OSError as found:
            error = found
    _agree(path, error)


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


def _retire(folder: Path, keep_last: int, keep_every: int | None) -> list[Path]:
    """Take the names of all whole checkpoints but the newest and those of every so often; returns what can be removed.

    That is also what a killed attempt left behind.
    """
    whole = sorted((p for p in folder.glob("iter_*") if _NAME.fullmatch(p.name)), key=_iteration)
    for path in (p for p in whole[:-keep_last] if not keep_every or _iteration(p) % keep_every):
        os.replace(path, path.with_name(f".{path.name}.gone"))  # a half-removed one must not look whole
    return [*folder.glob("iter_*.*"), *folder.glob(".iter_*.gone")]


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------- weights alone


def save_weights(folder: Path, iteration: int, model: nn.Module, waiting: Callable[[], object] = lambda: None) -> None:
    """Write the finished checkpoint into the port's folder: weights alone, and the tracker; all ranks call it.

    `waiting` is called as a `Saver` does.
    """
    sharded = model.sharded_state_dict(metadata=sharding_metadata())
    sharded |= {"iteration": iteration, "checkpoint_version": 3.0}
    _write(sharded, folder / f"iter_{iteration:07d}", waiting)
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
        state, _, _ = dist_checkpointing.load(tensors, str(path), _reading(path), strict="return_all")
    except pickle.UnpicklingError as error:  # of common.pt, where others keep their arguments; nothing in it is needed
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise UserError(
            f"{path / 'common.pt'}: refused: it names {named[1] if named else 'more than plain values'}; convert the "
            "checkpoint to hf and back, which leaves that file out"
        ) from None
    model.load_state_dict({k: v for k, v in state.items() if k in names} | dict.fromkeys(objects))


def _reading(path: Path) -> LoadShardedStrategy:
    """How weights are read: data-parallel ranks, which need the same, read a part each and exchange them."""
    strategy, group = get_default_load_sharded_strategy(str(path)), sharding_metadata()["dp_cp_group"]
    return FullyParallelLoadStrategyWrapper(strategy, group) if group.size() > 1 else strategy


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
