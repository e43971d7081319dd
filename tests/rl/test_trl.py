"""TRL runs in one process and knows none of what the larger backends need."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.configs import AnyRL, Resources
from launcher.rl import trl
from launcher.spec import SpecError, decode, encode

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
def test_a_key_that_it_would_ignore_is_refused_with_the_backends_that_have_it(key: str, value: Any) -> None:
    assert trl.problems(decode(AnyRL, CONFIG), Resources()) == []
    with pytest.raises(SpecError) as caught:
        decode(AnyRL, {**CONFIG, key: value})
    ((named, message),) = caught.value.problems
    assert named == key and message.startswith("backend trl does not know it; backend") and "nemo-rl does" in message


def test_a_key_of_another_backend_at_its_default_says_nothing() -> None:
    idle = {"end_strings": [], "importance_cap": None, "parallelism": {}, "lr_decay_style": "constant"}
    whole = encode(decode(AnyRL, {**CONFIG, "backend": "nemo-rl", "max_prompt_length": 8}))
    assert decode(AnyRL, {**CONFIG, **idle, "parallelism": whole["parallelism"]}) == decode(AnyRL, CONFIG)


def test_several_processes_are_refused() -> None:
    for asked in (Resources(nodes=2), Resources(ntasks_per_node=2)):
        ((key, message),) = trl.problems(decode(AnyRL, CONFIG), asked)
        assert key == "resources" and "one process" in message
