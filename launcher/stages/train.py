"""train: next-token training with megatron-core, from random weights or from a checkpoint."""

from __future__ import annotations

from launcher.configs import Resources, TrainConfig
from launcher.spec import Format, Step
from launcher.stages import Need, item_need, split_ref, worker_step

VERSION = 1


def outputs(config: TrainConfig) -> dict[str, Format]:
    """Its one port."""
    return {"checkpoint": "megatron"}


def needs(config: TrainConfig) -> tuple[Need, ...]:
    """The blend's tokens, the tokenizer that made them, and the checkpoint if one is named."""
    tokens = [item_need(ref, f"data.{ref}", "tokens") for ref in config.data]
    makers = dict.fromkeys(split_ref(ref)[0] for ref in config.data)
    tokenizers = [Need(f"{m}.tokenizer", m, "data", "tokenizer", ("tokenizer",)) for m in makers]
    start = config.checkpoint
    checkpoint = [Need("checkpoint", start, "checkpoint", "checkpoint", ("megatron",))] if start else []
    return (*tokens, *tokenizers, *checkpoint)


def steps(config: TrainConfig, resources: Resources) -> tuple[Step, ...]:
    """One process a rank."""
    return (worker_step("train", resources),)


def not_built(config: TrainConfig) -> str | None:
    """Everything is built."""
    return None
