"""prepare: tokenizer, token files and problem sets. Reads nothing that another stage made."""

from __future__ import annotations

from launcher.configs import PrepareConfig, Resources
from launcher.spec import Format, Step
from launcher.stages import Need, worker_step

#: 2: special tokens that text spells are text, a tokenizer's truncation counts for nothing, links and .gz are read.
VERSION = 2


def outputs(config: PrepareConfig) -> dict[str, Format]:
    """The ports that it fills; one that nothing fills is none: an empty one is taken for a fault of the worker."""
    ports: dict[str, Format] = {"tokenizer": "tokenizer"}
    return {
        **ports,
        **({"tokens": "tokens"} if config.sources else {}),
        **({"prompts": "prompts"} if config.problems else {}),
    }


def needs(config: PrepareConfig) -> tuple[Need, ...]:
    """Nothing; what lies outside the store is hashed by `launcher.inputs`."""
    return ()


def steps(config: PrepareConfig, resources: Resources) -> tuple[Step, ...]:
    """One process."""
    return (worker_step("prepare", resources),)


def not_built(config: PrepareConfig) -> str | None:
    """Published data sets and problem sets, and tokenizers from a hub."""
    sources = [name for name, source in config.sources.items() if source.kind == "dataset"]
    sets = [name for name, problems in config.problems.items() if problems.path]
    missing = [f"sources of kind dataset ({', '.join(sources)})"] if sources else []
    missing += [f"published problem sets ({', '.join(sets)})"] if sets else []
    if (config.tokenizer.path or "").startswith("hf:"):
        missing.append(f"fetching a tokenizer ({config.tokenizer.path}); download it and name its folder")
    return " and ".join(missing) or None
