"""convert: a checkpoint in another format. The plan inserts it."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.configs import ConvertConfig, Resources
from launcher.spec import Format, Step
from launcher.stages import Need, worker_step

VERSION = 1
_NEMO = "conversion from and to nemo"
#: What a checkpoint can be converted from and to, and why this version only plans it, None where it converts.
CONVERSIONS: Mapping[tuple[Format, Format], str | None] = {
    ("hf", "megatron"): None,
    ("megatron", "hf"): None,
    ("hf", "nemo"): _NEMO,
    ("megatron", "nemo"): _NEMO,
    ("nemo", "hf"): _NEMO,
    ("nemo", "megatron"): _NEMO,
}


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
    """As the table says."""
    return CONVERSIONS[config.source, config.target]
