"""A slow disk, a full one, a writer or a rank that dies, a late rank: an end with a name, and no half progress."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gloo_ranks as gr
import made_states as ms
import pytest
import torch.distributed as dist

from launcher.configs import Parallelism
from launcher.progress import StageJob
from launcher.store import read_json
from launcher.workers.megatron import checkpoint
from tests.supervisor.counting import counting_stage

CASE = ms.Case("llama-tiny")
#: Seconds after which collectives give up, and that the slow disk takes.
PATIENCE, SLOW = 10.0, 14.0


def two_saves(folder: Path, fault: Callable[[], None], count: int = 2) -> list[str]:
    """Save twice; on rank 1 the second meets a fault. Returns the checkpoints that are whole."""
    trainer = ms.build(CASE, Parallelism())
    ms.step(trainer, 1)
    saver, write = trainer.saver(folder / "saved"), checkpoint.write_share
    for iteration in range(1, count + 1):
        if iteration == 2 and dist.get_rank() == 1:

            def faulty(*arguments: Any) -> None:
                fault()
                write(*arguments)

            checkpoint.write_share = faulty
        saver.start(iteration)
        saver.finish()
    return whole(folder)


def whole(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "saved").glob("iter_*"))


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def broken() -> None:
    raise ValueError("torn tape")


def left() -> None:
    raise SystemExit(3)


def dead() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def slow() -> None:
    time.sleep(SLOW)


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (full, "OSError", "the checkpoint was not written: No space left on device (rank 1 on "),
        (
            broken,
            "WorldError",
            "iter_0000002.partial: the checkpoint was not written: ValueError: torn tape (rank 1 on ",
        ),
        (left, "WorldError", "the checkpoint was not written: SystemExit: 3 (rank 1 on "),
    ],
)
def test_every_rank_ends_with_what_one_could_not_write(
    tmp_path: Path, fault: Callable[[], None], kind: str, words: str
) -> None:
    ended = gr.on_ranks(3, two_saves, tmp_path, fault)
    for end in ended:
        assert end.raised is not None and end.raised[0] == kind and words in end.raised[1], end
        assert (f"[Errno {errno.ENOSPC}]" in end.raised[1]) == (fault is full)
    assert whole(tmp_path) == ["iter_0000001"]


def test_a_rank_that_is_killed_ends_the_others_and_leaves_nothing_that_passes_for_whole(tmp_path: Path) -> None:
    ended = gr.on_ranks(3, two_saves, tmp_path, dead, timeout_s=PATIENCE)
    assert ended[1].code == -signal.SIGKILL
    assert all(end.raised is not None for end in (ended[0], ended[2])), ended
    assert whole(tmp_path) == ["iter_0000001", "iter_0000002.partial"]
    assert checkpoint.newest(tmp_path / "saved") == tmp_path / "saved" / "iter_0000001"


def test_a_disk_slower_than_collectives_are_patient_is_waited_for(tmp_path: Path) -> None:
    found = gr.results(gr.on_ranks(2, two_saves, tmp_path, slow, timeout_s=PATIENCE))
    assert found == [["iter_0000001", "iter_0000002"]] * 2


def beating(folder: Path) -> list[str]:
    """Rank 1's disk takes until rank 0's heartbeat is newer than when the write began, of progress and of weights."""
    job = StageJob(counting_stage(), folder, folder, "count", dist.get_rank(), dist.get_world_size())
    trainer = ms.build(CASE, Parallelism())
    ms.step(trainer, 1)
    job.beat(1, 9, loss=2.5)
    again, beat = partial(job.beat_again, pause_s=0.1), folder / "heartbeat.count.0.json"
    write, written = checkpoint.write_share, checkpoint._written

    def seen() -> None:
        before, given_up = read_json(beat)["time"], time.monotonic() + 60.0
        while read_json(beat)["time"] == before:
            assert time.monotonic() < given_up, "no heartbeat came"
            time.sleep(0.05)

    if dist.get_rank() == 1:
        checkpoint.write_share = lambda *arguments: (seen(), write(*arguments))
        checkpoint._written = lambda *arguments: (seen(), written(*arguments))[1]
    saver = checkpoint.Saver(folder / "saved", trainer.module, trainer.optimizer, trainer.scheduler, 2, None, again)
    dist.barrier()
    saver.start(1)
    saver.finish()
    checkpoint.save_weights(folder / "finished", 1, trainer.module, again)
    assert read_json(beat)["figures"] == {"loss": 2.5}
    return whole(folder)


def test_heartbeats_go_on_while_a_disk_is_waited_for(tmp_path: Path) -> None:
    assert gr.results(gr.on_ranks(2, beating, tmp_path)) == [["iter_0000001"]] * 2


def late(folder: Path) -> int:
    """Rank 1 reaches the save after the others, and the next life comes to it late too."""
    trainer = ms.build(CASE, Parallelism())
    ms.fill(trainer, CASE, Parallelism())
    if dist.get_rank() == 1:
        time.sleep(2.0)
    saver = trainer.saver(folder / "saved")
    saver.start(3)
    if dist.get_rank() == 0:
        time.sleep(2.0)
    saver.finish()
    other = ms.build(CASE, Parallelism(), seed=5)
    if dist.get_rank() == 2:
        time.sleep(2.0)
    other.load(folder / "saved" / "iter_0000003")
    return sum(ms.wrong(other, CASE, Parallelism()).values())


def test_a_late_rank_changes_nothing(tmp_path: Path) -> None:
    assert gr.results(gr.on_ranks(3, late, tmp_path)) == [0, 0, 0]


def test_a_folder_that_cannot_be_made_ends_every_rank(tmp_path: Path) -> None:
    (tmp_path / "saved").write_text("a file where the folder should be")
    ended = gr.on_ranks(2, two_saves, tmp_path, slow)
    assert [end.raised and end.raised[0] for end in ended] == ["NotADirectoryError"] * 2
    assert all("(rank 0 on " in end.raised[1] for end in ended if end.raised)
