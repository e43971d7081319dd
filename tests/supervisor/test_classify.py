"""Every class from its evidence alone."""

from __future__ import annotations

import typing

import pytest

from launcher.spec import ExitClass
from launcher.supervisor.classify import ACTIONS, Evidence, RankExit, classify

FINISHED = {"class": "finished"}
SAVED = {"class": "time-limit", "message": "saved at 3"}


def ended(code: int, said: dict[str, str] | None = None, step: str = "train", rank: int = 0) -> RankExit:
    return RankExit(step, rank, code, said)


@pytest.mark.parametrize(
    ("evidence", "exit_class", "action"),
    [
        (Evidence([ended(0, FINISHED), ended(0, FINISHED, rank=1)]), "finished", "done"),
        (Evidence([ended(0, FINISHED), ended(0, SAVED, rank=1)]), "time-limit", "again"),
        (Evidence([ended(0, SAVED)], asked="cancelled"), "cancelled", "stop"),
        (Evidence([ended(0, SAVED)], asked="time-limit"), "time-limit", "again"),
        (Evidence([ended(-9)], asked="time-limit"), "time-limit", "again"),
        (Evidence([ended(0, FINISHED)], asked="cancelled"), "finished", "done"),
        (Evidence([ended(2, {"class": "user-error", "message": "no"})], asked="cancelled"), "user-error", "stop"),
        (Evidence([ended(1, {"class": "diverged", "message": "nan"})]), "diverged", "stop"),
        (Evidence([ended(1, {"class": "out-of-memory", "message": "host"})]), "out-of-memory", "stop"),
        (Evidence([ended(1, {"class": "crashed", "message": "KeyError"})]), "crashed", "stop"),
        (Evidence([ended(-9), ended(0, FINISHED, rank=1)]), "crashed", "again"),
        (Evidence([ended(-11)]), "crashed", "again"),
        (Evidence([ended(-125)]), "out-of-memory", "stop"),
        (Evidence([ended(-9)], memory_kill=True), "out-of-memory", "stop"),
        (Evidence([ended(-11)], memory_kill=True), "crashed", "again"),
        (Evidence([ended(0, SAVED), ended(-9, rank=1)], asked="time-limit", memory_kill=True), "time-limit", "again"),
        (Evidence([ended(0)]), "crashed", "stop"),
        (Evidence([ended(0, FINISHED), ended(137, rank=1)]), "crashed", "stop"),
        (Evidence([], hang_s=5.0), "hang", "again"),
        (Evidence([], ready_failed="server"), "crashed", "stop"),
    ],
)
def test_classes(evidence: Evidence, exit_class: str, action: str) -> None:
    found = classify(evidence)
    assert (found.exit_class, found.action) == (exit_class, action)


def test_the_first_bad_end_decides() -> None:
    found = classify(Evidence([ended(1, {"class": "diverged", "message": "nan"}, rank=1), ended(-9, rank=0)]))
    assert found.exit_class == "diverged"


def test_every_class_has_an_action() -> None:
    assert set(ACTIONS) == set(typing.get_args(ExitClass))
