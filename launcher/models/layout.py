"""Parallel layouts that cannot work, found before anything is submitted. Standard library only."""

from __future__ import annotations

from launcher.configs import Parallelism, TrainConfig
from launcher.models.shape import ModelShape

#: Sides of Granite that Megatron-LM's arguments have no words for.
_MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")


def check_layout(shape: ModelShape, config: TrainConfig, world_size: int, *, cpu: bool = False) -> list[str]:
    """Everything that keeps `config` from training a model of `shape` on `world_size` processes.

    Each line is `field: what is wrong, the mend`, with the field's path inside the stage. `cpu` adds what cannot be
    without a GPU.
    """
    layout = chosen_layout(config)
    return [
        *(f"parallelism.{p}" for p in split_problems(shape, layout, config.seq_length)),
        *_data_problems(config, world_size),
        *(_fp8_problems(shape, config, cpu) if config.fp8_format else ()),
        *_masking_problems(shape, config),
        *_trainable_problems(shape, config),
        *(script_problems(shape, config) if config.entrypoint else ()),
    ]


def chosen_layout(config: TrainConfig) -> Parallelism:
    """The layout of a stage that is planned."""
    assert config.parallelism != "auto", "`launcher.fit.auto` chooses before anything is checked"
    return config.parallelism


def split_problems(shape: ModelShape, layout: Parallelism, seq_length: int) -> list[str]:
    """Why a model and its sequences cannot be split so; each line starts with the size's name.

    The rules are megatron-core 0.16.1's.
    """
    return [
        *_tensor_problems(shape, layout, seq_length),
        *_pipeline_problems(shape, layout),
        *_context_problems(shape, layout, seq_length),
    ]


def _tensor_problems(shape: ModelShape, layout: Parallelism, seq_length: int) -> list[str]:
    size, both = layout.tensor_model_parallel_size, layout.tensor_model_parallel_size * layout.context_parallel_size
    counts = {
        "attention heads": shape.num_attention_heads,
        "query groups": shape.num_query_groups,
        "rows of the padded vocabulary": shape.padded_vocab_size,
        "MLP columns": shape.ffn_hidden_size,
    }
    if shape.has_mamba:
        counts |= {"Mamba heads": shape.mamba_num_heads, "Mamba groups": shape.mamba_num_groups}
    path = "tensor_model_parallel_size"
    problems = [f"{path}: {size} does not divide the model's {n} {what}" for what, n in counts.items() if n % size]
    if layout.sequence_parallel and size == 1:
        problems.append("sequence_parallel: needs tensor_model_parallel_size above 1")
    if layout.sequence_parallel and seq_length % both:
        problems.append(f"{path}: {both} ranks do not divide seq_length {seq_length}, as sequence_parallel needs")
    return problems


def _pipeline_problems(shape: ModelShape, layout: Parallelism) -> list[str]:
    size = layout.pipeline_model_parallel_size
    if shape.num_layers % size == 0:
        return []
    return [f"pipeline_model_parallel_size: {size} does not divide the model's {shape.num_layers} layers"]


