"""The families' tables against what transformers declares and saves."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from real_models import PARAMETERS, REAL, twin
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


@pytest.mark.parametrize("name", REAL)
def test_the_table_of_a_real_model_is_what_transformers_declares(name: str) -> None:
    """Names and shapes of all tensors, as transformers' own module has them and would name them in a file."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**REAL[name]))
    declared = {key: tuple(t.shape) for key, t in revert_weight_conversion(model, model.state_dict()).items()}
    if REAL[name]["tie_word_embeddings"]:
        del declared["lm_head.weight"]  # a file holds tied weights once
    shape = shape_of(REAL[name])
    assert {key: s for row in tensor_map(shape) for key, s in zip(row.hf, row.hf_shapes, strict=True)} == declared
    assert parameter_count(shape) == pytest.approx(PARAMETERS[name], rel=2e-4)


@pytest.mark.parametrize("name", REAL)
def test_a_twin_has_the_shape_class_of_the_real_model(name: str) -> None:
    real, small = shape_of(REAL[name]), shape_of(twin(name))
    for key in (
        "family",
        "share_embeddings_and_output_weights",
        "position_embedding_type",
        "rope_scaling",
        "embedding_multiplier",
        "attention_multiplier",
        "logits_scaling",
        "activation",
        "rotary_base",
    ):
        assert getattr(small, key) == getattr(real, key), key
    for truth in (
        lambda s: s.window_size is None,
        lambda s: s.num_query_groups < s.num_attention_heads,
        lambda s: s.kv_channels * s.num_attention_heads == s.hidden_size or s.family == "nemotron_h",
        lambda s: set(s.hybrid_override_pattern or ""),
        lambda s: min(s.mamba_num_groups, 2),
    ):
        assert truth(small) == truth(real)


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
    rows = tensor_map(shape_of(_config(hf_checkpoint("granite-4.0-h-micro-base"))))
    by_module = {
        module: {row.layer for row in rows if row.module == module} for module in ("mamba", "attention", "mlp")
    }
    assert by_module == {"mamba": {0, 4, 6}, "attention": {2}, "mlp": {1, 3, 5, 7}}


def test_granite_4_without_a_position_type_has_no_positions() -> None:
    assert shape_of(CONFIGS["granite-4.0-h-micro-base"]).position_embedding_type == "none"
    assert shape_of(CONFIGS["granite-4.0-micro-base"]).position_embedding_type == "rope"


def test_rope_reads_the_same_from_transformers_4_and_5() -> None:
    old = CONFIGS["Llama-3.1-8B"]
    rope = {**old["rope_scaling"], "rope_theta": old["rope_theta"]}
    new = {k: v for k, v in old.items() if k not in ("rope_scaling", "rope_theta")} | {"rope_parameters": rope}
    assert (shape_of(new).rotary_base, shape_of(new).rotary_base) == (500000.0, shape_of(old).rotary_base)
    assert {**shape_of(old).rope_scaling, "rope_theta": 500000.0} == {**shape_of(new).rope_scaling}


#: What transformers 4 writes, key by key, where 5 writes another; what 5 writes is in the twins' config.json.
_OLD_KEYS = {
    "rope_theta": lambda c: c["rope_parameters"]["rope_theta"],
    "rope_scaling": lambda c: {**c["rope_parameters"]} if c["rope_parameters"]["rope_type"] != "default" else None,
    "torch_dtype": lambda c: c["dtype"],
    "layer_types": lambda c: [_OLD_LAYERS[kind] for kind in c["layer_types"]],
}
_OLD_LAYERS = {"linear_attention": "mamba", "full_attention": "attention", "mamba": "mamba", "attention": "attention"}
_NEW_KEYS = ("rope_parameters", "dtype", "layers_block_type")


@pytest.mark.parametrize("name", REAL)
def test_a_model_reads_the_same_from_the_keys_of_transformers_4_and_5(
    name: str, hf_checkpoint: Callable[..., Path]
) -> None:
    new = _config(hf_checkpoint(name))
    old = {key: value for key, value in new.items() if key not in _NEW_KEYS}
    if name.startswith("Nemotron"):
        assert "layers_block_type" in new and "head_dim" in new
        old |= {"hybrid_override_pattern": twin(name)["hybrid_override_pattern"]}
        del old["head_dim"]  # the published file has `attention_head_dim`
    else:
        wanted = [k for k in _OLD_KEYS if k != "layer_types" or "granite-4" in name]
        old |= {key: _OLD_KEYS[key](new) for key in wanted}
    assert old.keys() != new.keys()
    shapes = [{**vars(shape_of(config))} for config in (old, new)]
    for shape in shapes:
        shape["rope_scaling"] = {k: v for k, v in (shape["rope_scaling"] or {}).items() if k != "rope_theta"}
    assert shapes[0] == shapes[1]


