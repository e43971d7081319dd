"""A slow, failing or hanging read of the data: steps do not wait for it, and say which file it was."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import launcher.workers.megatron  # noqa: F401  must come before megatron.core
from launcher.errors import PrismError
from launcher.progress import how_it_ended
from launcher.workers.megatron import cleanup, documents, feeding
from launcher.workers.megatron.documents import Batch

#: Seconds after which something that must come has not come; nothing takes that long where all is right.
NEVER = 60.0


def numbered(first: int, last: int) -> Iterator[Batch]:
    for number in range(first, last):
        yield Batch(torch.tensor([[number]]), torch.tensor([[number]]))


def taken(batches: Iterator[Batch], count: int) -> list[int]:
    """As megatron-core's schedules take them: as many as there are, and never asking for one more."""
    return [int(next(batches).tokens) for _ in range(count)]  # type: ignore[arg-type]


@pytest.mark.parametrize("ahead", [1, 2])
def test_what_the_next_step_wants_is_read_while_this_one_computes(ahead: int) -> None:
    """Each step goes on only when a read for the next one has begun: read in the step, the first would never end."""
    begun = [threading.Event() for _ in range(8)]

    def read(first: int, last: int) -> Iterator[Batch]:
        for number in range(first, last):
            begun[number].set()
            yield from numbered(number, number + 1)

    feed = feeding.Feed(read, samples=8)
    for step in range(4):
        assert taken(feed.step(2 * step, 2 * step + 2, 2), 2) == [2 * step, 2 * step + 1]
        wanted = 2 * step + 1 + ahead
        assert wanted >= 8 or begun[wanted].wait(NEVER), "computing, the step had nothing read for the next"
    feed.close()


def test_one_thread_reads_for_all_steps_and_every_sample_once() -> None:
    made, threads = [], set()

    def read(first: int, last: int) -> Iterator[Batch]:
        for batch in numbered(first, last):
            made.append(int(batch.tokens))  # type: ignore[arg-type]
            yield batch

    feed = feeding.Feed(read, samples=20)
    for first in range(0, 20, 4):
        assert taken(feed.step(first, first + 4, 4), 4) == list(range(first, first + 4))
        threads.add(feed._ahead.thread)  # type: ignore[union-attr]
    feed.close()
    assert len(threads) == 1 and made == list(range(20))


def test_no_more_lies_ready_than_asked_for() -> None:
    made = []

    def read(first: int, last: int) -> Iterator[Batch]:
        for batch in numbered(first, last):
            made.append(batch)
            yield batch

    ahead = feeding.Ahead(read(0, 1000), ahead=2)
    next(ahead)
    ahead.close()
    ahead.thread.join(NEVER)
    assert not ahead.thread.is_alive() and len(made) <= 5


def test_steps_in_any_order_get_their_own_samples() -> None:
    feed = feeding.Feed(numbered, samples=12)
    for first in (0, 4, 8, 4, 0, 20):  # the last is beyond the run's own
        assert taken(feed.step(first, first + 4, 4), 4) == list(range(first, first + 4))
    half = feed.step(0, 4, 4)
    assert [int(next(half).tokens), int(next(half).tokens)] == [0, 1]  # type: ignore[arg-type]
    assert taken(feed.step(0, 4, 4), 4) == [0, 1, 2, 3]
    feed.close()


def test_an_error_is_raised_in_the_step_that_it_belongs_to_and_the_thread_ends() -> None:
    def read(first: int, last: int) -> Iterator[Batch]:
        yield from numbered(first, 5)
        raise OSError(5, "Input/output error", "/data/text.bin")

    feed = feeding.Feed(read, samples=100)
    assert taken(feed.step(0, 4, 4), 4) == [0, 1, 2, 3], "read ahead, it is no error of this step"
    thread = feed._ahead.thread  # type: ignore[union-attr]
    with pytest.raises(OSError, match="Input/output error") as error:
        taken(feed.step(4, 8, 4), 4)
    assert how_it_ended(error.value)[:2] == ("storage", "/data/text.bin: Input/output error; mend that, then run again")
    thread.join(NEVER)
    assert not thread.is_alive()


def test_a_read_that_hangs_holds_up_nobody_who_stops() -> None:
    hangs, reading = threading.Event(), threading.Event()

    def read(first: int, last: int) -> Iterator[Batch]:
        yield from numbered(0, 1)
        reading.set()
        hangs.wait(NEVER)

    feed = feeding.Feed(read, samples=4)
    assert taken(feed.step(0, 1, 1), 1) == [0]
    assert reading.wait(NEVER)
    feed.close()  # returns
    hangs.set()


def test_a_micro_batch_is_pinned_as_a_whole_by_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[tuple[int, str]] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append((tensor.data_ptr(), threading.current_thread().name))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    text = torch.arange(8).view(1, 8)
    batch = Batch(text, text + 1, torch.ones(1, 8), ([5, 3],))
    (made,) = feeding.Ahead(documents.prepared(b, joined=True, pin=True) for b in [batch])
    assert made.documents is not None and made.documents.cu_seqlens_q is not None
    assert made.documents.cu_seqlens_q.tolist() == [0, 5, 8]
    tensors = [made.tokens, made.labels, made.loss_mask, made.documents.cu_seqlens_q, made.documents.seq_idx]
    assert {t.data_ptr() for t in tensors if t is not None} == {place for place, _ in pinned} and len(pinned) == 5
    assert {name for _, name in pinned} == {"feed"}


def test_a_sample_that_cannot_be_read_is_told_with_its_file(tmp_path: Path) -> None:
    from launcher.workers.megatron.data import Blend, Source

    class Broken:
        dataset_index, dataset_sample_index = [0, 1], [0, 7]

        def __init__(self, error: Exception) -> None:
            self.error = error

        def __getitem__(self, number: int) -> Any:
            raise self.error

    blend = object.__new__(Blend)
    blend.sources = tuple(Source(n, tmp_path / n, 0.5, 100) for n in ("one", "two"))
    blend.packing = "concatenate"
    for error, exit_class in ((OSError(116, "Stale file handle"), "storage"), (ValueError("too short"), "crashed")):
        blend._data = Broken(error)
        with pytest.raises((OSError, PrismError)) as raised:
            blend.batch(1, 1)
        said, message, _ = how_it_ended(raised.value)
        assert said == exit_class and f"{tmp_path / 'two'}.bin: sample 1 cannot be read" in message, message


def test_the_collector_runs_when_it_is_let_and_no_other_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import gc

    at: list[int] = []
    with cleanup.collected():
        assert not gc.isenabled() and gc.get_freeze_count() > 0
        monkeypatch.setattr(gc, "collect", lambda: at.append(step))
        for step in range(1, 351):
            cleanup.collect(step)
        monkeypatch.undo()
    assert at == [100, 200, 300]
    assert gc.isenabled() and gc.get_freeze_count() == 0
