"""NeMo-RL v0.7.0: GRPO on its Megatron backend, sampling with vLLM on the same GPUs, under Ray.

One homogeneous allocation: Ray's head on the first node, its workers on the others, and the driver beside the head, as
`ray.sub` of the repository starts them. Overrides are those of `examples/configs/grpo_math_1B_megatron.yaml` there. It
starts from Megatron-LM's torch_dist checkpoint (`checkpointing.pretrained_checkpoint`, format megatron_lm), so what
mid-training made needs no conversion; tokenizer and config come from the `hf` folder in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from launcher.configs import NemoRL, Resources
from launcher.rl.parts import clock, common_problems, overrides, prompts_file
from launcher.spec import Family, Format, Probe, Step

ACCEPTS: tuple[Format, ...] = ("megatron",)
MAKES: Format = "megatron"
ALGORITHMS = ("grpo",)
ELSEWHERE: Mapping[str, str] = {}
_GRANITE = "Megatron-Bridge, which it builds models with, has no Granite"
TRAINS: tuple[Family, ...] = ("llama", "mistral", "nemotron_h")
UNTRAINED: Mapping[str, str] = {"granite": _GRANITE, "granitemoehybrid": _GRANITE}
COMPONENTS: tuple[str, ...] = ()
NOT_BUILT: str | None = (
    "our reward as an environment of NeMo-RL, waiting for all of Ray's workers, and the worker that reports NeMo-RL's "
    "progress and takes over its checkpoint"
)
#: The repository inside its image.
HOME = "/opt/nemo-rl"
_RAY = "{host:ray-head}:{port:ray-head}"


def problems(config: NemoRL, resources: Resources) -> list[tuple[str, str]]:
    """What this backend cannot do of a stage: (key, message)."""
    found = list(common_problems(config, resources))
    if resources.placement != "shared":
        found.append(("resources.placement", "Ray's nodes are of one kind: shared"))
    return found


def components(config: NemoRL, resources: Resources) -> tuple[Step, ...]:
    """Ray's head, its workers where there is more than one node, and the driver."""
    head = _ray("ray-head", ("--head", "--port={port:ray-head}"), 1, 0, resources, Probe("tcp", _RAY))
    others = resources.nodes - 1
    workers = [_ray("ray-workers", (f"--address={_RAY}",), others, 1, resources)] if others else []
    script = ("uv", "run", "--directory", HOME, "examples/run_grpo.py", "--config", _CONFIG)
    driver = Step(
        name="driver",
        argv=("env", f"RAY_ADDRESS={_RAY}", *script, *_driver(config, resources)),
        env={"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"},
        image=resources.image,
    )
    return (head, *workers, driver)


_CONFIG = "examples/configs/grpo_math_1B_megatron.yaml"


def _ray(
    name: str, where: tuple[str, ...], nodes: int, first: int, resources: Resources, probe: Probe | None = None
) -> Step:
    """One `ray start` a node, with all of its GPUs; ports are ray.sub's."""
    units = {"worker_units": resources.gpus_per_node, "slurm_managed_ray_cluster": 1}
    shift = 1 if name == "ray-head" else 0
    ports = {f"--{key}": number + shift for key, number in _PORTS.items()}
    return Step(
        name=name,
        role="server",
        argv=(
            *("ray", "start", *where, "--block", "--disable-usage-stats", f"--resources={json.dumps(units)}"),
            *(f"{key}={number}" for key, number in ports.items()),
            *("--min-worker-port=10002", "--max-worker-port=11000"),
        ),
        nodes=nodes,
        ntasks=nodes,
        gpus=resources.gpus_per_node,
        cpus=resources.cpus_per_task * resources.ntasks_per_node,
        env={"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"},
        image=resources.image,
        probe=probe,
        first_node=first,
    )


_PORTS = {
    "node-manager-port": 53001,
    "object-manager-port": 53003,
    "runtime-env-agent-port": 53005,
    "dashboard-agent-grpc-port": 53007,
    "metrics-export-port": 53009,
}


