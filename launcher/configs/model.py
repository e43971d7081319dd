"""A model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.configs.option import option, refuse_wrong
from launcher.spec import Family


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A model: the family and the `config.json` of its Hugging Face checkpoint. Read from `recipes/models/`."""

    name: str = option(..., "Name of the model.")
    family: Family = option(..., "Family.")
    config: Mapping[str, Any] = option(..., "The model's config.json.")
    source: str | None = option(None, "Where the weights come from: hf:ORG/NAME. None: trained from random weights.")
    init_method_std: float = option(0.02, "Standard deviation of random initial matrices.")

    def __post_init__(self) -> None:
        refuse_wrong((self.init_method_std <= 0, "init_method_std", f"must be above 0, got {self.init_method_std}"))
