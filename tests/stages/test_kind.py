"""What each stage kind says of its stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.configs import CONFIGS, with_value
from launcher.recipe.load import load_recipes
from launcher.spec import KINDS, decode
from launcher.stages import kinds

PREPARE: dict[str, Any] = {
    "tokenizer": {"path": "/tok"},
    "sources": {
        "own.text": {"kind": "files", "path": "/text"},
        "library": {"kind": "python-stdlib"},
        "hub": {"kind": "dataset", "path": "hf:org/name"},
    },
    "problems": {"math": {"path": "/math", "count": 3}, "sums": {"count": 3}},
}


def test_every_kind_of_the_contract_is_there_with_a_config() -> None:
    assert tuple(kinds()) == KINDS == tuple(CONFIGS)


def test_what_a_stage_reads_outside_the_store_is_named_by_key() -> None:
    config = decode(CONFIGS["prepare"], PREPARE)
    found = {outside.key: outside.path for outside in kinds()["prepare"].outside(config)}
    assert found == {
        ("sources", "own.text", "path"): "/text",
        ("sources", "hub", "path"): "hf:org/name",
        ("problems", "math", "path"): "/math",
        ("tokenizer", "path"): "/tok",
    }
    for key in found:
        moved = with_value(config, key, "/elsewhere")
        assert "/elsewhere" in {outside.path for outside in kinds()["prepare"].outside(moved)} and moved != config


@pytest.mark.parametrize("name", ["demo", "prism/llama-3.1-8b"])
def test_paths_are_found_from_the_stages_folder(name: str, tmp_path: Path) -> None:
    (recipe,) = load_recipes(name)
    for stage in recipe.stages.values():
        paths = [o.path for o in kinds()[stage.kind].outside(stage.config)]
        assert all(Path(path).is_absolute() for path in paths)


def test_a_model_is_found_through_what_trains_on_it() -> None:
    (recipe,) = load_recipes(
        "demo", ["stages.sum={kind: merge, checkpoints: [midtrain, rl-from-base], weights: [1, 1]}"]
    )
    assert [name for name, _ in recipe.models_of("rl-from-midtrain")] == ["midtrain"]
    assert [name for name, _ in recipe.models_of("sum")] == ["midtrain", "base"]
    assert recipe.models_of("/data/models/other") == ()
