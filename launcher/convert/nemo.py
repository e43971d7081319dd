"""NeMo 1's checkpoints, as NeMo-Aligner 0.7.0 restores them: a folder, or the same as a `.nemo` archive.

    model_config.yaml      what NeMo builds the model from
    model_weights/         torch_dist, its keys beginning with `model.`
    hf/                    ours: config.json and tokenizer files; NeMo does not look at it

Keys and values are NeMo 2.1.0's (`MegatronGPTModel`, its `megatron_llama_config.yaml`); what it takes for an absent key
is GPT-2's, so every key that matters is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.models.checkpoints import carried_config, look_at
from launcher.models.formats import (
    NEMO_CONFIG,
    NEMO_PREFIX,
    NEMO_WEIGHTS,
    folded_epsilon,
    nemo_problems,
    vocabulary_unit,
)
from launcher.models.headers import MOST_CONFIG, shape_in
from launcher.models.shape import ModelShape

CONFIG, WEIGHTS, PREFIX = NEMO_CONFIG, NEMO_WEIGHTS, NEMO_PREFIX
_TARGET = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel"


def refuse(shape: ModelShape, fold: bool) -> None:
    """Raise UserError where NeMo cannot have the model, or not as it is."""
    if problems := nemo_problems(shape, fold):
        raise UserError(problems)


def architecture(shape: ModelShape) -> dict[str, Any]:
    """The keys of model_config.yaml that decide the model."""
    return {
        "mcore_gpt": True,
        "transformer_engine": True,
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.kv_channels,
        "normalization": "rmsnorm",
        "layernorm_epsilon": folded_epsilon(shape),
        "activation": "fast-swiglu",
        "bias": False,
        "position_embedding_type": "rope",
        "rotary_percentage": 1.0,
        "rotary_base": shape.rotary_base,
        "seq_len_interpolation_factor": None,
        "scale_positional_embedding": bool(shape.rope_scaling),
        **({"window_size": [shape.window_size - 1, 0]} if shape.window_size else {}),
        "share_embeddings_and_output_weights": shape.share_embeddings_and_output_weights,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "ffn_dropout": 0.0,
        "apply_query_key_layer_scaling": False,
        "make_vocab_size_divisible_by": vocabulary_unit(shape.vocab_size),
    }


def model_config(shape: ModelShape, tokenizer: Path, initializer_range: float = 0.02) -> dict[str, Any]:
    """model_config.yaml: `architecture`, and what NeMo and Aligner read without a default.

    `tokenizer` is where the tokenizer will lie when it is read; on another machine Aligner takes
    `++model.tokenizer.type=PATH`.
    """
    # NeMo goes by the tokenizer's length unless it is told the rows, which tensor parallelism must then divide.
    rows = {} if shape.vocab_size % 8 else {"override_vocab_size": shape.vocab_size}
    return {
        **architecture(shape),
        **rows,
        "encoder_seq_length": shape.max_position_embeddings,
        "max_position_embeddings": shape.max_position_embeddings,
        "init_method_std": initializer_range,
        "use_scaled_init_method": True,
        "tokenizer": {"library": "huggingface", "type": str(tokenizer), "use_fast": True},
        "precision": "bf16",
        "megatron_amp_O2": True,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "sequence_parallel": False,
        "gradient_as_bucket_view": True,
        "activations_checkpoint_granularity": None,
        "activations_checkpoint_method": None,
        "activations_checkpoint_num_layers": None,
        "activations_checkpoint_layers_per_pipeline": None,
        "bias_activation_fusion": False,
        "bias_dropout_add_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": True,
        "persist_layer_norm": True,
        "get_attention_mask_from_fusion": True,
        "use_cpu_initialization": False,
        "fp8": False,
        "seed": 1234,
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "restore_from_path": None,
        "restore_from_ckpt": None,
        "data": {},
        "optim": {"name": "fused_adam", "lr": 1e-6, "weight_decay": 0.0, "betas": [0.9, 0.98]},
        "dist_ckpt_format": "torch_dist",
        "target": _TARGET,
        "nemo_version": "2.1.0",
    }


def nemo_config_problems(path: Path) -> list[str]:
    """What the model_config.yaml of a checkpoint says otherwise than its config.json, by `check`."""
    files, config = look_at(path)[1], carried_config(path)
    if CONFIG not in files or config is None:
        return []
    try:
        span = files[CONFIG]
        check_config(span.read(MOST_CONFIG).decode(errors="replace"), str(span), shape_in(config, path))
    except UserError as error:
        return list(error.problems)
    return []


def check_config(text: str, where: str, shape: ModelShape) -> None:
    """Raise UserError naming every key of a model_config.yaml that is not the model's of config.json."""
    import yaml

    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not YAML ({str(error).splitlines()[0]}); get the checkpoint again") from None
    if not isinstance(found, dict):
        raise UserError(f"{where}: not a model's configuration; get the checkpoint again")
    problems = list(_differences(found, where, shape))
    if problems:
        raise UserError(problems)


def _differences(found: Mapping[str, Any], where: str, shape: ModelShape) -> Iterator[str]:
    wanted = architecture(shape)
    kept: tuple[str, ...] = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
    kept += ("num_query_groups", "kv_channels")
    kept += ("normalization", "layernorm_epsilon", "position_embedding_type", "rotary_base", "bias")
    kept += ("share_embeddings_and_output_weights", "scale_positional_embedding", "seq_len_interpolation_factor")
    heads, width = shape.num_attention_heads, shape.hidden_size
    absent = {"num_query_groups": heads, "kv_channels": width // heads, "rotary_base": 10000.0}
    for key in kept:
        value = found.get(key)
        value = absent.get(key) if value is None else value
        value = _number(value) if isinstance(wanted[key], float) and isinstance(value, str) else value
        value = bool(value) if isinstance(wanted[key], bool) else value
        if value != wanted[key]:
            yield f"{where}: {key} is {value}, config.json makes it {wanted[key]}; is config.json that of this model?"


def _number(text: str) -> float | str:
    """A number that YAML has read as text, such as 1e-5."""
    try:
        return float(text)
    except ValueError:
        return text
