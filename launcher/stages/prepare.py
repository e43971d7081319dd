"""prepare: tokenizer, token files and problem sets. Reads nothing that another stage made."""

from __future__ import annotations

from launcher.configs import PrepareConfig, Resources
from launcher.spec import Format, Step
from launcher.stages import Need, worker_step

VERSION = 1
OUTPUTS: dict[str, Format] = {"tokenizer": "tokenizer", "tokens": "tokens", "prompts": "prompts"}


def needs(config: PrepareConfig) -> tuple[Need, ...]:
    """Nothing; what lies outside the store is hashed by `launcher.inputs`."""
    return ()


def steps(config: PrepareConfig, resources: Resources) -> tuple[Step, ...]:
    """One process."""
    return (worker_step("prepare", resources),)
