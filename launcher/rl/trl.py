"""TRL's GRPOTrainer on a Hugging Face checkpoint, in one process: for small models and for a machine without GPUs."""

from __future__ import annotations

from launcher.configs import Resources, RLConfig
from launcher.spec import Format, Step

ACCEPTS: tuple[Format, ...] = ("hf",)


def problems(config: RLConfig, resources: Resources) -> list[tuple[str, str]]:
    """What this backend cannot do of a stage: (key, message)."""
    found = []
    if config.algorithm != "grpo":
        found.append(("algorithm", f"backend trl runs grpo, not {config.algorithm}"))
    if resources.nodes * resources.ntasks_per_node != 1:
        found.append(("resources", "backend trl runs in one process: nodes and ntasks_per_node must be 1"))
    return found


def components(config: RLConfig, resources: Resources) -> tuple[Step, ...]:
    """One worker."""
    argv = ("{python}", "-m", "launcher.workers.rl_trl", "{stage_json}")
    step = Step(name="rl", argv=argv, gpus=resources.gpus_per_node, cpus=resources.cpus_per_task)
    return (step,)
