"""NeMo-RL's GRPO: Ray's processes on their nodes, and the driver's overrides."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rl_stages import resources, rl_config, values

from launcher.rl import nemo_rl


@pytest.mark.parametrize("nodes", [1, 2, 5])
def test_ray_has_one_process_a_node_and_the_head_has_the_first(nodes: int) -> None:
    steps = nemo_rl.components(rl_config("nemo-rl"), resources(nodes=nodes))
    rays = [step for step in steps if step.role == "server"]
    covered = [n for step in rays for n in range(step.first_node, step.first_node + step.nodes)]
    assert covered == list(range(nodes)) and all(step.ntasks == step.nodes and step.gpus == 4 for step in rays)
    assert [step.name for step in steps] == ["ray-head", *(["ray-workers"] if nodes > 1 else []), "driver"]
    assert rays[0].probe is not None and all(step.cpus == 28 for step in rays)
    driver = steps[-1]
    assert (driver.nodes, driver.first_node, driver.gpus, driver.role) == (1, 0, 0, "main")


def test_head_and_workers_on_one_machine_share_no_port() -> None:
    head, workers, _ = nemo_rl.components(rl_config("nemo-rl"), resources())
    ports = [
        {w.partition("=")[2] for w in step.argv if "-port=" in w and "worker-port" not in w} for step in (head, workers)
    ]
    assert len(ports[0]) == 6 and not ports[0] & ports[1]


def test_the_driver_takes_its_numbers_from_the_recipe() -> None:
    config = rl_config("nemo-rl", importance_cap=2.0, lr=5e-7, lr_decay_style="linear", beta=0.05)
    got = values(nemo_rl.components(config, resources())[-1].argv)
    want = {
        "cluster.num_nodes": "2",
        "cluster.gpus_per_node": "4",
        "grpo.num_prompts_per_step": "8",
        "grpo.num_generations_per_prompt": "4",
        "grpo.max_num_steps": "100",
        "loss_fn.reference_policy_kl_penalty": "0.05",
        "loss_fn.use_importance_sampling_correction": "true",
        "loss_fn.truncated_importance_sampling_type": "tis",
        "loss_fn.truncated_importance_sampling_ratio": "2.0",
        "policy.train_global_batch_size": "32",
        "policy.max_total_sequence_length": "400",
        "policy.generation.max_new_tokens": "300",
        "policy.megatron_cfg.tensor_model_parallel_size": "2",
        "policy.megatron_cfg.optimizer.lr": "5e-07",
        "policy.megatron_cfg.optimizer.min_lr": "0.0",
        "policy.megatron_cfg.scheduler.lr_decay_style": "linear",
        "policy.model_name": '"{input:checkpoint}/hf"',
        "++checkpointing.pretrained_checkpoint.path": '"{input:checkpoint}"',
        "++checkpointing.pretrained_checkpoint.format": "megatron_lm",
        "checkpointing.checkpoint_must_save_by": '"00:06:10:00"',
        "++data.train.data_path": '"{input:prepare.prompts}/rl.jsonl"',
        "grpo.seed": "{seed}",
    }
    assert {key: got.get(key) for key in want} == want


def test_without_a_cap_there_is_no_correction() -> None:
    got = values(nemo_rl.components(rl_config("nemo-rl"), resources())[-1].argv)
    assert got["loss_fn.use_importance_sampling_correction"] == "false"
    assert got["loss_fn.truncated_importance_sampling_type"] == "null"


def test_what_it_does_not_do_is_refused() -> None:
    config, asked = rl_config("nemo-rl"), resources()
    assert nemo_rl.problems(config, asked) == []
    apart = replace(asked, placement="heterogeneous")
    assert "resources.placement" in dict(nemo_rl.problems(config, apart))
