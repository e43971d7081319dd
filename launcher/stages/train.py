"""train: next-token training with megatron-core, from random weights or from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from launcher.configs import DETERMINISTIC, ModelConfig, Resources, TrainConfig
from launcher.references import split_ref
from launcher.spec import Format, Step
from launcher.stages.kind import Need, Outside, StageKind, item_need, worker_step


class Train(StageKind):
    """train: next-token training with megatron-core, from random weights or from a checkpoint."""

    def outputs(self, config: TrainConfig) -> dict[str, Format]:
        """Its one port."""
        return {"checkpoint": "megatron"}

    def needs(self, config: TrainConfig) -> tuple[Need, ...]:
        """The blend's tokens, the tokenizer that made them, and the checkpoint if one is named."""
        held_out = [(ref, f"validation[{i}]") for i, ref in enumerate(config.validation)]
        read = [*((ref, f"data.{ref}") for ref in config.data), *held_out]
        tokens = [item_need(ref, where, "tokens") for ref, where in read]
        makers = dict.fromkeys(split_ref(ref)[0] for ref, _ in read)
        tokenizers = [Need(f"{m}.tokenizer", m, "data", "tokenizer", ("tokenizer",)) for m in makers]
        start = config.checkpoint
        checkpoint = [Need("checkpoint", start, "checkpoint", "checkpoint", ("megatron",))] if start else []
        return (*tokens, *tokenizers, *checkpoint)

    def steps(self, config: TrainConfig, resources: Resources) -> tuple[Step, ...]:
        """One process a rank: our loop, or the script that the recipe names."""
        step = replace(worker_step("train", resources), env=DETERMINISTIC if config.deterministic_mode else {})
        if config.entrypoint is None:
            return (step,)
        return (replace(step, argv=("{python}", "-m", "launcher.workers.train_script", "{stage_json}")),)

    def outside(self, config: TrainConfig) -> tuple[Outside, ...]:
        """The user's script; what it imports in turn is the user's to keep still."""
        return (Outside(("entrypoint",), config.entrypoint, "content"),) if config.entrypoint else ()

    def model(self, config: TrainConfig) -> ModelConfig:
        """The one that it names."""
        return config.model

    def engine(self, config: Mapping[str, Any]) -> str:
        """The trainer's library."""
        return "megatron-core"
