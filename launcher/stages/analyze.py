"""analyze: what a stage changed, in weights and in representations."""

from __future__ import annotations

from launcher.configs import AnalyzeConfig, Resources
from launcher.spec import Format, Step
from launcher.stages.kind import Need, StageKind, item_need, worker_step


class Analyze(StageKind):
    """analyze: what a stage changed, in weights and in representations."""

    def outputs(self, config: AnalyzeConfig) -> dict[str, Format]:
        """Its one port."""
        return {"analysis": "analysis"}

    def needs(self, config: AnalyzeConfig) -> tuple[Need, ...]:
        """The checkpoints of all pairs, each once, and the texts."""
        first_place = {
            ref: f"pairs[{i}][{j}]"
            for i, pair in reversed(list(enumerate(config.pairs)))
            for j, ref in reversed(list(enumerate(pair)))
        }
        checkpoints = [Need(ref, ref, where, "checkpoint", ("hf",)) for ref, where in first_place.items()]
        source = [item_need(config.source, "source", "tokens")] if config.source else []
        return (*reversed(checkpoints), item_need(config.problems, "problems", "prompts"), *source)

    def steps(self, config: AnalyzeConfig, resources: Resources) -> tuple[Step, ...]:
        """One process."""
        return (worker_step("analyze", resources),)
