"""NeMo-Aligner 0.7.0, its last release: REINFORCE with a leave-one-out baseline, and a reward server beside the actor.

Overrides are those of `examples/nlp/gpt/conf/gpt_reinforce_actor.yaml` at tag v0.7.0. The reward server answers at
PyTriton's HTTP port under the model name `reward_model`: tokens int64 (B, S) and sequence_lengths int64 (B, 1) give
rewards float32 (B, 1). It loads the policy's tokenizer and finds a sample's problem by its prompt's tokens, since
nothing else travels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.configs import AlignerRL, Resources
from launcher.rl.parts import clock, common_problems, component_step, data_parallel_size, overrides, prompts_file
from launcher.spec import Family, Format, Probe, Step

ACCEPTS: tuple[Format, ...] = ("nemo",)
MAKES: Format = "nemo"
ALGORITHMS = ("reinforce",)
ELSEWHERE: Mapping[str, str] = {
    "grpo": "it is in no release; reinforce with its leave-one-out baseline is the nearest",
    "ppo": "its critic starts from a reward model, which no stage makes",
}
_HYBRID = "its actors are Megatron's GPT models, which have no Mamba layers"
_GRANITE = "NeMo 2.1 has none of Granite's four multipliers, and with them folded into its weights it learns otherwise"
TRAINS: tuple[Family, ...] = ("llama", "mistral")
UNTRAINED: Mapping[str, str] = {
    "granite": _GRANITE,
    "granitemoehybrid": f"{_HYBRID} and none of Granite's multipliers",
    "nemotron_h": _HYBRID,
}
COMPONENTS = ("reward-server",)
NOT_BUILT: str | None = (
    "the reward server, prompts with the key `text`, and the worker that reports NeMo-Aligner's progress and takes "
    "over its checkpoint"
)
#: The repository inside the image: its wheel holds no scripts.
EXAMPLES = "/opt/NeMo-Aligner/examples/nlp/gpt"
#: `exp_manager.name`: the checkpoint is NAME.nemo in `checkpoints/` under explicit_log_dir.
NAME = "megatron_gpt_reinforce_actor"


def problems(config: AlignerRL, resources: Resources) -> list[tuple[str, str]]:
    """What this backend cannot do of a stage: (key, message)."""
    found = list(common_problems(config, resources))
    if not config.end_strings:
        message = "is required: a sample that ends with none of them is masked out of the loss without a word"
        found.append(("end_strings", message))
    if config.parallelism.context_parallel_size != 1:
        found.append(("parallelism.context_parallel_size", "NeMo-Aligner's REINFORCE does not split sequences; set 1"))
    if config.parallelism.recompute != "none":
        found.append(("parallelism.recompute", "is not passed on to NeMo-Aligner; leave it out"))
    return found


def components(config: AlignerRL, resources: Resources) -> tuple[Step, ...]:
    """The reward server and the actor, whose ranks are srun's."""
    server = component_step(
        resources,
        COMPONENTS,
        "reward-server",
        ("{python}", "-m", "launcher.workers.reward_server", "{stage_json}", "--port={port:reward-server}"),
        Probe("http", "http://{host:reward-server}:{port:reward-server}/v2/models/reward_model/ready"),
    )
    actor = Step(
        name="actor",
        argv=("python", "-u", f"{EXAMPLES}/train_gpt_reinforce_actor.py", *_actor(config, resources)),
        nodes=resources.nodes,
        ntasks=resources.nodes * resources.ntasks_per_node,
        gpus=resources.gpus_per_node,
        cpus=resources.cpus_per_task,
        env={"HYDRA_FULL_ERROR": "1"},
        image=resources.image,
        het_group=0 if resources.placement == "heterogeneous" else None,
    )
    return server, actor


def _actor(config: AlignerRL, resources: Resources) -> tuple[str, ...]:
    files = {split: [prompts_file(config)] for split in ("train", "validation", "test")}
    run = {
        "trainer.num_nodes": resources.nodes,
        "trainer.devices": resources.ntasks_per_node,
        "pretrained_checkpoint.restore_from_path": "{input:checkpoint}",
        "exp_manager.name": NAME,
        "exp_manager.explicit_log_dir": "{progress}/actor",
        "++exp_manager.max_time_per_run": clock(resources),
        "model.data.data_prefix": files,
        # A tokenizer is never packed into a NeMo checkpoint: it names a folder.
        "++model.tokenizer.type": "{input:checkpoint}/hf",
    }
    address = ("remote_rm.reward_model.ip={host:reward-server}", "remote_rm.reward_model.port={port:reward-server}")
    rest = {**_trainer(config), **_model(config, resources), **_optimizer(config)}
    return (*overrides(run), *address, "model.seed={seed}", *overrides(rest))


def _trainer(config: AlignerRL) -> dict[str, Any]:
    return {
        "trainer.reinforce.max_steps": config.max_steps,
        "trainer.reinforce.max_epochs": config.max_steps,  # as many as it takes
        "trainer.reinforce.val_check_interval": config.save_interval,
        "trainer.reinforce.save_interval": config.save_interval,
        "trainer.reinforce.gradient_clip_val": config.clip_grad,
        "trainer.reinforce.initial_policy_kl_penalty": config.beta,
        "trainer.reinforce.num_rollouts_per_prompt": config.num_generations,
        "trainer.reinforce.rollout_batch_seq_length": _length(config),
        # TensorRT-LLM's export leaves out Llama 3.1's RoPE scaling: it would sample from another model.
        "trainer.reinforce.trt_llm.enable": False,
    }


def _model(config: AlignerRL, resources: Resources) -> dict[str, Any]:
    layout = config.parallelism
    a_rank = max(1, config.prompts_per_step // max(1, data_parallel_size(config, resources)))
    return {
        "++model.tensor_model_parallel_size": layout.tensor_model_parallel_size,
        "++model.pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
        "model.sequence_parallel": layout.sequence_parallel,
        "model.encoder_seq_length": _length(config),
        "model.micro_batch_size": config.micro_batch_size,
        "model.global_batch_size": config.prompts_per_step * config.num_generations,
        "model.reinforce.num_rollout_samples": config.prompts_per_step,
        "model.reinforce.rollout_micro_batch_size": a_rank,
        "model.reinforce.forward_micro_batch_size": config.micro_batch_size,
        "model.reinforce.length_params.max_length": config.max_completion_length,
        "model.reinforce.sampling_params.temperature": config.temperature,
        "model.reinforce.sampling_params.end_strings": list(config.end_strings),
    }


def _optimizer(config: AlignerRL) -> dict[str, Any]:
    common = {
        "model.optim.lr": config.lr,
        "model.optim.weight_decay": config.weight_decay,
        "model.optim.betas": [config.adam_beta1, config.adam_beta2],
        "model.optim.sched.warmup_steps": config.warmup_steps,
    }
    if config.lr_decay_style == "constant":  # a cosine between equal ends
        return {**common, "model.optim.sched.constant_steps": 0, "model.optim.sched.min_lr": config.lr}
    linear = {"name": "PolynomialDecayAnnealing", "warmup_steps": config.warmup_steps, "min_lr": 0.0, "power": 1.0}
    # The whole of `sched` is replaced: this schedule takes no constant_steps.
    return {**{k: v for k, v in common.items() if "sched" not in k}, "~model.optim.sched": None} | {
        "+model.optim.sched": linear
    }


def _length(config: AlignerRL) -> int:
    return config.max_prompt_length + config.max_completion_length
