"""Options that no CPU shows to be wrong: each is right on a GPU too, as far as a CPU can tell."""

from __future__ import annotations

import types
from functools import partial
from typing import Any

import pytest
import torch
from real_models import twin

import launcher.workers.megatron  # noqa: F401  must come before megatron.core
from launcher.configs import Parallelism
from launcher.models.families import shape_of
from launcher.workers.megatron import layers, model, parallel

WINDOW, PLAIN = shape_of(twin("Mistral-7B-v0.1")), shape_of(twin("Llama-3.1-8B"))


@pytest.mark.parametrize(
    ("shape", "size", "way"),
    [(WINDOW, 2, "all_gather"), (WINDOW, 8, "all_gather"), (WINDOW, 1, None), (PLAIN, 4, None)],
)
def test_keys_of_a_window_are_gathered_over_context_parallel_ranks(shape: Any, size: int, way: str | None) -> None:
    """Transformer Engine asserts that they are not passed on from rank to rank, which is the default."""
    assert model.transformer_config(shape, Parallelism(context_parallel_size=size)).cp_comm_type == way


def test_norms_without_transformer_engine_are_built_where_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    config = model.transformer_config(PLAIN)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("meta"))
    assert layers.RMSNorm(config, 64).weight.device.type == "meta"


@pytest.fixture
def with_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers believe that there is a GPU with Transformer Engine, a C compiler, and no Apex."""
    monkeypatch.setattr(layers, "cpu_mode", types.SimpleNamespace(active=lambda: False))
    monkeypatch.setattr(layers.shutil, "which", lambda _: "/usr/bin/cc")
    found = {"transformer_engine": True, "fused_weight_gradient_mlp_cuda": None}
    monkeypatch.setattr(layers.importlib.util, "find_spec", lambda name: found.get(name))


@pytest.mark.usefixtures("with_engine")
@pytest.mark.parametrize("pipeline", [1, 4])
def test_what_transformer_engine_fuses_needs_no_apex(pipeline: int) -> None:
    on = {n for n, v in layers.fusions(PLAIN, Parallelism(pipeline_model_parallel_size=pipeline)).items() if v}
    assert {"gradient_accumulation_fusion", "cross_entropy_loss_fusion", "apply_rope_fusion"} <= on
    assert ("deallocate_pipeline_outputs" in on) == (pipeline > 1)


@pytest.mark.usefixtures("with_engine")
@pytest.mark.parametrize("asked", [True, False])
def test_what_is_not_deterministic_is_not_fused_where_bits_must_be_the_same(
    asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "TransformerConfig", types.SimpleNamespace)  # the real one looks for the kernels
    config = model.transformer_config(PLAIN, precision="bf16", deterministic_mode=asked)
    assert config.cross_entropy_loss_fusion == (not asked)
    assert layers.fusions(PLAIN, deterministic=asked)["cross_entropy_loss_fusion"] == (not asked)


def test_the_plain_output_layer_is_built_beside_fused_ones() -> None:
    """megatron-core refuses to build its own linear layers with the fusion on where Apex is missing."""
    config = model.transformer_config(PLAIN)
    config.gradient_accumulation_fusion = True
    make = partial(layers.ColumnParallelLinear, 8, 8, config=config, init_method=torch.nn.init.zeros_, bias=False)
    with parallel.process_groups():
        with pytest.raises(RuntimeError, match="fused_weight_gradient_mlp_cuda"):
            make()
        with layers.unfused_accumulation(config) as built:
            built.append(torch.nn.Sequential(make()))
        assert not built[0][0].gradient_accumulation_fusion
        with pytest.raises(RuntimeError, match="fused_weight_gradient_mlp_cuda"):
            make()