_LLAMA3 = CONFIGS["Llama-3.1-8B"]["rope_scaling"]


def _changed(name: str, **changes: Any) -> dict[str, Any]:
    return {k: v for k, v in {**CONFIGS[name], **changes}.items() if v is not ...}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mixtral", "num_local_experts": 8}, "mixtral is not covered, nor are its 8 experts"),
        ({"model_type": "qwen3"}, "model type qwen3 is not covered; there is llama, mistral"),
        ({}, "model type None is not covered"),
        (_changed("llama", rope_parameters={"rope_type": "yarn", "factor": 4.0}), "RoPE of type yarn is not covered"),
        (_changed("llama", rope_scaling={"type": "linear", "factor": 2.0}), "RoPE of type linear is not covered"),
        (_changed("Llama-3.1-8B", rope_scaling={**_LLAMA3, "high_freq_factor": 2}),
         "RoPE's high_freq_factor is 2; megatron-core has 4.0 built in"),
        (_changed("Llama-3.1-8B", rope_scaling={k: v for k, v in _LLAMA3.items() if k != "factor"}),
         "RoPE's factor is missing"),
        (_changed("Mistral-7B-v0.1", rope_scaling=_LLAMA3, max_position_embeddings=...), "max_position_embeddings is"),
        (_changed("granite-4.0-micro-base", rope_scaling=_LLAMA3), "RoPE scaling is not there for hybrid models"),
        (_changed("llama", rope_parameters={"partial_rotary_factor": 0.5}), "RoPE over a part of each head"),
        (_changed("llama", partial_rotary_factor=0.5), "RoPE over a part of each head"),
        (_changed("llama", rope_parameters={"full_attention": {"rope_theta": 1e6}}), "for each kind of layer is not"),
        (_changed("llama", hidden_size=...), "hidden_size is missing"),
        (_changed("llama", hidden_size="wide"), "values of an unexpected type"),
        (_changed("llama", attention_bias=True), "attention_bias is True; only False is covered"),
        (_changed("llama", hidden_act="gelu"), "hidden_act is gelu"),
        (_changed("Mistral-7B-v0.1", sliding_window=...), "sliding_window is missing"),
        (_changed("granite-4.0-h-micro-base", num_local_experts=8), "8 experts: experts are not covered"),
        (_changed("granite-4.0-h-micro-base", num_local_experts=...), "num_local_experts is missing"),
        (_changed("granite-4.0-h-micro-base", layer_types=...), "layer_types is missing"),
        (_changed("granite-4.0-h-micro-base", mamba_d_state=...), "mamba_d_state is missing"),
        (_changed("nemotron-h-tiny", hybrid_override_pattern="M-E*M-"), "layers of kind E are not covered"),
        (_changed("nemotron-h-tiny", time_step_limit=[0.01, 1.0]), "time_step_limit above 0 is not covered"),
        (_changed("nemotron-h-tiny", mlp_hidden_act="silu"), "mlp_hidden_act is silu"),
        (_changed("nemotron-h-tiny", head_dim=...), "head_dim is missing"),
        (_changed("nemotron-h-tiny", attention_head_dim=99), "head_dim and attention_head_dim differ"),
        (_changed("nemotron-h-tiny", layer_norm_epsilon=1e-6), "layer_norm_epsilon is 1e-06; megatron-core has 1e-05"),
        (_changed("granite-4.0-h-micro-base", rms_norm_eps=1e-6), "rms_norm_eps is 1e-06; megatron-core has 1e-05"),
        (_changed("granite-4.0-h-micro-base", time_step_limit=[0.001, 1.0]), "time_step_limit above 0 is not covered"),
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


@pytest.mark.parametrize("value", ["x", "5", -1, 0, 1.5, True, [], {}, {"a": 1}, [None], 1e99, 10**25, float("nan")])
@pytest.mark.parametrize("name", REAL)
def test_no_value_of_a_config_is_met_with_a_traceback_or_taken_for_a_size(name: str, value: Any) -> None:
    config = twin(name)
    for key in (*config, "rope_parameters", "rope_scaling", "head_dim", "time_step_limit"):
        try:
            shape = shape_of({**config, key: value})
        except UserError as error:
            assert "model type" in str(error)
        else:
            sizes = {field.name: getattr(shape, field.name) for field in fields(shape) if field.type == "int"}
            assert all(type(size) is int and 0 <= size < 1 << 40 for size in sizes.values()), (key, sizes)
