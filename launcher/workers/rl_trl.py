"""rl by TRL: GRPO on a Hugging Face checkpoint with the rule reward. Labelled `trl` in every record and report."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.configs import TrlRL
from launcher.errors import UserError, WorldError
from launcher.progress import StageJob, Stopped, run_worker
from launcher.references import item_of, port_of
from launcher.store import sync_tree, write_json
from launcher.workers.problems import Problem, reward
from launcher.workers.sampling import completion

if TYPE_CHECKING:
    from transformers import (
        PreTrainedModel,
        PreTrainedTokenizerBase,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )
    from trl import GRPOConfig, GRPOTrainer

    from launcher.workers.checkpoints import Loaded

#: The mark of a trainer checkpoint that is whole; written last.
WHOLE = "whole.json"


def main(job: StageJob) -> None:
    """Fill the port `checkpoint` (format hf); go on from the newest whole trainer checkpoint there is."""
    import torch

    from launcher.workers.checkpoints import load_checkpoint, quiet, save_checkpoint

    config: TrlRL = job.config(TrlRL)
    problems = _problems(job, config)
    quiet()
    start = newest_checkpoint(job.workdir / "progress")
    tally = Tally.read(start) if start else Tally()
    job.truncate_metrics("step", tally.step)
    loaded = load_checkpoint(start or job.input("checkpoint"), described_in=job.input("checkpoint"))
    if tally.step < config.max_steps:
        torch.manual_seed(job.spec.seed)
        trainer = _trainer(job, config, loaded.model, loaded.tokenizer, problems, tally)
        trainer.train(resume_from_checkpoint=str(start) if start else None)
    if tally.step < config.max_steps:
        if not job.stop_requested:
            raise WorldError(f"TRL ended after step {tally.step} of {config.max_steps}, and nothing asked it to")
        raise Stopped(f"saved after step {tally.step} of {config.max_steps}")
    save_checkpoint(loaded, job.input("checkpoint"), job.output("checkpoint"))
    job.record(
        backend="trl",
        settings=_settings(config, loaded),
        rewards=tally.facts(),
        versions={name: _version(name) for name in ("trl", "transformers", "torch", "reasoning_gym")},
        cpu_mode=not _has_cuda(),
    )


def _version(name: str) -> str:
    from importlib.metadata import version

    return version(name)


def _settings(config: TrlRL, loaded: Loaded) -> dict[str, Any]:
    """What the receipt says of how completions were drawn."""
    return {
        "temperature": config.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "repetition_penalty": 1.0,
        "eos_token_id": loaded.tokenizer.eos_token_id,
        "added_to_every_text": None,
        "dropout": 0.0,
        "set_aside": list(loaded.set_aside),
    }


def _problems(job: StageJob, config: TrlRL) -> list[dict[str, Any]]:
    """The problems, one a prompt. Raises UserError where they are too few for a step: TRL takes whole steps alone."""
    from launcher.workers.problems import read_problems

    path = job.input(port_of(config.prompts, "prompts")) / f"{item_of(config.prompts)}.jsonl"
    found = list({p["prompt"]: p for p in read_problems(path)}.values())
    if len(found) < config.prompts_per_step:
        raise UserError(
            f"{path}: {len(found)} different prompts, fewer than the {config.prompts_per_step} of a step; "
            "lower prompts_per_step or ask for more problems"
        )
    return found


class Tally:
    """Rewards counted over the whole of training, across attempts."""

    def __init__(self, step: int = 0, samples: int = 0, zeros: int = 0, total: float = 0.0, silent_steps: int = 0):
        self.step, self.samples, self.zeros, self.total = step, samples, zeros, total
        self.silent_steps = silent_steps
        self.batch: list[float] = []

    @classmethod
    def read(cls, folder: Path) -> Tally:
        """The tally as it was at a checkpoint."""
        return cls(**json.loads((folder / WHOLE).read_text(encoding="utf-8")))

    def values(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        names = ("step", "samples", "zeros", "total", "silent_steps")
        return {name: getattr(self, name) for name in names}

    def close_step(self, step: int) -> dict[str, float]:
        """Count the rewards since the last step; returns that step's share of zeros."""
        rewards, self.batch = self.batch, []
        self.step = step
        self.samples += len(rewards)
        self.zeros += sum(r == 0 for r in rewards)
        self.total += sum(rewards)
        if not rewards:
            return {}  # a further pass over samples that were counted before
        self.silent_steps += not any(rewards)
        return {"zero_reward_share": sum(r == 0 for r in rewards) / len(rewards)}

    def facts(self) -> dict[str, float]:
        """What the receipt says."""
        mean = self.total / self.samples if self.samples else 0.0
        return {**self.values(), "mean": mean, "all_zero": self.samples > 0 and self.zeros == self.samples}


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest trainer checkpoint that is whole; those that are not are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    for path in found:
        if not (path / WHOLE).exists():
            shutil.rmtree(path)
    whole = [p for p in found if (p / WHOLE).exists()]
    return whole[-1] if whole else None


