"""Parallel layouts that cannot work, found before anything is submitted. Standard library only."""

from __future__ import annotations

from launcher.configs import TrainConfig
from launcher.models.shape import ModelShape


def check_layout(shape: ModelShape, config: TrainConfig, world_size: int, *, cpu: bool = False) -> list[str]:
    """Everything that keeps `config` from training a model of `shape` on `world_size` processes.

    Each line is `field: what is wrong, the mend`, with the field's path inside the stage. `cpu` adds what
    megatron-core without a GPU cannot do: `cpu_mode` does not reach what runs inside a backward pass, and local
    attention has no window.
    """
    return [
        *_tensor_problems(shape, config),
        *_pipeline_problems(shape, config),
        *_data_problems(config, world_size),
        *_unbuilt_problems(config),
        *(_cpu_problems(shape, config) if cpu else []),
    ]


def _tensor_problems(shape: ModelShape, config: TrainConfig) -> list[str]:
    layout = config.parallelism
    size = layout.tensor_model_parallel_size
    counts = {
        "attention heads": shape.num_attention_heads,
        "query groups": shape.num_query_groups,
        "rows of the padded vocabulary": shape.padded_vocab_size,
        "MLP columns": shape.ffn_hidden_size,
    }
    if "M" in (shape.hybrid_override_pattern or ""):
        counts |= {"Mamba heads": shape.mamba_num_heads, "Mamba groups": shape.mamba_num_groups}
    path = "parallelism.tensor_model_parallel_size"
    problems = [f"{path}: {size} does not divide the model's {n} {what}" for what, n in counts.items() if n % size]
    if layout.sequence_parallel and size == 1:
        problems.append("parallelism.sequence_parallel: needs tensor_model_parallel_size above 1")
    if layout.sequence_parallel and config.seq_length % size:
        problems.append(f"{path}: {size} does not divide seq_length {config.seq_length}, as sequence_parallel needs")
    return problems


def _pipeline_problems(shape: ModelShape, config: TrainConfig) -> list[str]:
    size = config.parallelism.pipeline_model_parallel_size
    if shape.num_layers % size == 0:
        return []
    return [f"parallelism.pipeline_model_parallel_size: {size} does not divide the model's {shape.num_layers} layers"]


def _data_problems(config: TrainConfig, world_size: int) -> list[str]:
    layout = config.parallelism
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


def _unbuilt_problems(config: TrainConfig) -> list[str]:
    if config.parallelism.context_parallel_size == 1:
        return []
    return ["parallelism.context_parallel_size: the trainer does not split sequences over ranks yet; set 1"]


def _cpu_problems(shape: ModelShape, config: TrainConfig) -> list[str]:
    problems = []
    if config.parallelism.recompute_activations:
        problems.append("parallelism.recompute_activations: needs GPUs; on a CPU set false")
    if shape.window_size is not None and shape.window_size < config.seq_length:
        problems.append(
            f"seq_length: {config.seq_length} is above the model's sliding window of {shape.window_size}, "
            "and attention on a CPU has none; lower it"
        )
    return problems
