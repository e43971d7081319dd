"""RL stages of the backends that ask for GPUs, to be changed by tests."""

from __future__ import annotations

from typing import Any

from launcher.configs import AnyRL, Resources, RLConfig
from launcher.spec import decode

#: 2 nodes of 4 GPUs; 4 copies of a policy over 2 GPUs each.
RESOURCES: dict[str, Any] = {
    "nodes": 2,
    "gpus_per_node": 4,
    "ntasks_per_node": 4,
    "cpus_per_task": 7,
    "time": "6:30:00",
}
CONFIG: dict[str, Any] = {
    "checkpoint": "mid",
    "prompts": "prepare/rl",
    "max_steps": 100,
    "prompts_per_step": 8,
    "num_generations": 4,
    "max_prompt_length": 100,
    "max_completion_length": 300,
    "end_strings": ["</s>"],
    "parallelism": {"tensor_model_parallel_size": 2},
}


def rl_config(backend: str, **changes: Any) -> RLConfig:
    algorithm = "reinforce" if backend == "nemo-aligner" else "grpo"
    return decode(AnyRL, {"backend": backend, "algorithm": algorithm, **CONFIG, **changes})


def resources(**changes: Any) -> Resources:
    return decode(Resources, {**RESOURCES, **changes})


def values(argv: tuple[str, ...]) -> dict[str, str]:
    """The overrides of a command, `key=value` each; one that removes a key has no value."""
    return {word.partition("=")[0]: word.partition("=")[2] for word in argv if "." in word.partition("=")[0]}
