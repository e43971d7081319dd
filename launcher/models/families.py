"""The families that are covered: a config.json to a shape, a shape to its table of tensors. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from launcher.errors import UserError
from launcher.models import dense, granitemoehybrid, nemotron_h
from launcher.models.shape import ModelShape
from launcher.models.tensors import TensorMap

#: `model_type` of config.json to the module with `shape_of` and `tensor_map`.
FAMILIES: dict[str, ModuleType] = {
    "llama": dense,
    "mistral": dense,
    "granite": dense,
    "granitemoehybrid": granitemoehybrid,
    "nemotron_h": nemotron_h,
}

#: Keys that say how many experts a model has.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a config.json describes. Raises UserError, naming what is not covered."""
    family = config.get("model_type")
    if family not in FAMILIES:
        experts = next((n for key in _EXPERTS if isinstance(n := config.get(key), int) and n), 0)
        also = f", nor are its {experts} experts" if experts else ""
        raise UserError(f"model type {family} is not covered{also}; there is {', '.join(FAMILIES)}")
    shape: ModelShape = FAMILIES[family].shape_of(config)
    return shape


def tensor_map(shape: ModelShape) -> tuple[TensorMap, ...]:
    """Every tensor of a model, in the model's order; tied output weights appear once, as the embedding."""
    rows: tuple[TensorMap, ...] = FAMILIES[shape.family].tensor_map(shape)
    return rows


def parameter_count(shape: ModelShape) -> int:
    """Parameters of the model as its Hugging Face checkpoint has them: no padding, tied weights once."""
    return sum(row.elements for row in tensor_map(shape))
