"""rl by TRL: the worker as a process, unbroken and broken off; what it counts and what it exports."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from worker_stages import WorkerStage, make_stage, variant

from launcher.configs import TrlRL
from launcher.progress import Stopped
from launcher.spec import decode
from launcher.workers import rl_trl, sampling
from launcher.workers.checkpoints import load_model
from launcher.workers.problems import read_problems
from launcher.workers.rl_trl import WHOLE, Tally, newest_checkpoint, reward_function, step_figures

STEPS = 6


@pytest.fixture(scope="module")
def stage(prepared: WorkerStage, taught: Path, tmp_path_factory: pytest.TempPathFactory) -> WorkerStage:
    config = {
        "backend": "trl",
        "checkpoint": "midtrain",
        "prompts": "prepare/reasoning",
        "max_steps": STEPS,
        "prompts_per_step": 4,
        "num_generations": 4,
        "lr": 1e-3,
        "warmup_steps": 2,
        "save_interval": 2,
    }
    inputs = {"checkpoint": (taught, "hf"), "prepare.prompts": (prepared.partial / "prompts", "prompts")}
    return make_stage(tmp_path_factory.mktemp("rl"), "rl", config, inputs, seed=4)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def metrics(stage: WorkerStage) -> list[dict[str, Any]]:
    lines = (stage.partial / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def outcome(stage: WorkerStage) -> tuple[list[dict[str, Any]], Any, dict[str, torch.Tensor]]:
    """All that one run has in common with another of the same stage."""
    return metrics(stage), stage.record()["rewards"], weights(stage.partial / "checkpoint")


@pytest.fixture(scope="module")
def unbroken(stage: WorkerStage) -> tuple[list[dict[str, Any]], Any, dict[str, torch.Tensor]]:
    """What the worker does as a process."""
    assert stage.run() == (0, "")
    assert stage.exit_class() == "finished"
    return outcome(stage)


def test_every_step_is_reported_and_rewards_are_counted(stage: WorkerStage, unbroken: Any) -> None:
    rows, rewards, after = unbroken
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(0 <= row["reward"] <= 1 and row["grad_norm"] >= 0 for row in rows)
    assert all(row["zero_reward_share"] == pytest.approx(1 - row["reward"]) for row in rows)
    assert [row["lr"] for row in rows[2:]] == [1e-3] * (STEPS - 2)
    assert rewards["samples"] == STEPS * 16
    assert rewards["total"] == pytest.approx(16 * sum(row["reward"] for row in rows))
    assert rewards["zeros"] == rewards["samples"] - rewards["total"]
    assert 0 < rewards["mean"] < 1
    assert not rewards["all_zero"]
    record = stage.record()
    assert record["backend"] == "trl"
    assert record["versions"]["trl"].startswith("1.16.")
    assert not equal(weights(Path(stage.spec.inputs["checkpoint"].path)), after)


def test_export_is_a_checkpoint_with_its_tokenizer(stage: WorkerStage, unbroken: Any, taught: Path) -> None:
    model, tokenizer = load_model(stage.partial / "checkpoint")
    assert equal(dict(model.state_dict()), unbroken[2])
    assert tokenizer.get_vocab() == load_model(taught)[1].get_vocab()
    saved = json.loads(stage.file("checkpoint", "generation_config.json").read_text())
    assert saved["eos_token_id"] in (tokenizer.eos_token_id, [tokenizer.eos_token_id])


def test_stop_asked_within_a_step_saves_at_its_end_and_going_on_gives_the_same(
    stage: WorkerStage, unbroken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = variant(stage, "stopped")
    job = broken.job()
    judged = 0

    def judge_then_ask(tokenizer: Any, ids: list[int]) -> Any:
        nonlocal judged
        judged += 1
        if judged == 2 * 16 + 5:  # the fifth completion of the third step
            job._asked.append(0.0)
        return sampling.completion(tokenizer, ids)

    with monkeypatch.context() as patch:
        patch.setattr(rl_trl, "completion", judge_then_ask)
        with pytest.raises(Stopped, match=f"saved after step 3 of {STEPS}"):
            rl_trl.main(job)
    start = newest_checkpoint(broken.partial / "progress")
    assert start is not None
    assert Tally.read(start).step == 3
    assert [row["step"] for row in metrics(broken)] == [1, 2, 3]
    assert not (broken.partial / "checkpoint" / "model.safetensors").exists()
    rl_trl.main(broken.job())
    rows, rewards, after = outcome(broken)
    assert (rows, rewards) == unbroken[:2]
    assert equal(after, unbroken[2])


def test_kill_goes_on_from_the_newest_whole_checkpoint(stage: WorkerStage, unbroken: Any) -> None:
    broken = variant(stage, "killed")
    progress = broken.partial / "progress"
    code, _ = broken.interrupt(lambda: (progress / "checkpoint-2" / WHOLE).exists())
    assert code == -signal.SIGKILL
    # As if it had been killed while it saved later steps: these must be neither used nor in the way.
    for step in (5, 40):
        half = progress / f"checkpoint-{step}"
        half.mkdir(exist_ok=True)
        (half / WHOLE).unlink(missing_ok=True)
        (half / "model.safetensors").write_bytes(b"half of it")
    (broken.partial / "metrics.jsonl").open("a").write('{"step": 3, "rew')
    rl_trl.main(broken.job())
    rows, rewards, after = outcome(broken)
    assert (rows, rewards) == unbroken[:2]
    assert equal(after, unbroken[2])


def test_killed_before_the_export_only_exports(stage: WorkerStage, unbroken: Any) -> None:
    last = stage.partial / "progress" / f"checkpoint-{STEPS}"
    assert Tally.read(last).step == STEPS
    for path in (stage.partial / "checkpoint").iterdir():
        path.unlink()
    rl_trl.main(stage.job())
    assert equal(outcome(stage)[2], unbroken[2])
    assert metrics(stage) == unbroken[0]


def test_rewards_that_are_all_zero_leave_every_bit_and_are_counted(stage: WorkerStage, models: dict[str, Path]) -> None:
    silent = variant(stage, "silent", max_steps=3)
    start = replace(silent.spec.inputs["checkpoint"], path=str(models["b"]))
    silent = WorkerStage(silent.root, replace(silent.spec, inputs={**silent.spec.inputs, "checkpoint": start}))
    rl_trl.main(silent.job())
    rewards = silent.record()["rewards"]
    assert (rewards["samples"], rewards["zeros"], rewards["silent_steps"]) == (48, 48, 3)
    assert rewards["all_zero"]
    assert [row["zero_reward_share"] for row in metrics(silent)] == [1.0] * 3
    assert equal(weights(silent.partial / "checkpoint"), weights(models["b"]))


def test_settings_are_the_recipes(stage: WorkerStage) -> None:
    config = {**stage.spec.config, "temperature": 0.8, "beta": 0.0, "num_iterations": 2, "clip_grad": 0.5}
    arguments = rl_trl._arguments(stage.job(), decode(TrlRL, config))
    wanted = {
        "loss_type": "dapo", "scale_rewards": "group", "beta": 0.0, "num_iterations": 2, "temperature": 0.8,
        "top_k": 0, "top_p": 1.0, "learning_rate": 1e-3, "warmup_steps": 2, "adam_beta1": 0.9, "adam_beta2": 0.95,
        "weight_decay": 0.0, "max_grad_norm": 0.5, "max_completion_length": 32, "num_generations": 4,
        "generation_batch_size": 16, "bf16": False, "fp16": False, "max_steps": STEPS, "seed": 4,
        "mask_truncated_completions": False, "importance_sampling_level": "token",
    }  # fmt: skip
    assert {name: getattr(arguments, name) for name in wanted} == wanted
    assert arguments.lr_scheduler_type == "constant_with_warmup"
    assert arguments.generation_kwargs == {"top_k": 0}


def test_reward_needs_the_end_token_that_trl_keeps(prepared: WorkerStage, taught: Path) -> None:
    _, tokenizer = load_model(taught)
    problem = read_problems(prepared.file("prompts", "reasoning.jsonl"))[0]
    tally = Tally()
    judge = reward_function({problem["prompt"]: problem}, tokenizer, tally)
    ids = tokenizer(f"<think>{problem['trace']}</think>{problem['answer']}", add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    found = judge(prompts=[problem["prompt"]] * 4, completion_ids=[[*ids, end], ids, [*ids, end, end], [end]])
    assert found == [1.0, 0.0, 1.0, 0.0]
    assert tally.batch == found
    assert tally.close_step(1) == {"zero_reward_share": 0.5}


def test_tally_ignores_further_passes_over_the_same_samples() -> None:
    tally = Tally()
    tally.batch = [0.0, 1.0, 1.0, 0.0]
    tally.close_step(1)
    assert tally.close_step(2) == {}
    tally.batch = [0.0, 0.0]
    tally.close_step(3)
    facts = tally.facts()
    assert (facts["step"], facts["samples"], facts["zeros"], facts["silent_steps"]) == (3, 6, 4, 1)
    assert facts["mean"] == pytest.approx(1 / 3)
    assert not facts["all_zero"]
    assert not Tally().facts()["all_zero"]


def test_newest_checkpoint_is_the_last_whole_one(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "absent") is None
    for step in (5, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}" / WHOLE).write_text(json.dumps({**Tally(step).values()}))
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert not (tmp_path / "checkpoint-100").exists()
    assert Tally.read(tmp_path / "checkpoint-10").step == 10


def test_figures_of_a_step_take_our_names() -> None:
    logs = {"reward": 0.25, "completions/mean_length": 11.0, "frac_reward_zero_std": 0.5, "num_tokens": 9, "epoch": 1}
    assert step_figures(logs, 7, 1.23456789) == {
        "step": 7, "seconds": 1.2346, "reward": 0.25, "mean_length": 11.0, "equal_reward_groups": 0.5
    }  # fmt: skip
