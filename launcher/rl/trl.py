"""TRL's GRPOTrainer on a Hugging Face checkpoint, in one process: for small models and for a machine without GPUs."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.configs import Resources, TrlRL
from launcher.spec import Family, Format, Step

ACCEPTS: tuple[Format, ...] = ("hf",)
MAKES: Format = "hf"
ALGORITHMS = ("grpo",)
ELSEWHERE: Mapping[str, str] = {}
TRAINS: tuple[Family, ...] = ("llama", "mistral", "granite", "granitemoehybrid", "nemotron_h")
UNTRAINED: Mapping[str, str] = {}
COMPONENTS: tuple[str, ...] = ()
NOT_BUILT: str | None = None


def problems(config: TrlRL, resources: Resources) -> list[tuple[str, str]]:
    """What this backend cannot do of a stage: (key, message)."""
    if resources.nodes * resources.ntasks_per_node != 1:
        return [("resources", "backend trl runs in one process: nodes and ntasks_per_node must be 1")]
    return []


def components(config: TrlRL, resources: Resources) -> tuple[Step, ...]:
    """One worker."""
    argv = ("{python}", "-m", "launcher.workers.rl_trl", "{stage_json}")
    step = Step(name="rl", argv=argv, gpus=resources.gpus_per_node, cpus=resources.cpus_per_task)
    return (step,)
