"""One node may not see yet what another sees on a shared disk: all ranks do what rank 0 saw, or say what lacks."""

from __future__ import annotations

import shutil
import types
from pathlib import Path

import gloo_ranks as gr
import made_states as ms
import pytest
import torch.distributed as dist

from launcher.configs import Parallelism
from launcher.errors import UserError
from launcher.workers.megatron import checkpoint, loop, shares

CASE = ms.Case("llama-tiny")


def saved_twice(folder: Path) -> ms.Trainer:
    """Two checkpoints, of which the second holds other numbers than the first."""
    trainer = ms.build(CASE, Parallelism())
    saver = trainer.saver(folder / "saved")
    ms.step(trainer, 1)
    saver.start(2)
    ms.fill(trainer, CASE, Parallelism())
    saver.start(3)
    saver.finish()
    return ms.build(CASE, Parallelism(), seed=7)


def resume_late(folder: Path, hidden: str) -> tuple[int, int]:
    """Resume where rank 1 does not see what its glob would tell: the newest checkpoint, or any."""
    trainer = saved_twice(folder)
    whole = Path.glob

    def late(path: Path, pattern: str) -> list[Path]:
        return [p for p in whole(path, pattern) if dist.get_rank() == 0 or p.name not in hidden.split()]

    Path.glob = late  # type: ignore[assignment,method-assign]
    job = types.SimpleNamespace(rank=dist.get_rank())
    standing = types.SimpleNamespace(
        model=types.SimpleNamespace(module=trainer.module), optimizer=trainer.optimizer, scheduler=trainer.scheduler
    )
    done = loop.resume(job, standing, folder / "saved")  # type: ignore[arg-type]
    found = ms.wrong(trainer, CASE, Parallelism())
    return done, sum(count for state, count in found.items() if state != "schedule")


@pytest.mark.parametrize("hidden", ["iter_0000003", "iter_0000002 iter_0000003"], ids=["the newest", "all"])
def test_all_ranks_go_on_from_what_rank_0_sees(tmp_path: Path, hidden: str) -> None:
    assert gr.results(gr.on_ranks(2, resume_late, tmp_path, hidden, deadline_s=90.0)) == [(3, 0), (3, 0)]


def resume_without(folder: Path) -> str:
    trainer = saved_twice(folder)
    path = folder / "saved" / "iter_0000003"
    (path / shares.INDEX).unlink()
    with pytest.raises(UserError) as caught:
        trainer.load(path)
    shutil.rmtree(path)
    assert trainer.load(checkpoint.newest_for_all(folder / "saved")) == 2  # type: ignore[arg-type]
    return str(caught.value)


def test_an_index_that_is_not_seen_is_not_taken_for_an_older_version(tmp_path: Path) -> None:
    [said] = gr.results(gr.on_ranks(1, resume_without, tmp_path))
    assert "progress.json: not seen on " in said and "older version" not in said, said
    assert f"remove {tmp_path / 'saved' / 'iter_0000003'}, and" in said, "the folder of all checkpoints stays"
