"""Another life or none, and without which nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.attempts import Attempt, Beat, End
from launcher.spec import Limits
from launcher.supervisor.classify import Outcome
from launcher.supervisor.lives import end_of_chain, lives_without_progress, next_life


def life(number: int, step: int, exit_class: str = "crashed", **end: Any) -> Attempt:
    beat, ended = Beat(float(number), step), End(float(number), exit_class, **end)
    return Attempt(f"7.{number}", Path("x"), float(number), None, ended, beat)


def lives(*of: tuple[int, str] | tuple[int, str, dict[str, Any]]) -> list[Attempt]:
    return [life(n, one[0], one[1], **(one[2] if len(one) > 2 else {})) for n, one in enumerate(of)]


@pytest.mark.parametrize(
    ("had", "fruitless"),
    [
        (lives((5, "time-limit")), 0),
        (lives((0, "crashed")), 1),
        (lives((5, "crashed"), (5, "crashed"), (5, "crashed")), 2),
        (lives((5, "crashed"), (5, "crashed"), (6, "crashed")), 0),
        (lives((0, "crashed"), (0, "preempted"), (0, "node-failure"), (0, "crashed")), 2),
        (lives((0, "preempted")), 0),
        (lives((0, "preflight", {"excluded": ("n1",)}), (0, "preflight")), 1),
    ],
)
def test_lives_that_got_no_further_are_counted(had: list[Attempt], fruitless: int) -> None:
    last = had[-1].end
    assert last is not None
    result = Outcome(last.exit_class, "why", "again", exclude=last.excluded)  # type: ignore[arg-type]
    assert lives_without_progress(had, result) == fruitless
    given_up = next_life(result, had, Limits(max_no_progress=0, max_excluded=9))
    assert (given_up.action == "stop") == (fruitless > 0)
    assert given_up.action == "again" or "given up" in given_up.message and "why" in given_up.message


def test_what_stops_or_is_done_stays_so() -> None:
    for action in ("stop", "done"):
        result = Outcome("finished", "", action)  # type: ignore[arg-type]
        assert (
            next_life(result, lives((0, "crashed"), (0, "crashed"), (0, "crashed"), (0, "crashed")), Limits()) == result
        )


def test_no_more_nodes_are_left_out_than_allowed() -> None:
    had = lives((0, "preflight", {"excluded": ("n1",)}), (0, "preflight"))
    result = Outcome("preflight", "n2: sees 7 GPUs of 8", "again", exclude=("n2",))
    assert next_life(result, had, Limits(max_excluded=2)) == result
    given_up = next_life(result, had, Limits(max_excluded=1))
    assert given_up.action == "stop" and "n1" in given_up.message and "n2: sees 7 GPUs" in given_up.message
    again = next_life(Outcome("preflight", "", "again", exclude=("n1",)), had, Limits(max_excluded=1))
    assert again.action == "again"


def test_a_node_that_is_down_needs_no_leaving_out() -> None:
    result = Outcome("node-failure", "lost n2", "again", exclude=("n2",))
    found = next_life(result, lives((3, "node-failure")), Limits(max_excluded=0))
    assert (found.action, found.exclude) == ("again", ())


def test_a_suspect_is_left_out_the_second_time() -> None:
    result = Outcome("gpu-fault", "timeout", "again", suspect=("n3",))
    first = next_life(result, lives((3, "gpu-fault")), Limits())
    assert first.exclude == ()
    second = next_life(result, lives((3, "gpu-fault", {"suspect": ("n3",)}), (4, "gpu-fault")), Limits())
    assert second.exclude == ("n3",)
    other = next_life(result, lives((3, "gpu-fault", {"suspect": ("n2",)}), (4, "gpu-fault")), Limits())
    assert other.exclude == ()


def test_the_end_of_a_chain_says_what_helps() -> None:
    ended = end_of_chain(Outcome("time-limit", "the time limit came", "again"), 3)
    assert ended.action == "stop" and ended.exit_class == "time-limit"
    assert "chain of 3 jobs" in ended.message and "limits.chain_jobs" in ended.message
