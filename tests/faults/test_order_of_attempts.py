"""Attempts stand in the order that they tell of one another, not by wall clocks, which are set back and differ."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from launcher import store
from launcher.attempts import attempts, newest_attempt
from launcher.costs import lives_of
from launcher.local import Driver
from launcher.run_record import write_run
from launcher.spec import StageSpec, stage_text
from launcher.state import stage_states
from tests.left_attempts import leave_attempt
from tests.supervisor.counting import Store, counting_run, counting_stage, counting_step

HOUR = 3600.0


def names(root: Path, spec: StageSpec) -> list[str]:
    return [a.name for a, _ in attempts(root, spec.run, spec.stage)]


def number(folder: Path, value: Any) -> None:
    """Have an attempt say which one it is."""
    path = folder / "events.jsonl"
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps({**json.loads(first), "number": value}), *rest]) + "\n")


def test_a_clock_that_was_set_back_makes_no_older_attempt_the_newest(tmp_path: Path) -> None:
    """An attempt of before, which was cancelled, lies in the future; the next one is killed, and tried again."""
    options = {"until": 6, "sleep": 0.02, "fail_at": 4, "fail": "kill", "once": 1}
    record = counting_run(("a", (), options))
    write_run(tmp_path, record)
    later = time.time() + HOUR
    leave_attempt(tmp_path, record.stages[0].spec, "local.1", later, later + 5, "cancelled", action="stop")
    path = store.stage_dir(tmp_path, "run", "a") / "stage.json"
    store.write_atomic(path, stage_text(record.stages[0].spec))
    assert Driver(tmp_path, record, 1).run() == 0
    (state,) = stage_states(tmp_path, record)
    assert (state.state, state.attempt) == ("done", "local.3")
    assert names(tmp_path, record.stages[0].spec) == ["local.1", "local.2", "local.3"]


def test_every_attempt_says_which_one_it_is(tmp_path: Path) -> None:
    at, spec = Store(tmp_path), counting_stage(counting_step(until=1, fail_at=1, fail="raise"))
    later = time.time() + HOUR
    leave_attempt(tmp_path, spec, "7.0", later, later + 1, "crashed")
    for _ in range(2):
        at.run(spec)
    assert [at.events(spec, n)[0]["number"] for n in (1, 2)] == [2, 3]
    assert names(tmp_path, spec) == ["7.0", "local.1", "local.2"]


@pytest.mark.parametrize(
    ("left", "order"),
    [
        ({"local.1": 300, "local.2": 200, "local.10": 100}, ["local.1", "local.2", "local.10"]),
        ({"76.0": 300, "76.1": 200, "76.10": 100}, ["76.0", "76.1", "76.10"]),
        ({"76.0": 200, "76.0.2": 100, "76.1": 50}, ["76.0", "76.0.2", "76.1"]),
        ({"local.1": 100, "76.0": 200, "local.2": 300}, ["local.1", "76.0", "local.2"]),
        ({"9.0": 100, "10.0": 200}, ["9.0", "10.0"]),
    ],
)
def test_stores_of_before_are_ordered_by_time_and_by_their_names(
    tmp_path: Path, left: dict[str, float], order: list[str]
) -> None:
    spec = counting_stage(counting_step())
    for name, started in left.items():
        leave_attempt(tmp_path, spec, name, started, started + 1)
    assert names(tmp_path, spec) == order


def test_what_has_a_number_is_later_than_all_that_has_none(tmp_path: Path) -> None:
    spec = counting_stage(counting_step())
    leave_attempt(tmp_path, spec, "local.1", 5000, 5001)
    for name, started, value in (("80.0", 100, 3), ("79.0", 300, 2), ("81.0", 50, 4)):
        number(leave_attempt(tmp_path, spec, name, started, started + 1), value)
    assert names(tmp_path, spec) == ["local.1", "79.0", "80.0", "81.0"]
    newest = newest_attempt(tmp_path, spec)
    assert newest is not None and newest.name == "81.0"


def test_what_attempts_cost_is_counted_across_a_clock_that_was_set_back(tmp_path: Path) -> None:
    record = counting_run(("a", (), {}))
    spec = record.stages[0].spec
    for name, started, ended, value in (("7.0", 5000, 5100, 1), ("7.1", 100, 150, 2), ("7.2", 120, 180, 3)):
        number(leave_attempt(tmp_path, spec, name, started, ended), value)
    assert [life.seconds for life in lives_of(tmp_path, record.stages[0], 200.0, False)] == [100, 20, 60]


@pytest.mark.parametrize("damage", [None, "2", True, -1, 10**30, [2]])
def test_a_number_that_is_none_is_not_believed(tmp_path: Path, damage: Any) -> None:
    spec = counting_stage(counting_step())
    number(leave_attempt(tmp_path, spec, "local.1", 100, 101), damage)
    leave_attempt(tmp_path, spec, "local.2", 200, 201)
    assert names(tmp_path, spec) == ["local.1", "local.2"]
