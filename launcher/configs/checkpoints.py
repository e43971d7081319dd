"""Conversion and merging of checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from launcher.configs.option import option, refuse_wrong
from launcher.spec import Format


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """A checkpoint in another format: port `checkpoint`. Inserted by the plan; never written in a recipe."""

    checkpoint: str = option(..., "The checkpoint to convert.")
    source: Format = option(..., "Its format.")
    target: Format = option(..., "The format wanted.")
    verify: bool = option(True, "Round trip, bit by bit.", identity=False)


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """A linear combination of checkpoints of one model: port `checkpoint`. Config, tokenizer and types are the first's.

    PRISM, section 8.1: 0.15 of the base and 0.85 of the mid-trained model, before the context is made long again.
    """

    checkpoints: tuple[str, ...] = option(..., "Checkpoints to add up, two or more.")
    weights: tuple[float, ...] = option(..., "Their weights, in the same order; they should add up to 1.")
    format: Literal["megatron", "hf"] = option(
        "megatron", "Format to read and write; megatron where training follows, hf where RL by trl or evaluation does."
    )
    verify: bool = option(True, "Read back what was written and compare.", identity=False)

    def __post_init__(self) -> None:
        named, weights = self.checkpoints, self.weights
        counts = f"{len(weights)} for {len(named)} checkpoints; one for each"
        refuse_wrong(
            (len(named) < 2, "checkpoints", f"names {len(named)}; two or more are added up"),
            (len(set(named)) < len(named), "checkpoints", "names one twice"),
            (len(weights) != len(named), "weights", counts),
            (not any(weights), "weights", "are all 0"),
        )