def _driver(config: NemoRL, resources: Resources) -> tuple[str, ...]:
    run = {
        "cluster.num_nodes": resources.nodes,
        "cluster.gpus_per_node": resources.gpus_per_node,
        "checkpointing.enabled": True,
        "checkpointing.checkpoint_dir": "{progress}/nemo-rl",
        "checkpointing.metric_name": None,  # without validation there is no metric to choose by
        "checkpointing.save_period": config.save_interval,
        "checkpointing.checkpoint_must_save_by": clock(resources),
        "++checkpointing.pretrained_checkpoint.path": "{input:checkpoint}",
        "++checkpointing.pretrained_checkpoint.format": "megatron_lm",
        "policy.model_name": "{input:checkpoint}/hf",
        "logger.log_dir": "{progress}/nemo-rl/logs",
        "data.train.dataset_name": "ResponseDataset",
        "++data.train.data_path": prompts_file(config),
        "++data.train.input_key": "prompt",
        "++data.train.output_key": "answer",
        "data.train.split_validation_size": 0,
        "data.default.prompt_file": None,
    }
    rest = {**_algorithm(config), **_policy(config), **_optimizer(config)}
    return (*overrides(run), "grpo.seed={seed}", *overrides(rest))


def _algorithm(config: NemoRL) -> dict[str, Any]:
    cap = config.importance_cap
    capped = {"type": "tis", "ratio": cap} if cap is not None else {"type": None, "ratio": None}
    return {
        "grpo.num_prompts_per_step": config.prompts_per_step,
        "grpo.num_generations_per_prompt": config.num_generations,
        "grpo.max_num_steps": config.max_steps,
        "grpo.max_num_epochs": config.max_steps,  # as many as it takes
        "grpo.val_period": 0,
        "grpo.normalize_rewards": True,
        "grpo.use_leave_one_out_baseline": False,
        "loss_fn.reference_policy_kl_penalty": config.beta,
        "loss_fn.token_level_loss": True,
        "loss_fn.use_importance_sampling_correction": cap is not None,
        **{f"loss_fn.truncated_importance_sampling_{key}": value for key, value in capped.items()},
    }


def _policy(config: NemoRL) -> dict[str, Any]:
    layout, megatron = config.parallelism, "policy.megatron_cfg"
    return {
        "policy.train_global_batch_size": config.prompts_per_step * config.num_generations,
        "policy.train_micro_batch_size": config.micro_batch_size,
        "policy.max_total_sequence_length": config.max_prompt_length + config.max_completion_length,
        "policy.make_sequence_length_divisible_by": layout.tensor_model_parallel_size,
        f"{megatron}.tensor_model_parallel_size": layout.tensor_model_parallel_size,
        f"{megatron}.pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
        f"{megatron}.context_parallel_size": layout.context_parallel_size,
        f"{megatron}.sequence_parallel": layout.sequence_parallel,
        f"{megatron}.activation_checkpointing": layout.recompute != "none",
        "policy.generation.max_new_tokens": config.max_completion_length,
        "policy.generation.temperature": config.temperature,
        "policy.generation.stop_strings": list(config.end_strings) or None,
        # What its recipes of hybrids (grpo-nano-v2-12b-*-megatron) say; dense models lose some speed by it.
        "policy.sequence_packing.enabled": False,
        f"{megatron}.bias_activation_fusion": False,
        "++policy.generation.vllm_kwargs.mamba_ssm_cache_dtype": "float32",
    }


def _optimizer(config: NemoRL) -> dict[str, Any]:
    optimizer, scheduler = "policy.megatron_cfg.optimizer", "policy.megatron_cfg.scheduler"
    return {
        "policy.max_grad_norm": config.clip_grad,
        f"{optimizer}.lr": config.lr,
        f"{optimizer}.min_lr": 0.0 if config.lr_decay_style == "linear" else config.lr,
        f"{optimizer}.weight_decay": config.weight_decay,
        f"{optimizer}.adam_beta1": config.adam_beta1,
        f"{optimizer}.adam_beta2": config.adam_beta2,
        f"{scheduler}.lr_decay_style": config.lr_decay_style,
        f"{scheduler}.lr_decay_iters": config.max_steps,
        f"{scheduler}.lr_warmup_iters": config.warmup_steps,
        f"{scheduler}.lr_warmup_init": 0.0,
    }
