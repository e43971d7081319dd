"""convert: a checkpoint in another format. The plan inserts it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from launcher.configs import ConvertConfig, Resources
from launcher.spec import Format, Step
from launcher.stages.kind import Need, StageKind, worker_step

#: What a checkpoint can be converted from and to.
CONVERSIONS: frozenset[tuple[Format, Format]] = frozenset(
    {("hf", "megatron"), ("megatron", "hf"), ("hf", "nemo"), ("nemo", "hf"), ("megatron", "nemo"), ("nemo", "megatron")}
)


class Convert(StageKind):
    """convert: a checkpoint in another format. The plan inserts it."""

    def outputs(self, config: ConvertConfig) -> dict[str, Format]:
        """The checkpoint in the other format."""
        return {"checkpoint": config.target}

    def needs(self, config: ConvertConfig) -> tuple[Need, ...]:
        """The checkpoint as it is."""
        return (Need("checkpoint", config.checkpoint, "checkpoint", "checkpoint", (config.source,)),)

    def steps(self, config: ConvertConfig, resources: Resources) -> tuple[Step, ...]:
        """One process: TP and PP are properties of the reader, not of the file."""
        return (worker_step("convert", resources),)

    def what_counts(self, config: ConvertConfig) -> ConvertConfig:
        """Not under what name the checkpoint is asked for: it is known by its fingerprint."""
        return replace(config, checkpoint="")

    def engine(self, config: Mapping[str, Any]) -> str:
        """Both formats."""
        return f"{config['source']} to {config['target']}"
