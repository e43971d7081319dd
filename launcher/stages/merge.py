"""merge: a linear combination of checkpoints of one model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.configs import MergeConfig, Resources
from launcher.spec import Format, Step
from launcher.stages.kind import Need, StageKind, worker_step


class Merge(StageKind):
    """merge: a linear combination of checkpoints of one model."""

    def outputs(self, config: MergeConfig) -> dict[str, Format]:
        """The sum, in the format that the checkpoints are read in."""
        return {"checkpoint": config.format}

    def needs(self, config: MergeConfig) -> tuple[Need, ...]:
        """The checkpoints, each a port of its own name."""
        places = enumerate(config.checkpoints)
        return tuple(Need(ref, ref, f"checkpoints[{i}]", "checkpoint", (config.format,)) for i, ref in places)

    def steps(self, config: MergeConfig, resources: Resources) -> tuple[Step, ...]:
        """One process."""
        return (worker_step("merge", resources),)

    def lineage(self, config: MergeConfig) -> tuple[str, ...]:
        """All of its checkpoints, which are of one model."""
        return config.checkpoints

    def engine(self, config: Mapping[str, Any]) -> str:
        """The sum."""
        return " + ".join(f"{w:g} × {ref}" for w, ref in zip(config["weights"], config["checkpoints"], strict=True))
