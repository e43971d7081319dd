"""TRL's GRPOTrainer on a Hugging Face checkpoint, in one process: for small models and for a machine without GPUs."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.configs import Parallelism, Resources, RLConfig
from launcher.spec import Format, Step

ACCEPTS: tuple[Format, ...] = ("hf",)
MAKES: Format = "hf"
ALGORITHMS = ("grpo",)
ELSEWHERE: Mapping[str, str] = {}
REFUSED: Mapping[str, str] = {}
COMPONENTS: tuple[str, ...] = ()
NOT_BUILT: str | None = None
#: Keys that other backends know, with the values that say nothing.
_UNUSED = {
    "max_prompt_length": None,
    "end_strings": (),
    "lr_decay_style": "constant",
    "importance_cap": None,
    "micro_batch_size": 1,
    "parallelism": Parallelism(),
}


def problems(config: RLConfig, resources: Resources) -> list[tuple[str, str]]:
    """What this backend cannot do of a stage: (key, message)."""
    found = [
        (key, "backend trl does not know it; leave it out") for key, v in _UNUSED.items() if getattr(config, key) != v
    ]
    if resources.nodes * resources.ntasks_per_node != 1:
        found.append(("resources", "backend trl runs in one process: nodes and ntasks_per_node must be 1"))
    return found


def components(config: RLConfig, resources: Resources) -> tuple[Step, ...]:
    """One worker."""
    argv = ("{python}", "-m", "launcher.workers.rl_trl", "{stage_json}")
    step = Step(name="rl", argv=argv, gpus=resources.gpus_per_node, cpus=resources.cpus_per_task)
    return (step,)
