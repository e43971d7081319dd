"""Runs a function on several gloo ranks, a process each, with the trainer's process groups around it."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.configs import Parallelism

_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["launcher.workers.megatron.stage", "torch._dynamo"])


@dataclass(frozen=True)
class Ended:
    """How a rank ended: what the function returned, or what it raised, by class and words; neither where it died."""

    code: int | None
    result: Any = None
    raised: tuple[str, str] | None = None


def layout(tp: int = 1, pp: int = 1, cp: int = 1) -> Parallelism:
    """A parallel layout by short names; sequence-parallel where there is something to split over."""
    return Parallelism(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        sequence_parallel=tp > 1,
    )


def on_ranks(
    ranks: int,
    work: Callable[..., Any],
    folder: Path,
    *arguments: Any,
    parallelism: Parallelism | None = None,
    timeout_s: float | None = None,
    deadline_s: float = 180.0,
) -> list[Ended]:
    """`work(folder, *arguments)` on every rank; collectives give up after `timeout_s`, the test after `deadline_s`.

    Raises AssertionError where a rank has not ended by then: a hang.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    said = [folder / f"said.{port}.{rank}" for rank in range(ranks)]
    processes = [
        _PROCESSES.Process(
            target=_rank,
            args=(rank, ranks, port, said[rank], parallelism or layout(), timeout_s, work, folder, arguments),
        )
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(deadline_s)
    hung = [rank for rank, process in enumerate(processes) if process.exitcode is None]
    for rank in hung:
        processes[rank].kill()
        processes[rank].join()
    assert not hung, f"ranks {hung} had not ended after {deadline_s:g} s"
    return [_ended(process.exitcode, path) for process, path in zip(processes, said, strict=True)]


def results(ended: list[Ended]) -> list[Any]:
    """What the ranks returned; an AssertionError with a rank's trace where one did not."""
    for rank, end in enumerate(ended):
        assert end.raised is None and end.code == 0, f"rank {rank}: {end.raised or end.code}"
    return [end.result for end in ended]


def _ended(code: int | None, path: Path) -> Ended:
    if not path.exists():
        return Ended(code)
    result, raised = pickle.loads(path.read_bytes())
    return Ended(code, result, raised)


def _rank(
    rank: int,
    ranks: int,
    port: int,
    said: Path,
    parallelism: Parallelism,
    timeout_s: float | None,
    work: Callable[..., Any],
    folder: Path,
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    os.dup2(os.open(f"{said}.log", os.O_WRONLY | os.O_CREAT), 2)
    import torch.distributed as dist

    from launcher.workers.megatron.parallel import process_groups

    if timeout_s is not None:
        start = dist.init_process_group
        short = datetime.timedelta(seconds=timeout_s)
        dist.init_process_group = lambda *a, **k: start(*a, **{**k, "timeout": short})
        group = dist.distributed_c10d.new_group
        dist.new_group = dist.distributed_c10d.new_group = lambda *a, **k: group(*a, **{**k, "timeout": short})
    result, raised = None, None
    try:
        with process_groups(parallelism, rank, ranks):
            try:
                result = work(folder, *arguments)
            except BaseException as error:
                raised = type(error).__name__, f"{error}\n{traceback.format_exc()}"
                _say(said, (None, raised))
                os._exit(1)  # the others may be gone
    finally:
        _say(said, (result, raised))


def _say(path: Path, what: Any) -> None:
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_bytes(pickle.dumps(what))
    os.replace(temporary, path)
