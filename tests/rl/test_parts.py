"""Where components run, and values that reach Hydra as they are."""

from __future__ import annotations

from typing import Any

import pytest
from rl_stages import resources, rl_config

from launcher.rl.parts import clock, common_problems, component_step, data_parallel_size, hydra, overrides

NAMES = ("a", "b")


def placed(**changes: Any) -> dict[str, tuple[int, int, int | None]]:
    asked = resources(**changes)
    steps = [component_step(asked, NAMES, name, ("x",)) for name in NAMES]
    assert all(step.role == "server" for step in steps)
    return {step.name: (step.nodes, step.first_node, step.het_group) for step in steps}


def test_without_a_word_a_component_is_on_the_first_node_without_gpus() -> None:
    assert placed() == {"a": (1, 0, None), "b": (1, 0, None)}
    assert component_step(resources(), NAMES, "a", ("x",)).gpus == 0


@pytest.mark.parametrize(
    ("components", "want"),
    [
        ({"a": {"nodes": 1}}, {"a": (1, 2, None), "b": (1, 0, None)}),
        ({"a": {"nodes": 3}, "b": {"nodes": 2}}, {"a": (3, 2, None), "b": (2, 5, None)}),
        ({"b": {"nodes": 2}}, {"a": (1, 0, None), "b": (2, 2, None)}),
    ],
)
def test_nodes_of_their_own_come_after_the_main_ones(components: dict[str, Any], want: dict[str, Any]) -> None:
    assert placed(components=components) == want


def test_in_a_heterogeneous_job_each_is_a_part_whose_nodes_count_from_its_own_first() -> None:
    components = {"a": {"nodes": 1}, "b": {"nodes": 2, "gpus_per_node": 8, "ntasks_per_node": 4}}
    asked = {"components": components, "placement": "heterogeneous"}
    assert placed(**asked) == {"a": (1, 0, 1), "b": (2, 0, 2)}
    step = component_step(resources(**asked), NAMES, "b", ("x",))
    assert (step.ntasks, step.gpus) == (8, 8)


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (1, "1"),
        (5e-7, "5e-07"),
        (True, "true"),
        (None, "null"),
        ("float32", "float32"),
        ("null", '"null"'),
        ("True", '"True"'),
        ("nan", '"nan"'),
        ("00:10:00:00", '"00:10:00:00"'),
        ("/a=b/c, d", '"/a=b/c, d"'),
        ("{input:checkpoint}/hf", '"{input:checkpoint}/hf"'),
        (["<|end|>", "x"], '["<|end|>",x]'),
        ({"train": ["a b"]}, '{train:["a b"]}'),
    ],
)
def test_values_in_hydras_grammar(value: Any, want: str) -> None:
    assert hydra(value) == want


def test_a_removed_key_has_no_value() -> None:
    assert overrides({"~a.b": None, "c": 1}) == ("~a.b", "c=1")


@pytest.mark.parametrize(
    ("time", "want"), [("6:30:00", "00:06:10:00"), ("2-12", "02:11:40:00"), ("45:01", "00:00:25:01")]
)
def test_the_clock_leaves_time_to_save(time: str, want: str) -> None:
    assert clock(resources(time=time)) == want


def problems(changes: dict[str, Any], asked: dict[str, Any]) -> dict[str, str]:
    return dict(common_problems(rl_config("nemo-rl", **changes), resources(**asked)))


@pytest.mark.parametrize(
    ("changes", "asked", "key", "message"),
    [
        ({}, {"time": None}, "resources.time", "saves by its own clock"),
        ({}, {"time": "40:00"}, "resources.time", "too short"),
        ({}, {"gpus_per_node": 0}, "resources.gpus_per_node", "needs GPUs"),
        ({}, {"ntasks_per_node": 1}, "resources.ntasks_per_node", "must be gpus_per_node, 4"),
        ({"end_strings": ['a"b']}, {}, "end_strings", "cannot be quoted"),
        ({"end_strings": ["${x}"]}, {}, "end_strings", "cannot be quoted"),
        ({"parallelism": {"tensor_model_parallel_size": 3}}, {}, "parallelism", "does not divide the 8 processes"),
        ({"prompts_per_step": 6}, {}, "prompts_per_step", "6 is not a multiple of the 4 copies"),
        ({"micro_batch_size": 3}, {}, "micro_batch_size", "32 samples a step are not a multiple"),
    ],
)
def test_what_cannot_run_is_refused_with_its_key(
    changes: dict[str, Any], asked: dict[str, Any], key: str, message: str
) -> None:
    assert message in problems(changes, asked)[key]


def test_what_can_run_is_not() -> None:
    assert problems({}, {}) == {}
    assert data_parallel_size(rl_config("nemo-rl"), resources()) == 4
