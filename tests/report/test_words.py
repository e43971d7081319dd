"""The words follow the numbers: said where these bear them out, and not said where they do not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from report_run import make_run, plan_run

from launcher.report import collect
from launcher.report.limits import limits
from launcher.report.numbers import NBSP, gap, interval, uncertainty
from launcher.report.words import expected_by_selection, findings, introduction, selection, taught_both


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("root")
    return collect(root, make_run(root, plan_run()))


@pytest.fixture
def data(demo: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(demo)


def set_accuracy(data: dict[str, Any], checkpoint: str, accuracy: float, temperature: float | None = None) -> None:
    for row in data["results"]:
        if row["checkpoint"] == checkpoint and temperature in (None, row["temperature"]):
            row["accuracy"], row["stderr"] = accuracy, (accuracy * (1 - accuracy) / row["n"]) ** 0.5


def said(lines: list[str], *parts: str) -> bool:
    return any(all(part in line.replace(NBSP, " ") for part in parts) for line in lines)


def headings(data: dict[str, Any]) -> str:
    return "\n".join(s.heading for s in limits(data))


def test_an_order_of_three_standard_errors_is_said(data: dict[str, Any]) -> None:
    lines = findings(data)
    assert said(lines, "midtrain is above base at every temperature tried", "n = 500")
    assert said(lines, "rl-from-midtrain is above midtrain at every temperature tried")
    assert said(lines, "midtrain is above rl-from-base at every temperature")
    assert said(lines, "rl-from-base is not clearly different from base")


def test_an_order_that_the_numbers_do_not_show_is_not_said(data: dict[str, Any]) -> None:
    set_accuracy(data, "midtrain", 0.57)
    set_accuracy(data, "rl-from-midtrain", 0.62)  # 1.6 standard errors of 500 problems
    lines = findings(data)
    assert said(lines, "rl-from-midtrain is not clearly different from midtrain")
    assert not said(lines, "rl-from-midtrain is above")


def test_an_order_at_one_temperature_alone_is_said_so(data: dict[str, Any]) -> None:
    set_accuracy(data, "midtrain", 0.5)
    set_accuracy(data, "rl-from-midtrain", 0.5)
    set_accuracy(data, "rl-from-midtrain", 0.8, temperature=0.6)
    assert said(findings(data), "rl-from-midtrain is not on one side of midtrain throughout: above it at T = 0.6 by")


def test_a_loss_is_said_as_plainly_as_a_gain(data: dict[str, Any]) -> None:
    set_accuracy(data, "rl-from-midtrain", 0.2)
    assert said(findings(data), "rl-from-midtrain is below midtrain at every temperature tried")


def test_none_right_is_not_taken_for_certain() -> None:
    none, few = {"accuracy": 0.0, "stderr": 0.0, "n": 20}, {"accuracy": 0.1, "stderr": 0.067, "n": 20}
    assert uncertainty(none) > 0 and abs(gap(none, few)) < 3
    assert interval(none) == (0.0, 3 / 20) and interval({**none, "accuracy": 1.0}) == (3 / 20, 0.0)
    assert gap(few, none) == -gap(none, few) < 0


def test_weights_representations_and_rewards_are_named(data: dict[str, Any]) -> None:
    lines = findings(data)
    assert said(lines, "midtrain → rl-from-midtrain: 41.4 % of the weights changed by more than 1 %")
    assert said(lines, "base → midtrain moved the weights 138 times as far as midtrain → rl-from-midtrain")
    assert said(lines, "rl-from-base: 6400 of 6400 rewards were 0", "50 of 50 steps")


def test_the_introduction_counts_what_is_done(data: dict[str, Any]) -> None:
    data["stages"][-1]["state"] = "failed"
    text = introduction(data)
    assert text.startswith("8 of 9 stages are done") and "midtrain on 999 k tokens" in text and "Seed 0" in text


def test_the_share_of_the_lift_that_choosing_explains() -> None:
    before = {"worked_accuracy": 0.9, "terse_accuracy": None}
    after = {"worked_share": 0.5, "terse_share": 0.4}
    assert expected_by_selection(before, after) == pytest.approx(0.45)


def test_selection_is_explained_for_the_stage_that_could_choose(data: dict[str, Any]) -> None:
    lines = selection(data)
    assert len(lines) == 3 and not said(lines, "rl-from-base")
    # 0.98 * 0.88 + 0.02 * 0.23 = 86.7 %; of a lift from 57.6 % to 87.4 % this is 98 %
    assert said(lines, "T = 0.6", "would give 86.7 %, measured are 87.4 %", "98 % of the lift of 29.8 points")
    set_accuracy(data, "rl-from-midtrain", 0.58)
    assert said(selection(data), "no clear lift to explain")
    assert [s["name"] for s in taught_both(data, "rl-from-midtrain")] == ["reasoning"]
    assert taught_both(data, "rl-from-base") == []


def test_the_demo_says_what_is_design_and_what_does_not_reproduce(data: dict[str, Any]) -> None:
    found = headings(data)
    for part in (
        "RL selects among taught traces",
        "Held out by text",
        "RL from base had no signal",
        "Does not reproduce at this size: RL's sparsity",
        "further apart than in the paper",
        "A small model",
        "RL engine: trl",
        "On a CPU",
        "One run, one seed",
    ):
        assert part in found
    texts = [s.text for s in limits(data)]
    assert said(texts, "prepare/general alone, text without written traces", "to the bit")
    assert said(texts, "arXiv 2603.17074", "5 % of the weights", "41.4 %", "midtrain, trained on text: 98.7 %")


def test_what_is_not_so_in_another_run_is_not_said(data: dict[str, Any]) -> None:
    for row in data["sources"]:
        row["terse_share"] = 0.0 if row["kind"] == "problems" else None
    for row in data["rewards"]:
        row["all_zero"] = False
    for row in data["stages"]:
        row["cpu_mode"], row["backend"] = False, "nemo-rl" if row["backend"] else None
    for row in data["problem_sets"]:
        row["exclude"] = []
    for row in data["weights"]:
        row["changed_fraction"] = 0.06
    data["model"]["parameters"] = 8_000_000_000
    found = headings(data)
    for part in (
        "taught traces",
        "no signal",
        "Does not reproduce",
        "small model",
        "trl",
        "On a CPU",
        "Held out by text",
    ):
        assert part not in found
    assert "Not held out" in found and "RL's sparsity is about the paper's" in found


def test_a_base_of_unknown_text_is_not_said_to_be_untaught(data: dict[str, Any]) -> None:
    for row in data["sources"]:
        row["kind"] = "files"
    texts = [s.text for s in limits(data)]
    assert said(texts, "All 6400 rewards of rl-from-base were 0") and not said(texts, "without written traces")


def test_a_run_without_evaluation_claims_nothing_of_it(tmp_path: Path) -> None:
    data = collect(tmp_path, make_run(tmp_path, plan_run(), ["prepare", "base"]))
    assert findings(data) == [] and selection(data) == []
    assert headings(data).splitlines() == ["A small model", "On a CPU"]
