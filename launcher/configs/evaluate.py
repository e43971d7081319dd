"""Evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.configs.option import option, refuse_wrong


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Accuracy of checkpoints on problem sets: port `scores`."""

    checkpoints: tuple[str, ...] = option(..., "Checkpoints to compare.")
    benchmarks: tuple[str, ...] = option(..., "STAGE/SET of held-out problems.")
    temperatures: tuple[float, ...] = option((0.0, 0.6, 1.0), "Sampling temperatures; 0 is greedy.")
    samples: int = option(1, "Answers sampled for each problem.")
    top_p: float = option(1.0, "Sample from the likeliest words that together have this probability.")
    max_new_tokens: int = option(32, "Longest completion in tokens.")
    batch_size: int = option(128, "Prompts generated together; decides which random numbers each one gets.")
    seeds: tuple[int, ...] = option((), "Sampling seeds, one evaluation each; empty: the stage's seed alone.")
    fan_out: bool = option(
        False,
        "A stage for each benchmark and seed, on Slurm one job array: what fails is redone alone.",
        identity=False,
    )

    def __post_init__(self) -> None:
        refuse_wrong(
            (not self.checkpoints, "checkpoints", "names no checkpoint"),
            (not self.benchmarks, "benchmarks", "names no problem set"),
            (not self.temperatures, "temperatures", "names no temperature"),
            (any(t < 0 for t in self.temperatures), "temperatures", "must not be negative"),
            (self.samples < 1, "samples", f"must be at least 1, got {self.samples}"),
            (not 0 < self.top_p <= 1, "top_p", f"must be above 0 and at most 1, got {self.top_p}"),
            (self.max_new_tokens < 1, "max_new_tokens", f"must be at least 1, got {self.max_new_tokens}"),
            (self.batch_size < 1, "batch_size", f"must be at least 1, got {self.batch_size}"),
            (any(s < 0 for s in self.seeds), "seeds", "must not be negative"),
            *(
                (len(set(values)) < len(values), name, "names one twice")
                for name, values in (("benchmarks", self.benchmarks), ("seeds", self.seeds))
            ),
        )