def _context_problems(shape: ModelShape, layout: Parallelism, seq_length: int) -> list[str]:
    size, path = layout.context_parallel_size, f"context_parallel_size: {layout.context_parallel_size}"
    if size == 1:
        return []
    problems = []
    if seq_length % (2 * size):
        problems.append(f"{path} x 2 does not divide seq_length {seq_length}")
    if shape.has_mamba:
        heads = shape.mamba_num_heads // layout.tensor_model_parallel_size
        groups = max(1, shape.mamba_num_groups // layout.tensor_model_parallel_size)
        if heads % size:
            problems.append(f"{path} does not divide the {heads} Mamba heads of a rank")
        if groups % size and size % groups:
            problems.append(f"{path} and the {groups} Mamba groups of a rank do not divide one another")
    return problems


def _fp8_problems(shape: ModelShape, config: TrainConfig, cpu: bool) -> list[str]:
    """Both sides of every FP8 product are multiples of 16, of MXFP8's of 32: `get_fp8_align_size` of megatron-core."""
    if cpu:
        return ["fp8_format: needs GPUs with FP8, and the stage has none; leave it out, or ask for gpus_per_node"]
    layout, unit = chosen_layout(config), 32 if config.fp8_recipe == "mxfp8" else 16
    tp = layout.tensor_model_parallel_size
    channels = shape.num_attention_heads * shape.kv_channels
    sides = {
        "hidden size": shape.hidden_size,
        "attention channels of a rank": channels // tp,
        "query, key and value channels of a rank": (channels + 2 * shape.num_query_groups * shape.kv_channels) // tp,
        "MLP columns of a rank": shape.ffn_hidden_size // tp,
        "tokens of a rank": config.micro_batch_size * config.seq_length // layout.context_parallel_size,
    }
    if layout.sequence_parallel:
        sides["tokens of a rank"] //= tp
    if shape.has_mamba:
        inner = shape.mamba_num_heads * shape.mamba_head_dim
        sides["Mamba channels of a rank"] = inner // tp
        projected = 2 * inner + 2 * shape.mamba_num_groups * shape.mamba_state_dim + shape.mamba_num_heads
        sides["columns of a rank's Mamba projection"] = projected // tp
    problems = [
        f"fp8_format: {n} {what}, no multiple of {unit}, as {config.fp8_recipe} needs"
        for what, n in sides.items()
        if n % unit
    ]
    if layout.recompute == "full" and shape.hybrid_override_pattern is not None:
        problems.append("fp8_format: a hybrid model's layers are not computed again whole in FP8; set recompute mlp")
    return problems


def _masking_problems(shape: ModelShape, config: TrainConfig) -> list[str]:
    if not (config.document_masking and shape.has_mamba and chosen_layout(config).context_parallel_size > 1):
        return []
    return [
        "document_masking: with context parallelism megatron-core's Mamba layers take only documents whose lengths "
        "the ranks divide; set context_parallel_size 1, or document_masking false"
    ]


def _data_problems(config: TrainConfig, world_size: int) -> list[str]:
    layout = chosen_layout(config)
    model_ranks = layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size * layout.context_parallel_size
    if world_size % model_ranks:
        return [
            f"parallelism: tensor x pipeline x context parallel size is {model_ranks}, "
            f"which does not divide the {world_size} processes of nodes x ntasks_per_node"
        ]
    replicas = world_size // model_ranks
    if config.global_batch_size % (config.micro_batch_size * replicas):
        return [
            f"global_batch_size: {config.global_batch_size} is not a multiple of micro_batch_size "
            f"{config.micro_batch_size} x {replicas} data-parallel replicas"
        ]
    return []


def _trainable_problems(shape: ModelShape, config: TrainConfig) -> list[str]:
    """Every pipeline stage must hold something to train: megatron-core's optimizer has no parameters otherwise."""
    pattern, stages = shape.hybrid_override_pattern, chosen_layout(config).pipeline_model_parallel_size
    if config.trainable == "all" or pattern is None or len(pattern) % stages:
        return []
    size = len(pattern) // stages
    parts = [pattern[i * size : (i + 1) * size] for i in range(stages)]
    return [
        f"trainable: pipeline stage {i} of {stages} has no attention layer ({part}); take a smaller "
        "pipeline_model_parallel_size, or train all"
        for i, part in enumerate(parts)
        if "*" not in part
    ]


def script_problems(shape: ModelShape, config: TrainConfig) -> list[str]:
    """What Megatron-LM's own scripts, of core_v0.16.1, have no arguments for, or drop without a word."""
    problems = []
    odd = [name for name in _MULTIPLIERS if getattr(shape, name) != 1.0]
    if odd or shape.attention_multiplier is not None:
        problems.append(
            f"entrypoint: Megatron-LM's scripts have no arguments for {shape.family}'s multipliers "
            f"({', '.join(odd or ['attention_multiplier'])}); leave entrypoint out for this model"
        )
    factor = (shape.rope_scaling or {}).get("factor", 8.0)
    if factor != 8.0:  # `gpt_builders.py` passes --use-rope-scaling on, and not --rope-scaling-factor
        problems.append(
            f"entrypoint: Megatron-LM's scripts take no rope scaling factor but 8, and this model has {factor:g}; "
            "leave entrypoint out for this model"
        )
    if shape.hybrid_override_pattern and chosen_layout(config).recompute == "full":
        problems.append(
            "parallelism.recompute: Megatron-LM's scripts ignored full for hybrid models up to megatron-core 0.16.1; "
            "set mlp or none, or the arguments in entrypoint_args"
        )
    return problems
