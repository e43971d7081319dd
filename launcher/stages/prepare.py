"""prepare: tokenizer, token files and problem sets. Reads nothing that another stage made."""

from __future__ import annotations

from typing import Any

from launcher.configs import DatasetSource, PrepareConfig, PublishedSet, Resources
from launcher.spec import Format, Step
from launcher.stages.kind import Need, Outside, StageKind, worker_step


class Prepare(StageKind):
    """prepare: tokenizer, token files and problem sets. Reads nothing that another stage made."""

    #: 2: special tokens that text spells are text, a tokenizer's truncation counts for nothing, links and .gz are read.
    VERSION = 2

    def outputs(self, config: PrepareConfig) -> dict[str, Format]:
        """The ports that it fills; one that nothing fills is none: an empty one is taken for a fault of the worker."""
        ports: dict[str, Format] = {"tokenizer": "tokenizer"}
        return {
            **ports,
            **({"tokens": "tokens"} if config.sources else {}),
            **({"prompts": "prompts"} if config.problems else {}),
        }

    def needs(self, config: PrepareConfig) -> tuple[Need, ...]:
        """Nothing; what lies outside the store is `outside`."""
        return ()

    def steps(self, config: PrepareConfig, resources: Resources) -> tuple[Step, ...]:
        """One process."""
        return (worker_step("prepare", resources),)

    def not_built(self, config: PrepareConfig) -> str | None:
        """Published data sets and problem sets."""
        sources = [name for name, source in config.sources.items() if isinstance(source, DatasetSource)]
        sets = [name for name, problems in config.problems.items() if isinstance(problems, PublishedSet)]
        missing = [f"sources of kind dataset ({', '.join(sources)})"] if sources else []
        missing += [f"published problem sets ({', '.join(sets)})"] if sets else []
        return " and ".join(missing) or None

    def outside(self, config: PrepareConfig) -> tuple[Outside, ...]:
        """Text, problem sets and a tokenizer."""
        named: dict[tuple[str, ...], Any] = {("sources", name): source for name, source in config.sources.items()}
        named |= {("problems", name): problems for name, problems in config.problems.items()}
        named["tokenizer",] = config.tokenizer
        paths = {key: getattr(part, "path", None) for key, part in named.items()}
        return tuple(Outside((*key, "path"), path) for key, path in paths.items() if path)
