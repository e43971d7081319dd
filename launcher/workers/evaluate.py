"""evaluate: accuracy of every checkpoint on every problem set at every temperature with every
sampling seed; same prompts, same rule for all.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.configs import EvaluateConfig
from launcher.progress import StageJob, Stopped, run_worker
from launcher.references import item_of, port_of
from launcher.store import read_json, write_atomic, write_json

if TYPE_CHECKING:
    from launcher.workers.checkpoints import Loaded
    from launcher.workers.problems import Problem
    from launcher.workers.sampling import Completion


def main(job: StageJob) -> None:
    """Fill the port `scores`: results.json and samples.jsonl."""
    config: EvaluateConfig = job.config(EvaluateConfig)
    units = [
        (checkpoint, benchmark, temperature, seed)
        for checkpoint in config.checkpoints
        for benchmark in config.benchmarks
        for temperature in config.temperatures
        for seed in config.seeds or (job.spec.seed,)
    ]
    loaded: dict[str, Loaded] = {}
    results, samples = [], []
    set_aside: dict[str, list[str]] = {}
    for number, unit in enumerate(units):
        done = _saved(job, number, unit) or _evaluate(job, config, number, len(units), unit, loaded)
        results.append(done["result"])
        samples += done["samples"]
        set_aside[unit[0]] = done["set_aside"]
        job.beat(number + 1, len(units), accuracy=done["result"]["accuracy"])
    folder = job.output("scores")
    write_atomic(folder / "samples.jsonl", "".join(json.dumps(s, sort_keys=True) + "\n" for s in samples))
    write_json(folder / "results.json", {"results": results})
    job.record(versions=_versions(), engine="transformers generate", settings=_settings(config, set_aside))


def _settings(config: EvaluateConfig, set_aside: Mapping[str, list[str]]) -> dict[str, Any]:
    """What the receipt says of how completions were drawn, and which settings of the files count for nothing."""
    drawn = {"top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "max_new_tokens": config.max_new_tokens}
    return {**drawn, "added_to_every_text": None, "set_aside": dict(set_aside)}


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "reasoning_gym")}


def _unit_file(job: StageJob, number: int) -> Path:
    return job.workdir / "progress" / f"unit.{number}.json"


def _saved(job: StageJob, number: int, unit: Sequence[object]) -> dict[str, Any] | None:
    """What an earlier attempt found for this unit."""
    saved = read_json(_unit_file(job, number))
    return saved if saved and saved["unit"] == list(unit) and "set_aside" in saved else None


def _evaluate(
    job: StageJob,
    config: EvaluateConfig,
    number: int,
    total: int,
    unit: tuple[str, str, float, int],
    loaded: dict[str, Loaded],
) -> dict[str, Any]:
    from launcher.workers.checkpoints import load_checkpoint, quiet
    from launcher.workers.problems import read_problems
    from launcher.workers.sampling import sample

    quiet()
    checkpoint, benchmark, temperature, seed = unit
    if checkpoint not in loaded:
        loaded.clear()  # one model in memory at a time
        loaded[checkpoint] = load_checkpoint(job.input(checkpoint))
    model, tokenizer = loaded[checkpoint].model, loaded[checkpoint].tokenizer
    problems = read_problems(job.input(port_of(benchmark, "prompts")) / f"{item_of(benchmark)}.jsonl")

    def after_batch(done: int) -> None:
        if job.stop_requested:
            raise Stopped(f"stopped in part {number + 1} of {total}; the parts before it are kept")
        job.beat(number, total, problems=done)

    started = time.monotonic()
    completions = sample(
        model,
        tokenizer,
        [p["prompt"] for p in problems],
        temperature=temperature,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        seed=seed,
        after_batch=after_batch,
    )
    result, samples = score(problems, completions)
    head = {"checkpoint": checkpoint, "benchmark": item_of(benchmark), "temperature": temperature, "seed": seed}
    body = {
        "unit": list(unit),
        "result": {**head, **result, "seconds": round(time.monotonic() - started, 3)},
        "samples": [{**head, **s} for s in samples],
        "set_aside": list(loaded[checkpoint].set_aside),
    }
    write_json(_unit_file(job, number), body)
    return body


def score(
    problems: Sequence[Problem], completions: Sequence[Completion]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The figures of one unit and its samples.

    `stderr` is the binomial standard error; where none or all are right it is 0 by that formula, so `upper95` (or
    `lower95`) gives the 95 % bound by the rule of three. Shares and accuracies by kind of trace are None for no sample.
    """
    from launcher.workers.problems import reward, trace_kind

    right = [reward(c.text, p, c.ended) for p, c in zip(problems, completions, strict=True)]
    kinds = [trace_kind(c.text) if c.ended else None for c in completions]
    n = len(right)
    accuracy = sum(right) / n
    by_kind = {k: [r for r, kind in zip(right, kinds, strict=True) if kind == k] for k in ("worked", "terse")}
    result: dict[str, Any] = {
        "accuracy": accuracy,
        "stderr": math.sqrt(accuracy * (1 - accuracy) / n),
        "n": n,
        "formed": sum(k is not None for k in kinds) / n,
        "mean_length": sum(c.tokens for c in completions) / n,
        **{f"{k}_share": len(rows) / n for k, rows in by_kind.items()},
        **{f"{k}_accuracy": sum(rows) / len(rows) if rows else None for k, rows in by_kind.items()},
    }
    if accuracy == 0:
        result["upper95"] = 3 / n
    if accuracy == 1:
        result["lower95"] = 1 - 3 / n
    samples = [
        {"id": p["id"], "completion": c.text, "ended": c.ended, "right": bool(r)}
        for p, c, r in zip(problems, completions, right, strict=True)
    ]
    return result, samples


if __name__ == "__main__":
    run_worker(main)
