"""What a save and a resume take is what `launcher.fit.saving` says, and does not grow with ranks beyond it."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import gloo_ranks as gr
import made_states as ms
import pytest
import torch.distributed as dist

from launcher.configs import Parallelism
from launcher.fit.layers import architecture_of
from launcher.fit.memory import Layout
from launcher.fit.saving import saving_of
from launcher.workers.megatron import checkpoint, shares

COLLECTIVES = (
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "barrier", "broadcast"),
    *("gather", "gather_object", "reduce_scatter_tensor", "scatter", "scatter_object_list", "broadcast_object_list"),
)
#: Of 13 million parameters: what a process takes for other reasons is small beside it.
BIG = ms.Case(
    "llama-tiny",
    bucket_size=1_000_000,
    changes=(("hidden_size", 256), ("intermediate_size", 1024), ("vocab_size", 16384), ("head_dim", 64)),
)


def save(folder: Path, case: ms.Case, parallelism: Parallelism) -> dict[str, Any]:
    """One save and a resume from it: collectives, operations on files below the folder, forks, bytes of this rank's."""
    trainer = ms.build(case, parallelism)
    ms.step(trainer, 1)
    calls, operations = _collectives(), _operations(folder / "saved")
    saver = trainer.saver(folder / "saved")
    saver.start(1)
    assert saver.pending is not None
    saver.pending.thread.join()
    saver.finish()
    saved = {"calls": dict(calls), "operations": dict(operations)}
    path = folder / "saved" / "iter_0000001"
    calls.clear()
    operations.clear()
    trainer.load(path)
    resumed = {"calls": dict(calls), "operations": dict(operations)}
    return {"save": saved, "resume": resumed, "bytes": (path / shares.file_name(dist.get_rank())).stat().st_size}


def _operations(folder: Path) -> Counter[str]:
    """Counts what this process asks of the file system below a folder, and the processes that it starts."""
    counted: Counter[str] = Counter()
    files = ("open", "os.rename", "os.mkdir", "os.listdir", "os.scandir", "os.remove", "os.rmdir")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in files and str(arguments[0]).startswith(str(folder)):
            counted[event] += 1
        elif event in ("os.fork", "os.forkpty", "os.posix_spawn", "subprocess.Popen"):
            counted["fork"] += 1

    sys.addaudithook(hook)
    return counted


def _collectives() -> Counter[str]:
    calls: Counter[str] = Counter()
    for name in COLLECTIVES:
        _count(name, calls)
    return calls


def _count(name: str, calls: Counter[str]) -> None:
    call, inside = getattr(dist, name), list[bool]()

    def counted(*arguments: Any, **named: Any) -> Any:
        calls[name] += not inside  # without CUDA torch hands the call around once
        inside.append(True)
        try:
            return call(*arguments, **named)
        finally:
            inside.pop()

    setattr(dist, name, counted)
    if hasattr(dist.distributed_c10d, name):
        setattr(dist.distributed_c10d, name, counted)


WIDE = ms.Case("llama-tiny", bucket_size=None, changes=(("vocab_size", 2048),))


@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        (ms.Case("llama-tiny", bucket_size=None), {}),
        (WIDE, {}),
        (ms.Case("nemotron-h-tiny", bucket_size=None), {"tp": 2}),
        (ms.Case("llama-tiny", trainable="attention", bucket_size=None), {}),
    ],
    ids=["llama", "a wide vocabulary", "hybrid", "attention"],
)
def test_bytes_files_and_collectives_by_rank(tmp_path: Path, case: ms.Case, sizes: dict[str, int]) -> None:
    layout = gr.layout(**sizes)
    kinds = []
    for ranks in (2, 4, 8):
        folder = tmp_path / str(ranks)
        found = gr.results(gr.on_ranks(ranks, save, folder, case, layout, parallelism=layout))
        path = folder / "saved" / "iter_0000001"
        wanted = saving_of(
            architecture_of(case.shape), Layout(gpus=ranks, tp=sizes.get("tp", 1)), trainable=case.trainable
        )
        written = [one["bytes"] for one in found]
        assert sum(written) == wanted.total_bytes
        # The end of a bucket is padding: its last rank has less, and the others a little more.
        assert max(written) == pytest.approx(wanted.rank_bytes, rel=0.02)
        assert (path / shares.INDEX).stat().st_size < wanted.index_bytes
        assert len(list(path.glob("*.bin"))) + 2 == wanted.files
        assert not [one for one in found if "fork" in one["save"]["operations"] | one["resume"]["operations"]]
        # Of rank 0 every file, to push it to disk, index and tracker; of others their own; at a resume index and file.
        opened = [one["save"]["operations"]["open"] for one in found]
        assert opened[0] <= ranks + 8 and opened[1:] == [1] * (ranks - 1)
        # What tensor-parallel ranks all hold, such as norms, the first of them wrote.
        most = 3 if "tp" in sizes else 2
        assert all(one["resume"]["operations"].keys() == {"open"} for one in found)
        assert max(one["resume"]["operations"]["open"] for one in found) == most
        assert [one["save"]["calls"]["gather"] for one in found] == [1] * ranks
        kinds.append({frozenset(one["save"]["calls"]) for one in found})
    assert kinds == [{frozenset({"all_reduce", "gather"})}] * 3, "nothing is gathered but what rank 0 writes down"


# ------------------------------------------------------------------------------------------------------ host memory


class Peak:
    """The most anonymous memory of this process above where it began, in bytes, sampled."""

    def __enter__(self) -> Peak:
        self.base = self.most = self._now()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.done.set()
        self.thread.join()

    @property
    def above(self) -> int:
        return self.most - self.base

    def _sample(self) -> None:
        while not self.done.is_set():
            self.most = max(self.most, self._now())
            time.sleep(0.002)

    @staticmethod
    def _now() -> int:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def memory(folder: Path, case: ms.Case, parallelism: Parallelism) -> tuple[float, float, int]:
    """Peak bytes a parameter of a save and of a resume, and bytes read at the resume."""
    trainer = ms.build(case, parallelism)
    count = sum(p.numel() for p in trainer.module.parameters())
    ms.step(trainer, 1)
    dist.barrier()
    saver = trainer.saver(folder / "saved")
    with Peak() as save:
        saver.start(1)
        saver.finish()
    del saver, trainer
    fresh = ms.build(case, parallelism, seed=1)
    ms.optimizer.gather_weights(fresh.ddp)
    read = []
    preadv = os.preadv

    def counted(descriptor: int, buffers: list[Any], position: int) -> int:
        read.append(preadv(descriptor, buffers, position))
        return read[-1]

    os.preadv = counted
    with Peak() as load:
        fresh.load(checkpoint.newest(folder / "saved"))
    return save.above / count, load.above / count, sum(read)


def test_host_memory_of_a_rank_and_what_it_reads(tmp_path: Path) -> None:
    """On four data-parallel ranks the share is 3 bytes a parameter; the moments, made at a resume, are 2."""
    found = gr.results(gr.on_ranks(4, memory, tmp_path, BIG, Parallelism()))
    saves, loads, read = zip(*found, strict=True)
    assert max(saves) < 4.5 and max(loads) < 4.5, found
    sizes = json.loads((tmp_path / "saved" / "iter_0000001" / shares.INDEX).read_text())["bytes"]
    assert list(read) == sizes, "each reads what it wrote, once"
