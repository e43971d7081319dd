"""The families' tables against what transformers declares and saves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import CONFIGS

from launcher.errors import UserError
from launcher.models.families import parameter_count, shape_of, tensor_map


def _saved(folder: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_a_familys_table_is_what_transformers_saves(name: str, hf_checkpoint: Callable[..., Path]) -> None:
    folder = hf_checkpoint(name)
    rows = tensor_map(shape_of(_config(folder)))
    assert {key: size for row in rows for key, size in zip(row.hf, row.hf_shapes, strict=True)} == _saved(folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_counted_as_transformers_counts_them(name: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIGS[name]))
    shape = shape_of({**json.loads(model.config.to_json_string(use_diff=False)), **CONFIGS[name]})
    assert parameter_count(shape) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["llama-tiny", "granite-tiny", "nemotron-h-tiny"])
def test_a_recipes_model_is_the_one_that_transformers_writes_back(
    name: str, hf_checkpoint: Callable[..., Path]
) -> None:
    assert shape_of(CONFIGS[name]) == shape_of(_config(hf_checkpoint(name)))


@pytest.mark.parametrize("name", CONFIGS)
def test_names_on_either_side_are_used_once(name: str, hf_checkpoint: Callable[..., Path]) -> None:
    rows = tensor_map(shape_of(_config(hf_checkpoint(name))))
    for names in ([key for row in rows for key in row.hf], [(row.layer, key) for row in rows for key in row.megatron]):
        assert len(names) == len(set(names))
    layers = {row.layer for row in rows} - {None}
    assert layers == set(range(len(layers)))


@pytest.mark.parametrize("name", CONFIGS)
def test_both_sides_of_a_row_hold_as_many_elements_but_for_padding(
    name: str, hf_checkpoint: Callable[..., Path]
) -> None:
    from math import prod

    shape = shape_of(_config(hf_checkpoint(name)))
    for row in tensor_map(shape):
        padding = (shape.padded_vocab_size - shape.vocab_size) * shape.hidden_size if row.transform == "vocab" else 0
        assert sum(map(prod, row.megatron_shapes)) == row.elements + padding


def test_modules_group_the_tensors_of_a_hybrid(hf_checkpoint: Callable[..., Path]) -> None:
    rows = tensor_map(shape_of(_config(hf_checkpoint("granite4-hybrid"))))
    by_module = {
        module: {row.layer for row in rows if row.module == module} for module in ("mamba", "attention", "mlp")
    }
    assert by_module == {"mamba": {0, 4}, "attention": {2}, "mlp": {1, 3, 5}}


def test_granite_4_without_a_position_type_has_no_positions() -> None:
    assert shape_of(CONFIGS["granite4-hybrid"]).position_embedding_type == "none"
    assert shape_of(CONFIGS["granite4-dense"]).position_embedding_type == "rope"


def test_rope_reads_the_same_from_transformers_4_and_5() -> None:
    new = CONFIGS["llama-rope3"]
    scaling = {k: v for k, v in new["rope_parameters"].items() if k != "rope_theta"}
    old = {k: v for k, v in new.items() if k != "rope_parameters"} | {"rope_theta": 500000.0, "rope_scaling": scaling}
    assert shape_of(old) == shape_of(new)
    assert shape_of(new).rotary_base == 500000.0


def _changed(name: str, **changes: Any) -> dict[str, Any]:
    return {k: v for k, v in {**CONFIGS[name], **changes}.items() if v is not ...}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "qwen3"}, "model type qwen3 is not covered; there is llama, mistral"),
        ({}, "model type None is not covered"),
        (_changed("llama", rope_parameters={"rope_type": "yarn", "factor": 4.0}), "RoPE of type yarn is not covered"),
        (_changed("llama", rope_scaling={"type": "linear", "factor": 2.0}), "RoPE of type linear is not covered"),
        (_changed("llama-rope3", rope_parameters={**CONFIGS["llama-rope3"]["rope_parameters"], "high_freq_factor": 2}),
         "RoPE's high_freq_factor is 2; megatron-core has 4.0 built in"),
        (_changed("llama", rope_parameters={"partial_rotary_factor": 0.5}), "RoPE over a part of each head"),
        (_changed("llama", hidden_size=...), "hidden_size is missing"),
        (_changed("llama", hidden_size="wide"), "values of an unexpected type"),
        (_changed("llama", attention_bias=True), "attention_bias is True; only False is covered"),
        (_changed("llama", hidden_act="gelu"), "hidden_act is gelu"),
        (_changed("mistral", sliding_window=...), "sliding_window is missing"),
        (_changed("granite4-hybrid", num_local_experts=8), "8 experts: experts are not covered"),
        (_changed("granite4-hybrid", num_local_experts=...), "num_local_experts is missing"),
        (_changed("granite4-hybrid", layer_types=...), "layer_types is missing"),
        (_changed("granite4-hybrid", mamba_d_state=...), "mamba_d_state is missing"),
        (_changed("nemotron-h-tiny", hybrid_override_pattern="M-E*M-"), "layers of kind E are not covered"),
        (_changed("nemotron-h-tiny", mlp_hidden_act="silu"), "mlp_hidden_act is silu"),
        (_changed("nemotron-h-tiny", head_dim=...), "head_dim is missing"),
        (_changed("nemotron-h-tiny", layer_norm_epsilon=1e-6), "layer_norm_epsilon is 1e-06; megatron-core has 1e-05"),
        (_changed("granite4-hybrid", rms_norm_eps=1e-6), "rms_norm_eps is 1e-06; megatron-core has 1e-05 built in"),
        (_changed("granite4-hybrid", time_step_limit=[0.001, 1.0]), "time_step_limit above 0 is not covered"),
    ],
)  # fmt: skip
def test_what_is_not_covered_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        shape_of(config)
    assert message in str(refused.value)


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(UserError) as refused:
        shape_of(_changed("llama", hidden_act="gelu", mlp_bias=True, vocab_size=...))
    assert len(refused.value.problems) == 3
