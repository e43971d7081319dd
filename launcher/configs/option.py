"""What the fields of a config say beside their type, and what follows from it: identity, defaults, checks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, field, fields, replace
from typing import Any

from launcher.spec import SpecError, encode

#: Sources and problem sets are files of their names: no separator, no leading dot.
ITEM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}")


def option(default: Any, doc: str, *, identity: bool = True) -> Any:
    """A dataclass field with its documentation; `...` as default means that the field is required."""
    metadata = {"doc": doc, "identity": identity}
    if default is ...:
        return field(metadata=metadata)
    if isinstance(default, Mapping):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def adam_checks(config: Any) -> tuple[tuple[bool, str, str], ...]:
    """Checks of the keys that AdamW has in training and in RL."""
    betas, least = ("adam_beta1", "adam_beta2"), ("weight_decay", "clip_grad")
    values = {name: getattr(config, name) for name in (*betas, *least)}
    return (
        *((not 0 <= values[n] < 1, n, f"must be within 0..1, below 1, got {values[n]}") for n in betas),
        *((values[n] < 0, n, f"must not be negative, got {values[n]}") for n in least),
        (config.lr <= 0, "lr", f"must be above 0, got {config.lr}"),
    )


def refuse_wrong(*checks: tuple[bool, str, str]) -> None:
    """Raise SpecError for every (wrong, field, message) that is wrong."""
    problems = [(name, message) for wrong, name, message in checks if wrong]
    if problems:
        raise SpecError(problems)


def identity(value: Any) -> Any:
    """The plain-JSON part of a config that decides what a stage computes.

    Left out are fields marked identity=False and values equal to their default, so that a key that is added later moves
    no fingerprint. A default that changes, or its meaning, raises the kind's VERSION.
    """
    if hasattr(value, "__dataclass_fields__"):
        kept: list[Any] = [f for f in fields(value) if f.metadata.get("identity", True)]
        return {f.name: identity(v) for f in kept if (v := getattr(value, f.name)) != default_of(f)}
    if isinstance(value, Mapping):
        return {str(k): identity(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [identity(v) for v in value]
    return encode(value)


def default_of(f: Any) -> Any:
    """A field's default, or MISSING where it is required."""
    if f.default is not MISSING:
        return f.default
    factory: Callable[[], Any] = f.default_factory
    return MISSING if f.default_factory is MISSING else factory()


def with_value(config: Any, key: tuple[str, ...], value: Any) -> Any:
    """A config with another value at a path of field and mapping names."""
    head, *rest = key
    if isinstance(config, Mapping):
        return {**config, head: with_value(config[head], tuple(rest), value) if rest else value}
    return replace(config, **{head: with_value(getattr(config, head), tuple(rest), value) if rest else value})
