"""Every class from its evidence alone."""

from __future__ import annotations

import typing

import pytest

from launcher.spec import ExitClass
from launcher.supervisor.classify import ACTIONS, Evidence, RankExit, Said, classify

FINISHED = {"class": "finished"}
SAVED = {"class": "time-limit", "message": "saved at 3"}


LOST = {"class": "crashed", "message": "RuntimeError: Connection closed by peer [198.18.0.11]:20011"}


def ended(
    code: int,
    said: dict[str, str] | None = None,
    step: str = "train",
    rank: int = 0,
    node: str | None = None,
    log: str = "",
) -> RankExit:
    words = Said(said["class"], said.get("message", "")) if said else None
    return RankExit(step, rank, code, words, node, log)


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
        (Evidence([], hang_s=5.0, asked="node-failure", bad_nodes=("n2",)), "node-failure", "again"),
        (Evidence([ended(0, SAVED)], asked="preempted"), "preempted", "again"),
        (Evidence([ended(-15)], asked="preempted"), "preempted", "again"),
        (Evidence([ended(-12, SAVED)]), "time-limit", "again"),
        (Evidence([ended(-15, FINISHED)]), "finished", "done"),
        (Evidence([ended(1, FINISHED)]), "crashed", "stop"),
        (Evidence([ended(1, LOST)]), "crashed", "again"),
        (Evidence([ended(1, LOST)], asked="node-failure", bad_nodes=("n2",)), "node-failure", "again"),
        (Evidence([ended(1, LOST), ended(1, {"class": "diverged", "message": "nan"}, rank=1)]), "diverged", "stop"),
        (Evidence([ended(1, {"class": "crashed", "message": "KeyError"})], asked="node-failure"), "crashed", "stop"),
        (Evidence([], ready_failed="server"), "crashed", "stop"),
    ],
)
def test_classes(evidence: Evidence, exit_class: str, action: str) -> None:
    found = classify(evidence)
    assert (found.exit_class, found.action) == (exit_class, action)


def test_the_first_bad_end_decides() -> None:
    found = classify(Evidence([ended(1, {"class": "diverged", "message": "nan"}, rank=1), ended(-9, rank=0)]))
    assert found.exit_class == "diverged"


BUSY = "RuntimeError: CUDA error: CUDA-capable device(s) is/are busy or unavailable"
TIMEOUT = "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)"


def test_a_gpus_fault_names_its_node() -> None:
    crashed = {"class": "crashed", "message": BUSY}
    found = classify(Evidence([ended(1, crashed, rank=3, node="n2")]))
    assert (found.exit_class, found.action, found.exclude, found.suspect) == ("gpu-fault", "again", ("n2",), ())
    assert "rank 3 on n2" in found.message and BUSY in found.message
    found = classify(Evidence([ended(-6, None, rank=1, node="n4", log=f"step 3\n{TIMEOUT}\n")]))
    assert (found.exit_class, found.exclude, found.suspect) == ("gpu-fault", (), ("n4",))
    found = classify(Evidence([ended(1, {"class": "diverged", "message": "nan"}, node="n4", log=TIMEOUT)]))
    assert (found.exit_class, found.suspect) == ("diverged", ())


def test_lost_nodes_are_named_and_left_out() -> None:
    found = classify(Evidence([ended(-9)], asked="node-failure", bad_nodes=("n2", "n3")))
    assert found.exclude == ("n2", "n3") and "lost n2, n3" in found.message and "earlier checkpoint" in found.message
    assert classify(Evidence([ended(-9)], asked="preempted", bad_nodes=("n2",))).exclude == ()


def test_every_class_has_an_action() -> None:
    assert set(ACTIONS) == set(typing.get_args(ExitClass))


def test_asked_before_anything_ran_it_is_not_finished() -> None:
    found = classify(Evidence([], asked="time-limit"))
    assert (found.exit_class, found.action, found.message) == ("time-limit", "again", "the time limit came")


def test_who_was_killed_after_it_had_saved_has_saved() -> None:
    assert classify(Evidence([ended(-12, SAVED)], asked="preempted")).message == "preempted by a job of higher priority"
