"""The families that are covered: a config.json to a shape, a shape to its table of tensors. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from types import ModuleType
from typing import Any

from launcher.errors import UserError
from launcher.models import dense, granitemoehybrid, nemotron_h
from launcher.models.shape import ModelShape
from launcher.models.tensors import TensorMap
from launcher.spec import Family

#: `model_type` of config.json to the module with `shape_of` and `tensor_map`.
FAMILIES: dict[Family, ModuleType] = {
    "llama": dense,
    "mistral": dense,
    "granite": dense,
    "granitemoehybrid": granitemoehybrid,
    "nemotron_h": nemotron_h,
}

#: No size or factor of a model is as large.
_MOST = 1 << 40
#: Nor has any so many layers: a table of their tensors is made.
_MOST_LAYERS = 10_000
#: Keys that say how many experts a model has.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a config.json describes. Raises UserError, naming what is not covered."""
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        experts = next((n for key in _EXPERTS if isinstance(n := config.get(key), int) and n), 0)
        also = f", nor are its {experts} experts" if experts else ""
        raise UserError(f"model type {family} is not covered{also}; there is {', '.join(FAMILIES)}{_inside(config)}")
    try:
        shape: ModelShape = FAMILIES[family].shape_of(config)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError):
        raise UserError(f"model type {family}: config.json has values of an unexpected type") from None
    if problems := list(_wrong_values(shape)):
        raise UserError(f"model type {family}: {problem}" for problem in problems)
    return shape


def _inside(config: Mapping[str, Any]) -> str:
    """Advice on a model of several parts one of which is covered, as of text and images."""
    for key in ("text_config", "llm_config", "language_config"):
        part = config.get(key)
        if isinstance(part, Mapping) and (inner := part.get("model_type")) in FAMILIES:
            return (
                f". Its {key} is of model type {inner}, which is: save that part alone (in Python, the model's "
                f"language_model), its tensors under the names of {inner} and its {key} as config.json"
            )
    return ""


def _wrong_values(shape: ModelShape) -> Iterator[str]:
    """What no model has, in Megatron's names: a file that is damaged, or a slip of the pen in a recipe."""
    for field in fields(shape):
        value = getattr(shape, field.name)
        if field.type == "int":
            least = 0 if field.name.startswith("mamba_") else 1
            most = _MOST_LAYERS if field.name == "num_layers" else _MOST
            if type(value) is not int or value < least:
                yield f"{field.name} is {value!r}; a whole number of at least {least} is expected"
            elif value > most:
                yield f"{field.name} is {value!r}; at most {most} are expected"
        elif field.type.startswith("float") and value is not None and not (_is_number(value) and 0 < value < _MOST):
            yield f"{field.name} is {value!r}; a number above 0 is expected"
    heads, groups = shape.num_attention_heads, shape.num_query_groups
    if type(heads) is type(groups) is int and groups > 0 and heads % groups:
        yield f"num_query_groups: {groups} does not divide the {heads} attention heads"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def tensor_map(shape: ModelShape) -> tuple[TensorMap, ...]:
    """Every tensor of a model, in the model's order; tied output weights appear once, as the embedding."""
    rows: tuple[TensorMap, ...] = FAMILIES[shape.family].tensor_map(shape)
    return rows


def parameter_count(shape: ModelShape) -> int:
    """Parameters of the model as its Hugging Face checkpoint has them: no padding, tied weights once."""
    return sum(row.elements for row in tensor_map(shape))
