"""`parallelism: auto` in a recipe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_fit_layouts import GRANITE_H, LLAMA

from launcher.configs import Parallelism, Resources, TrainConfig
from launcher.errors import UserError
from launcher.fit.auto import choose, with_layouts
from launcher.recipe.load import load_recipes
from launcher.spec import decode
from tests.test_cli import prism

GPUS = Resources(nodes=4, ntasks_per_node=8, gpus_per_node=8)


def config(model: dict[str, Any] = LLAMA, **changes: Any) -> TrainConfig:
    data = {
        "model": {"name": "m", "family": model["model_type"], "config": model}, "data": {"a/b": 1.0},
        "train_iters": 10, "parallelism": "auto", **changes,
    }  # fmt: skip
    return decode(TrainConfig, data)


def test_the_first_layout_that_fits_is_taken() -> None:
    assert choose(config(), GPUS, "h100-80gb") == Parallelism(tensor_model_parallel_size=2, sequence_parallel=True)
    assert choose(config(GRANITE_H), GPUS, "h100-80gb").tensor_model_parallel_size == 1
    assert choose(config(), GPUS, "h200-141gb").tensor_model_parallel_size == 1


def test_a_layout_that_the_stage_could_not_train_on_is_not_taken() -> None:
    long = {"model": GRANITE_H, "seq_length": 131072, "global_batch_size": 32}
    assert choose(config(**long), GPUS, "h100-80gb").context_parallel_size > 1
    with pytest.raises(UserError, match="nothing fits|no layout can work"):
        choose(config(**long, document_masking=True), GPUS, "h100-80gb")


def test_without_gpus_there_is_nothing_to_fit_into() -> None:
    assert choose(config(), Resources(ntasks_per_node=2), None) == Parallelism()


@pytest.mark.parametrize(
    ("changes", "resources", "gpu", "message"),
    [
        ({}, GPUS, None, "set `gpu` in the cluster's profile"),
        ({}, Resources(ntasks_per_node=1, gpus_per_node=1), "h100-80gb", "nothing fits on 1 × h100-80gb"),
        ({"global_batch_size": 4}, replace(GPUS, nodes=3), "h100-80gb", "no layout can work on 24 GPUs"),
        ({}, Resources(nodes=4, gpus_per_node=8), "h100-80gb", "ntasks_per_node is 1, must be gpus_per_node, 8"),
        ({"fp8_format": "hybrid"}, GPUS, "h100-80gb", "auto does not count the memory of FP8"),
        ({}, GPUS, "h100", "did you mean h100-80gb?"),
    ],
)
def test_what_cannot_be_chosen_says_why(
    changes: dict[str, Any], resources: Resources, gpu: str | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        choose(config(**changes), resources, gpu)


RECIPE = """
model: {name: m, family: llama, config: %s}
stages:
  prepare:
    kind: prepare
    sources: {text: {kind: files, path: text.txt}}
  one:
    kind: train
    data: {prepare/text: 1.0}
    train_iters: 4
    parallelism: %s
    resources: {nodes: 4, ntasks_per_node: 8, gpus_per_node: 8}
"""


def test_a_recipe_says_auto_and_its_fingerprint_does_not_depend_on_it(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text\n" * 50)
    (tmp_path / "r.yaml").write_text(RECIPE % (json.dumps(LLAMA), "auto"))
    (recipe,) = load_recipes(tmp_path / "r.yaml")
    assert recipe.stages["one"].config.parallelism == "auto"
    with pytest.raises(UserError, match=r"r\.yaml:11: stages\.one\.parallelism: auto needs"):
        with_layouts(recipe, None)
    assert with_layouts(recipe, "h100-80gb").stages["one"].config.parallelism.tensor_model_parallel_size == 2
    (tmp_path / "site.yaml").write_text("scheduler: slurm\ngpu: h100-80gb\n")
    plans = []
    for layout in ("auto", "{pipeline_model_parallel_size: 2}"):
        (tmp_path / "r.yaml").write_text(RECIPE % (json.dumps(LLAMA), layout))
        done = prism("plan", str(tmp_path / "r.yaml"), "--cluster", str(tmp_path / "site.yaml"), "--json")
        assert done.returncode == 0, done.stderr
        plans.append(json.loads(done.stdout)[0]["stages"][1]["fingerprint"])
    assert plans[0] == plans[1]
