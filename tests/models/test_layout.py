"""Layouts that work pass; of those that cannot, each reason is named with its field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.configs import TrainConfig
from launcher.models.families import shape_of
from launcher.models.layout import check_layout
from launcher.spec import decode

FP8 = {"fp8_format": "hybrid"}
MODELS = Path(__file__).parents[2] / "recipes" / "models"


def problems(name: str, world_size: int, *, cpu: bool = False, **changes: Any) -> list[str]:
    """What is wrong with a model, with `changes` of the config or, by `tp`, `pp`, `cp` and `sp`, of the layout."""
    model = yaml.safe_load((MODELS / f"{name}.yaml").read_text())
    model["config"].update(changes.pop("model", {}))
    names = {"tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size", "cp": "context_parallel_size"}
    layout = {long: changes.pop(short) for short, long in names.items() if short in changes}
    layout["sequence_parallel"] = changes.pop("sp", False)
    config = {"model": model, "data": {"prepare/one": 1.0}, "train_iters": 1, "global_batch_size": 8, "seq_length": 128}
    decoded = decode(TrainConfig, {**config, "parallelism": layout, **changes})
    return check_layout(shape_of(model["config"]), decoded, world_size, cpu=cpu)


@pytest.mark.parametrize(
    ("name", "world_size", "changes"),
    [
        ("llama-tiny", 1, {}),
        ("llama-tiny", 8, {}),
        ("llama-tiny", 2, {"tp": 2, "sp": True}),
        ("granite-tiny", 3, {"pp": 3}),
        ("nemotron-h-tiny", 4, {"tp": 2, "pp": 2}),
        ("llama-tiny", 2, {"cp": 2, "document_masking": True}),
        ("nemotron-h-tiny", 2, {"tp": 2, "document_masking": True, "packing": "best-fit"}),
    ],
)
def test_layouts_that_work_pass(name: str, world_size: int, changes: dict[str, Any]) -> None:
    assert problems(name, world_size, **changes) == []


@pytest.mark.parametrize(
    ("name", "world_size", "changes", "wanted"),
    [
        ("llama-tiny", 4, {"tp": 4}, ["tensor_model_parallel_size: 4 does not divide the model's 2 query groups"]),
        (
            "nemotron-h-tiny",
            4,
            {"tp": 4},
            ["4 does not divide the model's 2 query groups", "4 does not divide the model's 2 Mamba groups"],
        ),
        ("nemotron-h-tiny", 4, {"pp": 4}, ["pipeline_model_parallel_size: 4 does not divide the model's 6 layers"]),
        ("llama-tiny", 4, {"pp": 3}, ["context parallel size is 3, which does not divide the 4 processes"]),
        (
            "llama-tiny",
            4,
            {"micro_batch_size": 4},
            ["global_batch_size: 8 is not a multiple of micro_batch_size 4 x 4"],
        ),
        ("llama-tiny", 1, {"sp": True}, ["sequence_parallel: needs tensor_model_parallel_size above 1"]),
        ("llama-tiny", 2, {"tp": 2, "sp": True, "seq_length": 127}, ["2 ranks do not divide seq_length 127"]),
        (
            "llama-tiny",
            2,
            {"cp": 2, "seq_length": 126},
            ["context_parallel_size: 2 x 2 does not divide seq_length 126"],
        ),
        ("nemotron-h-tiny", 3, {"cp": 3, "seq_length": 126}, ["3 does not divide the 8 Mamba heads", "2 Mamba groups"]),
        ("llama-tiny", 2, {"tp": 2, **FP8, "model": {"intermediate_size": 72}}, ["36 MLP columns of a rank, no"]),
        ("llama-tiny", 1, {**FP8, "seq_length": 24}, ["24 tokens of a rank, no multiple of 16, as tensorwise needs"]),
        (
            "nemotron-h-tiny",
            1,
            {**FP8, "fp8_recipe": "mxfp8", "parallelism": {"recompute": "full"}},
            ["columns of a rank's Mamba projection, no multiple of 32, as mxfp8", "not computed again whole in FP8"],
        ),
        (
            "granite-tiny",
            1,
            {"entrypoint": "pretrain_gpt.py"},
            ["entrypoint: Megatron-LM's scripts have no arguments for"],
        ),
        (
            "nemotron-h-tiny",
            2,
            {"cp": 2, "document_masking": True},
            ["document_masking: with context parallelism megatron-core's Mamba layers take only documents"],
        ),
    ],
)
def test_what_cannot_work_is_named(name: str, world_size: int, changes: dict[str, Any], wanted: list[str]) -> None:
    found = problems(name, world_size, **changes)
    assert len(found) == len(wanted)
    assert all(part in line for part, line in zip(wanted, found, strict=True))


def test_every_problem_is_told_at_once() -> None:
    found = problems("llama-tiny", 7, tp=3, pp=2)
    assert len(found) == 5  # heads, query groups, vocabulary (288 MLP columns do divide), layers, processes
    assert sum("does not divide the 7 processes" in line for line in found) == 1


def test_a_cpu_has_no_fp8() -> None:
    assert problems("llama-tiny", 1, **FP8) == []
    (problem,) = problems("llama-tiny", 1, cpu=True, **FP8)
    assert problem.startswith("fp8_format: needs GPUs with FP8, and the stage has none; leave it out")


@pytest.mark.parametrize(("stages", "empty"), [(1, []), (2, []), (4, []), (13, [0, 2, 3, 5, 6, 8, 9, 11, 12])])
def test_every_pipeline_stage_has_something_to_train(stages: int, empty: list[int]) -> None:
    found = problems("nemotron-h-8b", stages, pp=stages, trainable="attention")
    assert [p.partition(" has")[0] for p in found] == [f"trainable: pipeline stage {i} of {stages}" for i in empty]
    assert problems("nemotron-h-8b", stages, pp=stages) == []
