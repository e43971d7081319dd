"""A recipe: YAML read into frozen values. `load` reads and merges files, `schema` checks them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.configs import ModelConfig, Resources
from launcher.spec import Kind
from launcher.stages import kinds


@dataclass(frozen=True)
class Stage:
    """One stage as the recipe wrote it; `config` is the kind's dataclass of `launcher.configs`."""

    name: str
    kind: Kind
    config: Any
    resources: Resources
    seed: int


@dataclass(frozen=True)
class Recipe:
    """A recipe after `base:`, `matrix:` and `--set`: one run. `name` is the run's name.

    `overrides` are the matrix' and `--set`'s, as `key=value`; `resolved` is the whole recipe as plain data;
    `positions` maps a dotted path (`stages.midtrain.lr`) to `file:line`; `secrets` names variables of the shell.
    """

    name: str
    path: str
    seed: int
    stages: Mapping[str, Stage]
    overrides: tuple[str, ...]
    resolved: Mapping[str, Any]
    positions: Mapping[str, str]
    secrets: tuple[str, ...] = ()

    def where(self, path: str) -> str:
        """`file:line` of a dotted path, or of its nearest parent that the file holds."""
        while path and path not in self.positions:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return self.positions.get(path, self.path)

    def models_of(self, ref: str) -> tuple[tuple[str, ModelConfig], ...]:
        """The stages that a checkpoint reference goes back to, with the models that they train; none for a path."""
        if ref not in self.stages:
            return ()
        kind, config = kinds()[self.stages[ref].kind], self.stages[ref].config
        if (model := kind.model(config)) is not None:
            return ((ref, model),)
        return tuple(found for earlier in kind.lineage(config) for found in self.models_of(earlier))