def _trainer(
    job: StageJob,
    config: TrlRL,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    tally: Tally,
) -> GRPOTrainer:
    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback, ProgressCallback
    from trl import GRPOTrainer

    by_prompt = {p["prompt"]: p for p in problems}
    tokenizer.split_special_tokens = True  # special tokens that a prompt spells are text
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward_function(by_prompt, tokenizer, tally),
        args=_arguments(job, config),
        train_dataset=Dataset.from_list([{"prompt": p} for p in by_prompt]),
        processing_class=tokenizer,
        callbacks=[_callback(job, config, tally)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def reward_function(
    by_prompt: Mapping[str, Problem], tokenizer: PreTrainedTokenizerBase, tally: Tally
) -> Callable[..., list[float]]:
    """The rule reward as TRL calls it. TRL keeps the end token in `completion_ids`; one without it was cut off."""

    def answer_and_format(prompts: list[str], completion_ids: list[list[int]], **_: object) -> list[float]:
        rewards = []
        for prompt, ids in zip(prompts, completion_ids, strict=True):
            done = completion(tokenizer, ids)
            rewards.append(reward(done.text, by_prompt[prompt], done.ended))
        tally.batch += rewards
        return rewards

    return answer_and_format


def _arguments(job: StageJob, config: TrlRL) -> GRPOConfig:
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=str(job.workdir / "progress"),
        num_generations=config.num_generations,
        per_device_train_batch_size=config.prompts_per_step * config.num_generations,
        max_steps=config.max_steps,
        learning_rate=config.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=config.warmup_steps,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        weight_decay=config.weight_decay,
        max_grad_norm=config.clip_grad,
        max_completion_length=config.max_completion_length,
        temperature=config.temperature,
        beta=config.beta,
        num_iterations=config.num_iterations,
        use_cpu=not _has_cuda(),
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        logging_steps=1,
        save_strategy="steps",
        save_steps=config.save_interval,
        save_total_limit=2,
        seed=job.spec.seed,
        disable_tqdm=True,
        dataloader_num_workers=0,
        router_aux_loss_coef=0.0,  # TRL 1.16 asks hybrid Granite configs for experts that they do not have
        top_p=1.0,
        repetition_penalty=1.0,
        generation_kwargs={"top_k": 0},
        shuffle_dataset=True,
    )


def _has_cuda() -> bool:
    from launcher.workers.devices import require_cuda

    return require_cuda()


def _callback(job: StageJob, config: TrlRL, tally: Tally) -> TrainerCallback:
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        """Heartbeat and metrics each step, the mark of whole checkpoints, and stopping when asked."""

        seconds_at = time.monotonic()
        last: dict[str, float] = {}

        def on_step_end(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
        ) -> None:
            self.last = tally.close_step(state.global_step)
            if job.stop_requested:
                control.should_save = control.should_training_stop = True

        def on_log(
            self,
            args: TrainingArguments,
            state: TrainerState,
            control: TrainerControl,
            logs: Mapping[str, float] | None = None,
            **_: object,
        ) -> None:
            if not logs or "reward" not in logs:
                return
            now = time.monotonic()
            figures = step_figures(logs, tally.step, now - self.seconds_at) | self.last
            self.seconds_at = now
            job.metric(**figures)
            job.beat(tally.step, config.max_steps, reward=round(figures["reward"], 4))

        def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            sync_tree(folder)
            write_json(folder / WHOLE, tally.values())

    return Reporter()


#: TRL's names for what is kept of each step, and ours.
_FIGURES = {
    "reward": "reward",
    "reward_std": "reward_std",
    "entropy": "entropy",
    "completions/mean_length": "mean_length",
    "completions/clipped_ratio": "clipped_share",
    "frac_reward_zero_std": "equal_reward_groups",
    "loss": "loss",
    "learning_rate": "lr",
    "grad_norm": "grad_norm",
}


def step_figures(logs: Mapping[str, float], step: int, seconds: float) -> dict[str, float]:
    """One line of metrics from TRL's log of a step."""
    kept = {ours: float(logs[theirs]) for theirs, ours in _FIGURES.items() if theirs in logs}
    return {"step": step, "seconds": round(seconds, 4), **kept}


if __name__ == "__main__":
    run_worker(main)
