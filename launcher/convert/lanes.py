"""Work in a few threads whose tensors together stay within a bound."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")

#: One reads while another writes; each has an output file of its own where the format allows several.
LANES = 2


def share_out(items: Sequence[T], cost: Callable[[T], int], lanes: int = LANES) -> list[list[T]]:
    """Items for each lane, in order, each to the lane that has least to do: the same for the same items."""
    shares: list[list[T]] = [[] for _ in range(lanes)]
    totals = [0] * lanes
    for item in items:
        lane = totals.index(min(totals))
        shares[lane].append(item)
        totals[lane] += cost(item)
    return shares


def run(shares: Sequence[Sequence[T]], work: Callable[[int, T], None], cost: Callable[[T], int], most: int) -> None:
    """Call `work(lane, item)` for every item; those at work at one time cost no more than `most` together.

    An item that costs more runs alone. What one raises ends all, and is raised here.
    """
    room, stopped = _Room(most), threading.Event()

    def lane(number: int) -> None:
        for item in shares[number]:
            if stopped.is_set():
                return
            with room.hold(cost(item)):
                work(number, item)

    with ThreadPoolExecutor(len(shares)) as pool:
        futures = [pool.submit(lane, number) for number in range(len(shares))]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stopped.set()
    for future in futures:
        future.result()


class _Room:
    """Bytes that are free to be held."""

    def __init__(self, most: int):
        self._most, self._held = most, 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, size: int) -> Iterator[None]:
        size = min(size, self._most)
        with self._changed:
            self._changed.wait_for(lambda: self._held + size <= self._most)
            self._held += size
        try:
            yield
        finally:
            with self._changed:
                self._held -= size
                self._changed.notify_all()
