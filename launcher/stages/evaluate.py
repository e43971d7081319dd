"""evaluate: accuracy of checkpoints on held-out problems."""

from __future__ import annotations

from launcher.configs import EvaluateConfig, Resources
from launcher.spec import Format, Step
from launcher.stages import Need, item_need, worker_step

VERSION = 1


def outputs(config: EvaluateConfig) -> dict[str, Format]:
    """Its one port."""
    return {"scores": "scores"}


def needs(config: EvaluateConfig) -> tuple[Need, ...]:
    """The checkpoints, each a port of its own name, and the problems."""
    checkpoints = (
        Need(ref, ref, f"checkpoints[{i}]", "checkpoint", ("hf",)) for i, ref in enumerate(config.checkpoints)
    )
    problems = (item_need(ref, f"benchmarks[{i}]", "prompts") for i, ref in enumerate(config.benchmarks))
    return (*checkpoints, *problems)


def steps(config: EvaluateConfig, resources: Resources) -> tuple[Step, ...]:
    """One process."""
    return (worker_step("evaluate", resources),)


def not_built(config: EvaluateConfig) -> str | None:
    """Several samples a problem, and a part of the probability."""
    if config.samples > 1 or config.top_p < 1:
        return "several samples a problem (samples) and sampling from the likeliest words alone (top_p)"
    return None
