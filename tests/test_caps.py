"""What caps leave room for, in numbers and in words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from launcher.caps import read_held, room_now, waits_for_room, write_held
from launcher.cluster import load_profile
from launcher.state import stage_states
from tests.supervisor.counting import counting_run

PROFILE = load_profile("example-pyxis")


@pytest.mark.parametrize(
    ("rate", "most", "calls", "jobs", "fits"),
    [
        (None, None, 10**6, 10**6, 7),
        (5, None, 4, 0, 7),  # one call, and an array's elements count as one
        (5, None, 5, 0, 0),
        (5, None, 9, 0, 0),
        (None, 50, 0, 47, 3),
        (None, 50, 0, 60, 0),
        (1, 50, 0, 49, 1),
    ],
)
def test_room(rate: int | None, most: int | None, calls: int, jobs: int, fits: int) -> None:
    assert room_now(replace(PROFILE, submit_rate=rate, max_submit=most), calls, jobs).fits(7) == fits


def test_room_that_is_taken_is_gone_and_the_reason_is_the_cap_that_was_met() -> None:
    room = room_now(replace(PROFILE, submit_rate=2, max_submit=50), 0, 40)
    room.take(6)
    assert room.fits(7) == 4
    room.take(4)
    assert room.fits(1) == 0 and "max_submit 50 reached" in room.why()
    room = room_now(replace(PROFILE, submit_rate=2, max_submit=50), 1, 0)
    room.take(1)
    assert room.fits(1) == 0 and "submit_rate 2 a minute reached" in room.why()
    room.refused = True
    assert "Slurm's own limit" in room.why()


@pytest.mark.parametrize(
    ("rate", "most", "calls", "jobs", "why"),
    [
        (None, 10, 0, 6, None),
        (None, 10, 0, 7, "max_submit 10 reached"),
        (5, None, 1, 0, None),
        (5, None, 2, 0, "submit_rate 5 a minute reached"),
        (2, None, 0, 0, None),  # more links than a minute may have: it waits for a whole one
        (2, None, 1, 0, "submit_rate 2 a minute reached"),
    ],
)
def test_the_jobs_of_a_chain_find_room_together(
    rate: int | None, most: int | None, calls: int, jobs: int, why: str | None
) -> None:
    room = room_now(replace(PROFILE, submit_rate=rate, max_submit=most), calls, jobs)
    assert (room.fits(4, calls=4) // 4 == 0) == (why is not None)
    assert why is None or why in room.why(4)
    room.take(4, calls=4)
    assert room.fits(4, calls=4) < 4 or (rate is None and most is None)


def test_what_is_held_back_is_told_of_stages_that_nothing_makes(tmp_path: Path) -> None:
    run = counting_run(("a", (), {}), ("b", (), {}))
    assert read_held(tmp_path, "run") == {} and not waits_for_room(tmp_path, "run")
    why = room_now(replace(PROFILE, max_submit=1), 0, 1).why()
    write_held(tmp_path, "run", {"b": why})
    assert waits_for_room(tmp_path, "run")
    assert [(s.state, s.message) for s in stage_states(tmp_path, run)] == [("waiting", ""), ("waiting", why)]
    write_held(tmp_path, "run", {"b": "not submitted: a, which it reads, has not been made"})
    assert not waits_for_room(tmp_path, "run"), "no room would help that"
    write_held(tmp_path, "run", {})
    assert read_held(tmp_path, "run") == {}
