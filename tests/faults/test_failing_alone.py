"""A rank that fails alone tells why before anything that waits for the other ranks."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
import types
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from launcher import store
from launcher.progress import Stopped
from launcher.supervisor.faults import gpu_fault

REPOSITORY = Path(__file__).resolve().parents[2]
STAGE = REPOSITORY / "tests" / "data" / "stage.json"
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["launcher.workers.megatron.parallel"])


class OutOfMemoryError(RuntimeError):
    """Named as torch's is."""


@pytest.mark.parametrize(
    ("error", "exit_class"),
    [
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out-of-memory"),
        (RuntimeError("CUDA Error: out of memory"), "out-of-memory"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "out-of-memory"),
        (ValueError("no such thing"), "crashed"),
    ],
)
def test_the_exit_file_is_there_before_groups_are_left(tmp_path: Path, error: Exception, exit_class: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [_PROCESSES.Process(target=_rank, args=(tmp_path, rank, port, error)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    try:
        said = _wait_for(tmp_path / "exit.main.1.json")
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    assert said["class"] == exit_class, said
    assert "traceback" in said
    assert not (tmp_path / "left-first").exists()
    assert gpu_fault(said["message"]) is None, "no node is to blame"


def _wait_for(path: Path, seconds: float = 120.0) -> dict[str, Any]:
    for _ in range(int(seconds / 0.1)):
        if (found := store.read_json(path)) is not None:
            return dict(found)
        time.sleep(0.1)
    raise AssertionError(f"{path.name} was not written")


def _rank(folder: Path, rank: int, port: str, error: Exception) -> None:
    """Rank 1 fails; rank 0 is in a collective that rank 1 never joins."""
    import torch.distributed as dist

    from launcher.configs import Parallelism
    from launcher.progress import run_worker
    from launcher.workers.megatron import parallel

    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.update(PRISM_ROOT=str(folder), PRISM_ATTEMPT_DIR=str(folder))
    for module, name in ((dist, "destroy_process_group"), (parallel.parallel_state, "destroy_model_parallel")):
        setattr(module, name, partial(_leave, folder, rank))
    sys.argv = ["worker", str(STAGE)]

    def main(job: Any) -> None:
        with parallel.process_groups(Parallelism(), rank, 2):
            if rank:
                raise error
            parallel.sum_over_ranks([1.0])

    run_worker(main)


def _leave(folder: Path, rank: int) -> None:
    """As NCCL's does, it waits for the kernels that are queued."""
    if not (folder / f"exit.main.{rank}.json").exists():
        (folder / "left-first").touch()
    time.sleep(600)


def test_a_collective_waits_longer_than_a_hang_lasts() -> None:
    from launcher.workers.megatron.parallel import collective_s

    assert collective_s(1800.0) > 1800.0
    assert collective_s(7200.0) > 7200.0
    assert collective_s(5.0) >= 1800.0, "a slow save is no hang"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What process groups of GPUs are made with, and whether they were left; none is made."""
    import torch

    from launcher.workers.megatron import parallel

    found: dict[str, Any] = {"left": False}
    monkeypatch.setattr(parallel, "cpu_mode", types.SimpleNamespace(active=lambda: False))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: found.update(device=device))
    monkeypatch.setattr(parallel.dist, "init_process_group", lambda backend, **o: found.update(o, backend=backend))
    groups = lambda *_, **options: found.update(options)  # noqa: E731
    monkeypatch.setattr(parallel.parallel_state, "initialize_model_parallel", groups)
    monkeypatch.setattr(parallel, "model_parallel_cuda_manual_seed", lambda *_, **__: None)
    monkeypatch.setattr(parallel, "_leave", lambda: found.update(left=True))
    monkeypatch.setenv("LOCAL_RANK", "5")
    return found


def test_every_group_waits_as_long_on_a_gpu_and_has_its_ranks_device(asked: dict[str, Any]) -> None:
    from launcher.workers.megatron import parallel

    with parallel.process_groups(rank=13, world_size=16, hang_s=7200.0):
        pass
    assert (asked["backend"], asked["device"], asked["rank"]) == ("nccl", 5, 13)
    assert asked["timeout"].total_seconds() == asked["distributed_timeout_minutes"] * 60 > 7200.0
    assert asked["left"]


@pytest.mark.parametrize(
    ("error", "ranks", "left"),
    [(Stopped("asked"), 16, True), (ValueError(), 16, False), (KeyboardInterrupt(), 2, False), (ValueError(), 1, True)],
)
def test_ranks_leave_where_all_end_alike(asked: dict[str, Any], error: BaseException, ranks: int, left: bool) -> None:
    from launcher.workers.megatron import parallel

    with pytest.raises(type(error)), parallel.process_groups(world_size=ranks):
        raise error
    assert asked["left"] is left
