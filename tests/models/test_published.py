"""The models of the paper in recipes/models: parameters counted from our tables are those of the checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.configs import ModelConfig
from launcher.models.families import parameter_count, shape_of
from launcher.recipe.document import read_document
from launcher.spec import decode

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "models"
#: Parameters in units of a million, and layers in Megatron: computed by hand from the published fields.
PUBLISHED = {
    "granite-3.3-8b": (8171, 40),
    "granite-4.0-micro": (3403, 80),
    "granite-4.0-h-micro": (3191, 80),
    "nemotron-h-8b": (8101, 52),
    "mistral-7b-v0.1": (7242, 32),
    "llama-3.1-8b": (8030, 32),
    "mistral-small-24b": (23572, 40),
}


def config_of(name: str) -> dict[str, Any]:
    file = FOLDER / f"{name}.yaml"
    model = decode(ModelConfig, read_document(file, str(file)).data)
    assert model.name == name and model.config["model_type"] == model.family
    assert model.source is not None and model.source.startswith("hf:")
    return dict(model.config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_layers_are_the_published_ones(name: str) -> None:
    shape = shape_of(config_of(name))
    assert (round(parameter_count(shape) / 1e6), shape.num_layers) == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_counts_the_same_parameters_one_by_one(name: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = config_of(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert parameter_count(shape_of(config)) == sum(p.numel() for p in model.parameters())


def test_the_paper_has_seven_models_and_each_has_its_family() -> None:
    twins = {path.stem for path in FOLDER.glob("*.yaml")} - set(PUBLISHED)
    assert all(name.endswith("-tiny") for name in twins), twins


@pytest.mark.parametrize(
    ("name", "at"), [("granite-4.0-h-micro", (10, 30, 50, 70)), ("nemotron-h-8b", (7, 18, 29, 40))]
)
def test_attention_of_hybrids_is_where_the_paper_has_it(name: str, at: tuple[int, ...]) -> None:
    pattern = shape_of(config_of(name)).hybrid_override_pattern or ""
    assert tuple(i for i, kind in enumerate(pattern) if kind == "*") == at
