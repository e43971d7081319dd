"""`run_config.yaml`, which Megatron-Bridge builds the model from: it lies beside the tensors, in `release/`.

Names and values are those that Bridge itself saves, as of 0.3.1 and 0.6.2 (megatron/bridge/models/gpt_provider.py,
mamba/mamba_provider.py; read by training/model_load_save.py). What is left out has the same default in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from launcher.models.shape import ModelShape
from launcher.models.torch_dist import checkpoint_dir

RUN_CONFIG = "run_config.yaml"
#: Bridge has none for Granite: its multipliers are no fields of megatron-core's config.
_PROVIDERS = {
    "llama": "megatron.bridge.models.gpt_provider.GPTModelProvider",
    "mistral": "megatron.bridge.models.gpt_provider.GPTModelProvider",
    "nemotron_h": "megatron.bridge.models.mamba.mamba_provider.MambaModelProvider",
}
_ACTIVATIONS = {"silu": "torch.nn.functional.silu", "squared_relu": "megatron.core.activations.squared_relu"}


def write(folder: Path, shape: ModelShape, dtype: torch.dtype, config: Mapping[str, Any]) -> None:
    """Write the file into a checkpoint of weights in `dtype`; none for a family that Bridge does not know.

    `config` is the model's config.json, of which only the spread of random weights is used. A file that is there,
    as another program's scripts write it, stays.
    """
    if shape.family not in _PROVIDERS or (folder / RUN_CONFIG).exists():
        return
    import yaml

    found = run_config(shape, dtype, config.get("initializer_range"))
    (folder / RUN_CONFIG).write_text(yaml.safe_dump(found, sort_keys=False), encoding="utf-8")


def write_beside(folder: Path, shape: ModelShape, dtype: torch.dtype, config: Mapping[str, Any]) -> None:
    """The same beside the tensors of the newest checkpoint in a folder of format `megatron`."""
    write(checkpoint_dir(folder), shape, dtype, config)


def run_config(shape: ModelShape, dtype: torch.dtype, initializer_range: object = None) -> dict[str, Any]:
    """What Bridge reads of a checkpoint of `shape` with weights of `dtype`; its tokenizer is passed by hand."""
    model = {"_target_": _PROVIDERS[shape.family], **_architecture(shape), **_types(dtype)}
    if isinstance(initializer_range, float):
        model["init_method_std"] = initializer_range
    tokenizer = {
        "_target_": "megatron.bridge.training.tokenizers.config.TokenizerConfig",
        "tokenizer_type": "HuggingFaceTokenizer",
    }
    saved = {"save_optim": False, "save_rng": False, "fully_parallel_save": False, "ckpt_format": "torch_dist"}
    return {"model": model, "tokenizer": tokenizer, "checkpoint": saved}


def _architecture(shape: ModelShape) -> dict[str, Any]:
    rope = shape.position_embedding_type == "rope"
    scaling = shape.rope_scaling or {}
    found: dict[str, Any] = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.kv_channels,
        "seq_length": shape.max_position_embeddings,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.norm_epsilon,
        "gated_linear_unit": shape.gated_linear_unit,
        "activation_func": _named(_ACTIVATIONS[shape.activation]),
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "position_embedding_type": shape.position_embedding_type,
        "share_embeddings_and_output_weights": shape.share_embeddings_and_output_weights,
        "vocab_size": shape.vocab_size,
        "should_pad_vocab": True,
        "make_vocab_size_divisible_by": shape.make_vocab_size_divisible_by,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
    }
    if rope:
        found |= {"rotary_base": shape.rotary_base, "rope_scaling": bool(scaling)}
    if scaling:
        found["rope_scaling_factor"] = scaling["factor"]
    if shape.window_size:
        found["window_size"] = [shape.window_size - 1, 0]  # a window of w is the token itself and w - 1 before it
    if shape.hybrid_override_pattern is not None:
        found |= {
            "is_hybrid_model": True,
            "hybrid_override_pattern": shape.hybrid_override_pattern,
            "mamba_state_dim": shape.mamba_state_dim,
            "mamba_head_dim": shape.mamba_head_dim,
            "mamba_num_heads": shape.mamba_num_heads,
            "mamba_num_groups": shape.mamba_num_groups,
        }
    return found


def _types(dtype: torch.dtype) -> dict[str, Any]:
    return {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16, "params_dtype": _named(str(dtype))}


def _named(name: str) -> dict[str, Any]:
    """A function or constant of Python, as Bridge writes one."""
    return {"_target_": name, "_call_": False}
