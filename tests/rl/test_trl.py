"""TRL runs in one process and knows none of what the larger backends need."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.configs import Resources, RLConfig
from launcher.rl import trl
from launcher.spec import decode

CONFIG: dict[str, Any] = {"backend": "trl", "checkpoint": "mid", "prompts": "prepare/rl", "max_steps": 3}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_prompt_length", 8),
        ("end_strings", ["x"]),
        ("lr_decay_style", "linear"),
        ("importance_cap", 2.0),
        ("micro_batch_size", 2),
        ("parallelism", {"tensor_model_parallel_size": 2}),
    ],
)
def test_a_key_that_it_would_ignore_is_refused(key: str, value: Any) -> None:
    assert trl.problems(decode(RLConfig, CONFIG), Resources()) == []
    ((named, message),) = trl.problems(decode(RLConfig, {**CONFIG, key: value}), Resources())
    assert named == key and "leave it out" in message


def test_several_processes_are_refused() -> None:
    for asked in (Resources(nodes=2), Resources(ntasks_per_node=2)):
        ((key, message),) = trl.problems(decode(RLConfig, CONFIG), asked)
        assert key == "resources" and "one process" in message
