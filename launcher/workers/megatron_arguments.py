"""A train stage as the command line of Megatron-LM's own scripts, `pretrain_gpt.py` and `pretrain_mamba.py`.

The arguments' names are those of megatron/training/arguments.py. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.configs import TrainConfig
from launcher.errors import UserError
from launcher.models.layout import chosen_layout, script_problems
from launcher.models.shape import ModelShape


@dataclass(frozen=True)
class Paths:
    """What a script reads and writes. `data` maps a token file's prefix to its weight.

    `load` is where it goes on from: its own `save` folder, or, with `is_start`, weights that training starts from.
    """

    data: Mapping[str, float]
    tokenizer: Path
    save: Path
    load: Path | None
    is_start: bool


def script_arguments(config: TrainConfig, shape: ModelShape, seed: int, paths: Paths) -> tuple[str, ...]:
    """Every argument, as words. Raises UserError for what the scripts cannot do."""
    if problems := script_problems(shape, config):
        raise UserError(problems)
    options = {**_model(shape), **_layout(config), **_training(config, seed), **_files(config, paths)}
    words: list[str] = []
    for name, value in options.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            words += [f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return (*words, *config.entrypoint_args)


def _model(shape: ModelShape) -> dict[str, object]:
    hybrid = shape.hybrid_override_pattern is not None
    rope = shape.position_embedding_type == "rope"
    scaling = shape.rope_scaling or {}
    options: dict[str, object] = {
        "num-layers": shape.num_layers,
        "hidden-size": shape.hidden_size,
        "ffn-hidden-size": shape.ffn_hidden_size,
        "num-attention-heads": shape.num_attention_heads,
        "group-query-attention": True,
        "num-query-groups": shape.num_query_groups,
        "kv-channels": shape.kv_channels,
        "max-position-embeddings": shape.max_position_embeddings,
        "position-embedding-type": shape.position_embedding_type,
        "rotary-base": int(shape.rotary_base) if rope else None,
        "use-rope-scaling": bool(scaling),
        "rope-scaling-factor": scaling.get("factor"),
        "normalization": "RMSNorm",
        "norm-epsilon": shape.norm_epsilon,
        "swiglu": shape.gated_linear_unit,
        "squared-relu": shape.activation == "squared_relu",
        "untie-embeddings-and-output-weights": not shape.share_embeddings_and_output_weights,
        "disable-bias-linear": True,
        "attention-dropout": 0.0,
        "hidden-dropout": 0.0,
        "vocab-size": shape.vocab_size,
        "make-vocab-size-divisible-by": shape.make_vocab_size_divisible_by,
        "window-size": f"{shape.window_size - 1},0" if shape.window_size else None,
    }
    if hybrid:
        options |= {
            "is-hybrid-model": True,
            "hybrid-override-pattern": shape.hybrid_override_pattern,
            "mamba-state-dim": shape.mamba_state_dim,
            "mamba-head-dim": shape.mamba_head_dim,
            "mamba-num-groups": shape.mamba_num_groups,
            "mamba-num-heads": shape.mamba_num_heads,
            "spec": ("megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"),
        }
    return options


def _layout(config: TrainConfig) -> dict[str, object]:
    layout = chosen_layout(config)
    return {
        "tensor-model-parallel-size": layout.tensor_model_parallel_size,
        "pipeline-model-parallel-size": layout.pipeline_model_parallel_size,
        "context-parallel-size": layout.context_parallel_size,
        "sequence-parallel": layout.sequence_parallel,
        "recompute-granularity": {"none": None, "mlp": "selective", "full": "full"}[layout.recompute],
        "recompute-modules": ("mlp",) if layout.recompute == "mlp" else None,
        "recompute-method": "uniform" if layout.recompute == "full" else None,
        "recompute-num-layers": 1 if layout.recompute == "full" else None,
        "use-distributed-optimizer": True,
        "bf16": config.precision == "bf16",
        "fp8-format": config.fp8_format,
        "fp8-recipe": config.fp8_recipe if config.fp8_format else None,
        "deterministic-mode": config.deterministic_mode,
    }


def _training(config: TrainConfig, seed: int) -> dict[str, object]:
    style = "WSD" if config.lr_decay_style == "exponential" else config.lr_decay_style
    samples = round(config.train_iters * (1 - config.lr_warmup_fraction))
    return {
        "seq-length": config.seq_length,
        "micro-batch-size": config.micro_batch_size,
        "global-batch-size": config.global_batch_size,
        "train-iters": config.train_iters,
        "lr": config.lr,
        "min-lr": config.lr * config.min_lr_ratio,
        "lr-decay-style": style,
        "lr-wsd-decay-style": "exponential" if style == "WSD" else None,
        "lr-wsd-decay-iters": samples if style == "WSD" else None,
        "lr-warmup-fraction": config.lr_warmup_fraction,
        "weight-decay": config.weight_decay,
        "adam-beta1": config.adam_beta1,
        "adam-beta2": config.adam_beta2,
        "adam-eps": config.adam_eps,
        "clip-grad": config.clip_grad,
        "seed": seed,
        "eval-iters": 0,
        "log-interval": config.log_interval,
        "save-interval": config.save_interval,
    }


def _files(config: TrainConfig, paths: Paths) -> dict[str, object]:
    blend = tuple(word for prefix, weight in paths.data.items() for word in (str(weight), prefix))
    return {
        "data-path": blend,
        "split": "1,0,0",
        "tokenizer-type": "HuggingFaceTokenizer",
        "tokenizer-model": paths.tokenizer,
        "save": paths.save,
        "load": paths.load,
        "finetune": paths.is_start and paths.load is not None,
        "no-load-optim": paths.is_start and paths.load is not None,
        "no-load-rng": paths.is_start and paths.load is not None,
        "ckpt-format": "torch_dist",
        # TERM makes the scripts save and stop after the step.
        "exit-signal-handler": True,
    }
