"""Reinforcement learning, one dataclass a backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from launcher.configs.option import adam_checks, option, refuse_wrong
from launcher.configs.train import Parallelism


@dataclass(frozen=True, kw_only=True)
class RLConfig:
    """Reinforcement learning with verifiable rewards, what every backend knows: port `checkpoint`, in its format."""

    backend: str = option(..., "The library that trains.")
    algorithm: Literal["grpo", "reinforce", "ppo"] = option("grpo", "The algorithm.")
    checkpoint: str = option(..., "The policy to start from.")
    prompts: str = option(..., "STAGE/SET of problems.")
    reward: Literal["answer-and-format"] = option(
        "answer-and-format", "1 for one non-empty <think> block, then the right answer, then the end token; else 0."
    )
    max_steps: int = option(..., "Optimizer steps.")
    prompts_per_step: int = option(16, "Prompts in a step.")
    num_generations: int = option(8, "Completions sampled for each prompt.")
    max_completion_length: int = option(32, "Longest completion in tokens.")
    temperature: float = option(1.0, "Sampling temperature.")
    lr: float = option(1e-6, "Learning rate after warm-up.")
    warmup_steps: int = option(5, "Warm-up steps.")
    beta: float = option(0.0, "Weight of the KL term.")
    adam_beta1: float = option(0.9, "AdamW beta 1.")
    adam_beta2: float = option(0.95, "AdamW beta 2.")
    weight_decay: float = option(0.0, "AdamW weight decay.")
    clip_grad: float = option(1.0, "Largest gradient norm.")
    save_interval: int = option(25, "Steps between checkpoints to resume from.", identity=False)

    def __post_init__(self) -> None:
        positive = ("max_steps", "prompts_per_step", "max_completion_length", "save_interval")
        refuse_wrong(
            *((getattr(self, n) < 1, n, f"must be at least 1, got {getattr(self, n)}") for n in positive),
            (self.num_generations < 2, "num_generations", "GRPO compares completions: at least 2"),
            (self.temperature <= 0, "temperature", f"must be above 0, got {self.temperature}"),
            (self.warmup_steps < 0, "warmup_steps", f"must not be negative, got {self.warmup_steps}"),
            (self.beta < 0, "beta", f"must not be negative, got {self.beta}"),
            *adam_checks(self),
        )


@dataclass(frozen=True, kw_only=True)
class TrlRL(RLConfig):
    """Backend trl: TRL's GRPOTrainer in one process."""

    backend: Literal["trl"] = option(..., "The library that trains.")
    num_iterations: int = option(1, "Optimizer passes over a batch of samples.")

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_wrong((self.num_iterations < 1, "num_iterations", f"must be at least 1, got {self.num_iterations}"))


@dataclass(frozen=True, kw_only=True)
class MegatronRL(RLConfig):
    """What the backends whose policy is Megatron's know besides."""

    max_prompt_length: int = option(..., "Longest prompt in tokens: memory is laid out for prompt and completion.")
    end_strings: tuple[str, ...] = option((), "What ends a completion.")
    lr_decay_style: Literal["constant", "linear"] = option("constant", "Schedule after warm-up; linear ends at 0.")
    micro_batch_size: int = option(1, "Sequences that a rank trains on at once.", identity=False)
    parallelism: Parallelism = option(Parallelism(), "The policy's parallel layout.", identity=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = ("max_prompt_length", "micro_batch_size")
        refuse_wrong(*((getattr(self, n) < 1, n, f"must be at least 1, got {getattr(self, n)}") for n in positive))


@dataclass(frozen=True, kw_only=True)
class AlignerRL(MegatronRL):
    """Backend nemo-aligner: NeMo-Aligner's REINFORCE, one optimizer step from each batch of samples."""

    backend: Literal["nemo-aligner"] = option(..., "The library that trains.")


@dataclass(frozen=True, kw_only=True)
class NemoRL(MegatronRL):
    """Backend nemo-rl: NeMo-RL's GRPO, on-policy, one optimizer step from each batch of samples."""

    backend: Literal["nemo-rl"] = option(..., "The library that trains.")
    importance_cap: float | None = option(
        None, "Largest ratio of training to sampling probability (truncated). None: off."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        cap = self.importance_cap
        refuse_wrong((cap is not None and cap < 1, "importance_cap", f"must be at least 1, got {cap}"))


@dataclass(frozen=True, kw_only=True)
class OpenInstructRL(RLConfig):
    """Backend open-instruct: not built yet."""

    backend: Literal["open-instruct"] = option(..., "The library that trains.")


#: An RL stage is told by its `backend`.
AnyRL = TrlRL | AlignerRL | NemoRL | OpenInstructRL
