"""Drawing, writing and judging problems."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from launcher.configs import GeneratedSet
from launcher.errors import UserError
from launcher.workers.problems import (
    TRACES,
    draw_problems,
    normalised,
    open_task,
    problem_text,
    read_problems,
    reward,
    totals_of,
    trace_kind,
)

#: Settings in which every task has hundreds of different problems.
SETTINGS = {
    "chain_sum": {"min_terms": 1, "max_terms": 6, "max_digits": 3, "allow_negation": True},
    "gcd": {"min_numbers": 2, "max_numbers": 4, "min_value": 1, "max_value": 400},
    "count_bits": {"min_n": 1, "max_n": 100_000},
}


def drawn(task: str, count: int, seed: int = 0) -> list[dict]:
    return draw_problems("set", GeneratedSet(task=task, count=count, settings=SETTINGS[task]), seed)


def completion_of(problem: dict, terse: bool = False) -> str:
    return problem_text(problem, terse).removeprefix(problem["prompt"])


@pytest.mark.parametrize("task", sorted(TRACES))
def test_own_text_earns_the_reward_and_near_misses_do_not(task: str) -> None:
    rng = random.Random(task)
    for problem in drawn(task, 300):
        trace, answer = problem["trace"], problem["answer"]
        own = completion_of(problem)
        assert reward(own, problem, ended=True) == 1.0, own
        assert reward(completion_of(problem, terse=True), problem, ended=True) == 1.0
        wrong = str(int(answer) + rng.choice([-10, -1, 1, 10]))
        misses = [
            f"<think>{trace}</think>{wrong}",
            f"<think>{trace}</think>{answer}{rng.randint(0, 9)}.5",
            f"<think>{trace}</think>{answer} {answer}",
            f"<think>{trace}</think>the answer is {answer}",
            f"<think>{trace}</think>",
            f"<think>{trace}</think>  \n",
            f"<think></think>{answer}",
            f"<think> \n</think>{answer}",
            f"{answer}<think>{trace}</think>",
            f"{answer}<think>{trace}</think>{answer}",
            f"<think>{trace}</think><think>{trace}</think>{answer}",
            f"<think>{trace}<think>{trace}</think>{answer}",
            f"<think>{trace}</think>{answer}</think>",
            f"<think>{trace}{answer}",
            f"{trace}</think>{answer}",
            answer,
            "",
        ]
        assert [m for m in misses if reward(m, problem, ended=True) != 0.0] == []
        assert reward(own, problem, ended=False) == 0.0


@pytest.mark.parametrize(
    ("task", "question", "trace"),
    [
        ("chain_sum", "State the final answer to the following: 6 + 2 - 8 + 4 =", "6+2=8 8-8=0 0+4=4"),
        ("chain_sum", "State the final answer to the following: 3 - -4 =", "3--4=7"),
        ("chain_sum", "State the final answer to the following: 5 =", "5"),
        ("gcd", "GCD of these numbers: 12, 18. Give only", "18=1*12+6 12=2*6+0"),
        ("gcd", "GCD of these numbers: 12, 18, 4. Give only", "18=1*12+6 12=2*6+0 6=1*4+2 4=2*2+0"),
        ("count_bits", "How many 1 bits are there in the binary representation of the number 5?",
         "5=2*2+1,1 2=2*1+0,1 1=2*0+1,2"),
    ],
)  # fmt: skip
def test_traces_by_hand(task: str, question: str, trace: str) -> None:
    assert TRACES[task]({"question": question}) == trace


def test_kind_of_trace() -> None:
    problem = drawn("chain_sum", 1)[0]
    assert trace_kind(completion_of(problem)) == "worked"
    assert trace_kind(completion_of(problem, terse=True)) == "terse"
    assert trace_kind("8") is None
    assert trace_kind("<think>1+1=2</think>") is None


def test_problems_are_different_and_repeatable() -> None:
    first, again, other = drawn("gcd", 200), drawn("gcd", 200), drawn("gcd", 200, seed=1)
    assert first == again
    assert len({normalised(p["prompt"]) for p in first}) == 200
    assert [p["prompt"] for p in first] != [p["prompt"] for p in other]


def test_excluded_problems_stay_out_whatever_their_case_and_spaces() -> None:
    config = GeneratedSet(task="count_bits", count=100, settings={"min_n": 1, "max_n": 200})
    first = [p["prompt"] for p in draw_problems("a", config, 0)]
    excluded = {normalised(prompt.upper().replace(" ", "  ")) for prompt in first}
    second = [p["prompt"] for p in draw_problems("b", config, 0, excluded)]
    assert len({*first, *second}) == 200


def test_totals_stay_within_the_limits() -> None:
    settings = {"min_terms": 4, "max_terms": 4, "min_digits": 1, "max_digits": 1}
    problems = draw_problems("s", GeneratedSet(count=100, settings=settings, totals=(2, 7)), 0)
    totals = [t for p in problems for t in totals_of(p["trace"])]
    assert (min(totals), max(totals)) == (2, 7)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"task": "sudoku", "count": 1}, "no traces for task sudoku; there is chain_sum, gcd, count_bits"),
        ({"count": 1, "settings": {"min_term": 2}}, "task chain_sum refuses them.*min_term"),
        ({"count": 1, "settings": {"min_terms": "four"}}, "task chain_sum refuses them"),
        ({"count": 1, "settings": {"min_terms": 2.5, "max_terms": 2.5}}, "task chain_sum refuses them"),
        ({"count": 1, "settings": {"min_terms": 5, "max_terms": 4}}, "max_terms must be >= min_terms"),
        ({"count": 1, "settings": {"seed": 3}}, "task chain_sum refuses them.*seed"),
        ({"task": "gcd", "count": 1, "totals": (0, 9)}, "only chain_sum has running totals"),
    ],
)  # fmt: skip
def test_bad_sets_are_refused(config: dict, message: str) -> None:
    with pytest.raises(UserError, match=rf"problems\.mine\..*{message}"):
        open_task("mine", GeneratedSet(**config), 0)


def test_too_few_different_problems() -> None:
    config = GeneratedSet(task="count_bits", count=8, settings={"min_n": 1, "max_n": 7})
    with pytest.raises(UserError, match="8 wanted, but 1600 draws of count_bits gave only 7 different ones"):
        draw_problems("mine", config, 0)


def test_reading_names_every_bad_line(tmp_path: Path) -> None:
    good = drawn("gcd", 2)
    path = tmp_path / "set.jsonl"
    path.write_text("\n".join([json.dumps(good[0]), "{", '{"prompt": "x"}', "3", json.dumps(good[1])]))
    with pytest.raises(UserError) as caught:
        read_problems(path)
    assert [p.removeprefix(f"{path}:").partition(":")[0] for p in caught.value.problems] == ["2", "3", "4"]
    path.write_text(json.dumps(good[0]) + "\n\n")
    assert read_problems(path) == good[:1]
    for content in (b"", b"\n", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=str(path)):
            read_problems(path)
    with pytest.raises(UserError, match="absent"):
        read_problems(tmp_path / "absent.jsonl")
