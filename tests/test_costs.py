"""GPU-hours, what was lost and how long it waited, against attempts whose times are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from launcher.configs import Component, Resources
from launcher.costs import cost_of, lives_of, lost_seconds, queue_seconds
from launcher.run_record import PlannedStage
from launcher.spec import Step
from tests.left_attempts import leave_attempt
from tests.supervisor.counting import asking, counting_run

RESOURCES = Resources(nodes=2, gpus_per_node=8, ntasks_per_node=8, cpus_per_task=3)


@pytest.fixture
def stage() -> PlannedStage:
    return asking(counting_run(("a", (), {})).stages[0], RESOURCES)


def test_every_attempt_counts_with_the_whole_of_the_resources(tmp_path: Path, stage: PlannedStage) -> None:
    leave_attempt(tmp_path, stage.spec, "12.0", 1000, 1600, "preempted", (1, 40))
    leave_attempt(tmp_path, stage.spec, "12.1", 2000, 5000, "crashed", (41, 80))
    leave_attempt(tmp_path, stage.spec, "13.0", 6000, None, steps=(81, 90))
    cost = cost_of(lives_of(tmp_path, stage, 6400.0, running=True), stage)
    assert (cost.attempts, cost.seconds, cost.gpus, cost.cores) == (3, 600 + 3000 + 400, 16, 48)
    assert cost.gpu_hours == pytest.approx(16 * 4000 / 3600) and cost.core_hours == pytest.approx(48 * 4000 / 3600)
    assert cost.classes == {"preempted": 1, "crashed": 1, "running": 1}


def test_the_nodes_of_components_are_held_too(stage: PlannedStage) -> None:
    server = Step("server", ("true",), role="server", nodes=3, first_node=2)
    cost = cost_of([], asking(stage, replace(RESOURCES, components={"server": Component(nodes=3)}), server))
    assert (cost.gpus, cost.cores) == (5 * 8, 5 * 8 * 3), "all nodes of one allocation are of one kind"
    apart = replace(server, first_node=0, het_group=1)
    asked = replace(RESOURCES, components={"server": Component(nodes=3, cpus_per_task=4)}, placement="heterogeneous")
    cost = cost_of([], asking(stage, asked, apart))
    assert (cost.gpus, cost.cores) == (2 * 8, 2 * 8 * 3 + 3 * 4)


def test_attempts_of_an_earlier_plan_are_not_this_stages_cost(tmp_path: Path, stage: PlannedStage) -> None:
    leave_attempt(tmp_path, replace(stage.spec, fingerprint="e" * 20), "11.0", 10, 500)
    leave_attempt(tmp_path, stage.spec, "12.0", 1000, 1600)
    assert cost_of(lives_of(tmp_path, stage, 2000.0, running=False), stage).seconds == 600


def test_one_that_was_killed_lasted_to_its_last_sign_of_life(tmp_path: Path, stage: PlannedStage) -> None:
    """And not into the next one, whatever the clocks of two nodes say."""
    leave_attempt(tmp_path, stage.spec, "12.0", 1000, None, steps=(1, 9))  # beat last at 1110
    leave_attempt(tmp_path, stage.spec, "12.1", 1100, None)  # never beat
    lives = lives_of(tmp_path, stage, 9999.0, running=False)
    assert [(life.seconds, life.exit_class) for life in lives] == [(100, "killed"), (0, "killed")]


@pytest.mark.parametrize(
    ("exit_class", "steps", "following", "lost"),
    [
        ("preempted", (1, 40), (41, 100), 0),  # saved as asked
        ("crashed", (1, 40), (31, 100), 150),  # 10 of 40 steps again
        ("crashed", (21, 40), (31, 100), 300),  # 10 of the 20 that it did
        ("crashed", (1, 40), (1, 100), 600),
        ("node-failure", (21, 40), (5, 100), 600),  # not more than all, though its start had to be done again too
        ("crashed", None, (1, 100), 600),  # it did nothing
    ],
)
def test_what_is_lost_are_the_steps_that_are_done_again(
    tmp_path: Path,
    stage: PlannedStage,
    exit_class: str,
    steps: tuple[int, int] | None,
    following: tuple[int, int],
    lost: float,
) -> None:
    leave_attempt(tmp_path, stage.spec, "12.0", 1000, 1600, exit_class, steps)
    leave_attempt(tmp_path, stage.spec, "12.1", 2000, 3000, "finished", following)
    lives = lives_of(tmp_path, stage, 9999.0, running=False)
    assert lost_seconds(lives) == pytest.approx([lost, 0])
    assert cost_of(lives, stage).lost_seconds == pytest.approx(lost)


def test_a_stage_without_heartbeats_that_finished_has_lost_nothing(tmp_path: Path, stage: PlannedStage) -> None:
    leave_attempt(tmp_path, stage.spec, "12.0", 1000, 1600, "finished")
    assert lost_seconds(lives_of(tmp_path, stage, 9999.0, running=False)) == [0]


def test_time_in_the_queue_starts_when_what_is_read_is_ready(tmp_path: Path, stage: PlannedStage) -> None:
    leave_attempt(tmp_path, stage.spec, "12.0", 1000, 1600, "preempted", (1, 40))
    leave_attempt(tmp_path, stage.spec, "12.1", 1700, 2000, "crashed", (41, 80))
    leave_attempt(tmp_path, stage.spec, "13.0", 2500, 3000, "finished", (81, 100))
    lives = lives_of(tmp_path, stage, 9999.0, running=False)
    submitted = {"12": 100.0, "13": 2100.0}
    assert queue_seconds(lives, submitted, ready=0.0) == 900 + 100 + 400
    assert queue_seconds(lives, submitted, ready=950.0) == 50 + 100 + 400
    assert queue_seconds(lives, {}, ready=0.0) is None  # outside Slurm
