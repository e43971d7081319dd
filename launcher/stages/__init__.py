"""The stage kinds, one module each: what a config reads, the ports it fills, and the steps that do it."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from launcher.stages import analyze, convert, evaluate, merge, prepare, rl, train

_KINDS = {
    "prepare": prepare,
    "train": train,
    "convert": convert,
    "merge": merge,
    "rl": rl,
    "evaluate": evaluate,
    "analyze": analyze,
}


def kinds() -> Mapping[str, ModuleType]:
    """Every stage kind's module by name."""
    return _KINDS
