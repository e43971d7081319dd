"""convert: a checkpoint in another format. The plan inserts it."""

from __future__ import annotations

from launcher.configs import ConvertConfig, Resources
from launcher.spec import Format, Step
from launcher.stages.kind import Need, worker_step

VERSION = 1
#: What a checkpoint can be converted from and to.
CONVERSIONS: frozenset[tuple[Format, Format]] = frozenset(
    {("hf", "megatron"), ("megatron", "hf"), ("hf", "nemo"), ("nemo", "hf"), ("megatron", "nemo"), ("nemo", "megatron")}
)


def outputs(config: ConvertConfig) -> dict[str, Format]:
    """The checkpoint in the other format."""
    return {"checkpoint": config.target}


def needs(config: ConvertConfig) -> tuple[Need, ...]:
    """The checkpoint as it is."""
    return (Need("checkpoint", config.checkpoint, "checkpoint", "checkpoint", (config.source,)),)


def steps(config: ConvertConfig, resources: Resources) -> tuple[Step, ...]:
    """One process: TP and PP are properties of the reader, not of the file."""
    return (worker_step("convert", resources),)


def not_built(config: ConvertConfig) -> str | None:
    """Everything in the table is built."""
    return None
