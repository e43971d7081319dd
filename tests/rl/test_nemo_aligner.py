"""NeMo-Aligner's REINFORCE: the actor's overrides and the reward server's contract."""

from __future__ import annotations

from typing import Any

import pytest
from rl_stages import resources, rl_config, values

from launcher.rl import nemo_aligner
from launcher.spec import SpecError


def test_the_actor_takes_its_numbers_from_the_recipe() -> None:
    config = rl_config("nemo-aligner", beta=0.05, lr=5e-7, warmup_steps=3, temperature=0.7, save_interval=20)
    server, actor = nemo_aligner.components(config, resources())
    got = values(actor.argv)
    assert actor.argv[2].endswith("/train_gpt_reinforce_actor.py")
    assert (actor.nodes, actor.ntasks, actor.gpus, actor.cpus) == (2, 8, 4, 7)
    want = {
        "trainer.num_nodes": "2",
        "trainer.devices": "4",
        "trainer.reinforce.max_steps": "100",
        "trainer.reinforce.num_rollouts_per_prompt": "4",
        "trainer.reinforce.initial_policy_kl_penalty": "0.05",
        "trainer.reinforce.save_interval": "20",
        "model.global_batch_size": "32",
        "model.reinforce.num_rollout_samples": "8",
        "model.reinforce.rollout_micro_batch_size": "2",
        "model.encoder_seq_length": "400",
        "model.reinforce.length_params.max_length": "300",
        "model.reinforce.sampling_params.temperature": "0.7",
        "model.reinforce.sampling_params.end_strings": '["</s>"]',
        "model.optim.lr": "5e-07",
        "model.optim.sched.warmup_steps": "3",
        "model.optim.sched.min_lr": "5e-07",
        "++model.tensor_model_parallel_size": "2",
        "++exp_manager.max_time_per_run": '"00:06:10:00"',
        "remote_rm.reward_model.ip": "{host:reward-server}",
        "remote_rm.reward_model.port": "{port:reward-server}",
        "model.seed": "{seed}",
    }
    assert {key: got.get(key) for key in want} == want
    assert (server.name, server.role, actor.role) == ("reward-server", "server", "main")


def test_a_linear_schedule_replaces_the_whole_one() -> None:
    _, actor = nemo_aligner.components(rl_config("nemo-aligner", lr_decay_style="linear", warmup_steps=3), resources())
    got = values(actor.argv)
    assert "~model.optim.sched" in got and "model.optim.sched.warmup_steps" not in got
    assert got["+model.optim.sched"] == "{name:PolynomialDecayAnnealing,warmup_steps:3,min_lr:0.0,power:1.0}"


def test_the_server_is_probed_as_triton_answers() -> None:
    server, _ = nemo_aligner.components(rl_config("nemo-aligner"), resources())
    assert server.probe is not None and server.probe.kind == "http"
    assert server.probe.target.endswith(":{port:reward-server}/v2/models/reward_model/ready")
    assert server.argv[-1] == "--port={port:reward-server}"


def test_in_a_heterogeneous_job_the_actor_is_the_first_part() -> None:
    asked = resources(placement="heterogeneous", components={"reward-server": {"nodes": 1}})
    server, actor = nemo_aligner.components(rl_config("nemo-aligner"), asked)
    assert (server.het_group, actor.het_group) == (1, 0)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"end_strings": []}, "end_strings"),
        ({"parallelism": {"context_parallel_size": 2}}, "parallelism.context_parallel_size"),
        ({"parallelism": {"recompute": "full"}}, "parallelism.recompute"),
    ],
)
def test_what_it_does_not_do_is_refused(changes: dict[str, Any], key: str) -> None:
    assert key in dict(nemo_aligner.problems(rl_config("nemo-aligner", **changes), resources()))
    assert nemo_aligner.problems(rl_config("nemo-aligner"), resources()) == []


@pytest.mark.parametrize(("key", "value", "able"), [("num_iterations", 2, "trl"), ("importance_cap", 2.0, "nemo-rl")])
def test_what_other_backends_know_is_refused_with_their_name(key: str, value: Any, able: str) -> None:
    with pytest.raises(SpecError) as caught:
        rl_config("nemo-aligner", **{key: value})
    assert caught.value.problems == ((key, f"backend nemo-aligner does not know it; backend {able} does"),)
