"""Threads that share a bound of memory: all is done, in order, within it, and an error ends it."""

from __future__ import annotations

import threading

import pytest

from launcher.convert import lanes


def test_shares_are_even_in_order_and_the_same_each_time() -> None:
    items = [5, 1, 1, 1, 1, 1, 4, 2]
    shares = lanes.share_out(items, lambda n: n, 2)
    assert shares == [[5, 4], [1, 1, 1, 1, 1, 2]]
    assert lanes.share_out([3, 3], lambda n: n, 1) == [[3, 3]]


def test_what_is_at_work_never_costs_more_than_the_bound() -> None:
    lock, held, most, done = threading.Lock(), 0, 0, []
    meet = threading.Barrier(2)  # two small ones are at work at one time, or this would not end

    def work(lane: int, item: int) -> None:
        nonlocal held, most
        with lock:
            held += min(item, 10)
            most = max(most, held)
        if item == 1:
            meet.wait(timeout=60)
        with lock:
            held -= min(item, 10)
            done.append((lane, item))

    lanes.run([[1, 9, 30], [1, 8, 7]], work, lambda n: n, 10)
    assert most <= 10
    assert [item for lane, item in done if lane == 0] == [1, 9, 30]
    assert [item for lane, item in done if lane == 1] == [1, 8, 7]


def test_an_error_ends_all_lanes_and_is_raised() -> None:
    done = []

    def work(lane: int, item: int) -> None:
        if item == 0:
            raise ValueError("broken")
        done.append(item)

    with pytest.raises(ValueError, match="broken"):
        lanes.run([[1, 0, 2], []], work, lambda n: 1, 5)
    assert done == [1]
