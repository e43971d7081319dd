"""merge: a linear combination of checkpoints of one model."""

from __future__ import annotations

from launcher.configs import MergeConfig, Resources
from launcher.spec import Format, Step
from launcher.stages.kind import Need, worker_step

VERSION = 1


def outputs(config: MergeConfig) -> dict[str, Format]:
    """The sum, in the format that the checkpoints are read in."""
    return {"checkpoint": config.format}


def needs(config: MergeConfig) -> tuple[Need, ...]:
    """The checkpoints, each a port of its own name."""
    return tuple(
        Need(ref, ref, f"checkpoints[{i}]", "checkpoint", (config.format,)) for i, ref in enumerate(config.checkpoints)
    )


def steps(config: MergeConfig, resources: Resources) -> tuple[Step, ...]:
    """One process."""
    return (worker_step("merge", resources),)


def not_built(config: MergeConfig) -> str | None:
    """Everything is built."""
    return None
