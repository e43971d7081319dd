"""Micro-batches are read by a thread ahead of the steps that want them, so that no slow file system stops a GPU.

Order and contents are those of reading in the step; an error of the thread is raised in the step that its micro-batch
belongs to.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from launcher.workers.megatron.documents import Batch

#: Micro-batches that lie ready besides the one that is being read.
AHEAD = 2

T = TypeVar("T")


class Ahead(Generic[T]):
    """An iterator whose items are made by a thread before they are asked for, `ahead` of them at most.

    `close` lets the thread end with the item that it is at, and does not wait for it: it may be in a read that hangs.
    """

    def __init__(self, items: Iterator[T], ahead: int = AHEAD) -> None:
        self._made: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(ahead)
        self._closed = threading.Event()
        self.thread = threading.Thread(target=self._make, args=(items,), name="feed", daemon=True)
        self.thread.start()

    def _make(self, items: Iterator[T]) -> None:
        try:
            for item in items:
                self._put(item, None)
                if self._closed.is_set():
                    return
            self._put(None, StopIteration())
        except BaseException as error:  # whatever it is, it is the step's
            self._put(None, error)

    def _put(self, item: T | None, error: BaseException | None) -> None:
        while not self._closed.is_set():
            try:
                self._made.put((item, error), timeout=0.1)
                return
            except queue.Full:
                continue

    def __iter__(self) -> Ahead[T]:
        return self

    def __next__(self) -> T:
        item, error = self._made.get()
        if error is not None:
            self._closed.set()
            self._made.put((None, error))  # asked again, it says the same
            raise error
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """Make no more."""
        self._closed.set()


class Feed:
    """The micro-batches of one step after another. `read(FIRST, LAST)` gives those of the samples FIRST .. LAST.

    `samples` are those of the whole run: the thread reads on to the last of them.
    """

    def __init__(self, read: Callable[[int, int], Iterator[Batch]], samples: int) -> None:
        self._read, self._samples = read, samples
        self._ahead: Ahead[Batch] | None = None
        self._next = -1

    def step(self, first: int, last: int, count: int) -> Iterator[Batch]:
        """The `count` micro-batches of the samples first .. last; quick where they follow the last that were taken."""
        if self._ahead is None or self._next != first:
            self.close()
            self._ahead = Ahead(self._read(first, max(last, self._samples)))
        self._next = -1  # a step that is not taken to its end is read anew
        for number in range(count):
            batch = next(self._ahead)
            if number == count - 1:  # here, for who has the last one asks no more
                self._next = last
            yield batch

    def close(self) -> None:
        """Read no more."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None
