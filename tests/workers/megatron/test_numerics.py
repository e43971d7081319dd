"""FP8 and deterministic mode: what is asked of megatron-core, and what is refused where it cannot be had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import train_stages as ts

from launcher.configs import DETERMINISTIC, TrainConfig
from launcher.errors import UserError
from launcher.models.families import shape_of
from launcher.spec import decode
from launcher.workers.megatron import numerics
from launcher.workers.megatron.model import transformer_config


def config(name: str = "llama-tiny", **changes: Any) -> TrainConfig:
    data = {"model": ts.model(name), "data": {"prepare/one": 1.0}, "train_iters": 1, **changes}
    return decode(TrainConfig, data)


def test_megatron_core_is_asked_for_what_the_recipe_says() -> None:
    def made(**changes: Any) -> Any:
        asked = config(**changes)
        fields = numerics.numeric_fields(asked)
        return transformer_config(shape_of(asked.model.config), precision=asked.precision, **fields)

    plain = made()
    assert (plain.fp8, plain.deterministic_mode) == (None, False)
    fp8 = made(fp8_format="hybrid", fp8_recipe="blockwise", deterministic_mode=True)
    assert (fp8.fp8, fp8.fp8_recipe, fp8.fp8_param, fp8.deterministic_mode) == ("hybrid", "blockwise", False, True)


def test_deterministic_mode_is_set_and_on_a_cpu_changes_no_bit(root: Path) -> None:
    runs = [
        ts.make_stage(root, f"deterministic-{asked}-{i}", train_iters=4, deterministic_mode=asked)
        for i, asked in enumerate((False, True, True))
    ]
    for stage in runs:
        assert ts.run(stage) == [0], ts.log(stage)
    assert [stage.record()["deterministic_mode"] for stage in runs] == [False, True, True]
    assert runs[0].losses() == runs[1].losses() == runs[2].losses()


def test_fp8_on_a_cpu_is_refused_before_anything_is_built(root: Path) -> None:
    stage = ts.make_stage(root, "fp8-on-cpu", fp8_format="hybrid", precision="bf16")
    assert ts.run(stage) == [2]
    assert "fp8_format: needs GPUs with FP8" in stage.ending()["message"]


def refused(asked: TrainConfig) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        numerics.ready(asked, shape_of(asked.model.config))
    return caught.value.problems


def test_fp8_without_transformer_engine_or_on_an_older_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU and no Transformer Engine here: what they would say of themselves stands in."""
    monkeypatch.setattr(numerics, "kernels", lambda: "torch")
    assert "Transformer Engine is not installed" in refused(config(fp8_format="hybrid"))[0]
    monkeypatch.setattr(numerics, "kernels", lambda: "transformer-engine")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    wanted = "fp8_recipe: mxfp8 needs compute capability 10.0; H100 has 9.0"
    assert refused(config(fp8_format="e4m3", fp8_recipe="mxfp8")) == (wanted,)
    for recipe in ("delayed", "tensorwise", "blockwise"):
        numerics.ready(config(fp8_format="hybrid", fp8_recipe=recipe), shape_of(config().model.config))


def test_a_gpu_stage_that_was_started_without_the_variables_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics.cpu_mode, "active", lambda: False)
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    try:
        problems = refused(config("nemotron-h-tiny", deterministic_mode=True))
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(problems) == len(DETERMINISTIC) + 1 and "mamba-ssm" in problems[-1]
    assert "deterministic_mode: the stage is started without NCCL_ALGO=Ring" in problems
