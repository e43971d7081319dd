"""evaluate: accuracy of checkpoints on held-out problems."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from launcher.configs import EvaluateConfig, Resources
from launcher.references import split_ref
from launcher.spec import Format, Step
from launcher.stages.kind import Need, StageKind, item_need, worker_step


class Evaluate(StageKind):
    """evaluate: accuracy of checkpoints on held-out problems."""

    def outputs(self, config: EvaluateConfig) -> dict[str, Format]:
        """Its one port."""
        return {"scores": "scores"}

    def needs(self, config: EvaluateConfig) -> tuple[Need, ...]:
        """The checkpoints, each a port of its own name, and the problems."""
        checkpoints = (
            Need(ref, ref, f"checkpoints[{i}]", "checkpoint", ("hf",)) for i, ref in enumerate(config.checkpoints)
        )
        problems = (item_need(ref, f"benchmarks[{i}]", "prompts") for i, ref in enumerate(config.benchmarks))
        return (*checkpoints, *problems)

    def parts(self, config: EvaluateConfig, seed: int) -> Mapping[str, tuple[EvaluateConfig, int]]:
        """The evaluations that a stage fans out into, with their seeds, by the ends of their names; none: it does not.

        Each is what a stage with this one benchmark and this seed would be, so the two share their artifact.
        """
        if not config.fan_out:
            return {}
        items = Counter(split_ref(ref)[1] for ref in config.benchmarks)
        found = {}
        for ref in config.benchmarks:
            maker, item = split_ref(ref)
            name = str(item) if items[item] == 1 else f"{maker}.{item}"
            for s in config.seeds or (seed,):
                found[f"{name}.{s}"] = (replace(config, benchmarks=(ref,), seeds=(), fan_out=False), s)
        return found

    def steps(self, config: EvaluateConfig, resources: Resources) -> tuple[Step, ...]:
        """One process."""
        return (worker_step("evaluate", resources),)

    def not_built(self, config: EvaluateConfig) -> str | None:
        """Several samples a problem, and a part of the probability."""
        if config.samples > 1 or config.top_p < 1:
            return "several samples a problem (samples) and sampling from the likeliest words alone (top_p)"
        return None
