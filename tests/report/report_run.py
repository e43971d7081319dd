"""A run of the demo's recipe as its stages would leave it: planned by the planner, figures made up, each different."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher import store
from launcher.configs import Resources
from launcher.inputs import resolve_inputs
from launcher.plan import build_plan
from launcher.recipe.load import load_recipes
from launcher.run_record import PlannedStage, RunRecord, write_run
from launcher.spec import Limits, Runtime, StageSpec
from tests.left_attempts import leave_attempt
from tests.supervisor.counting import asking

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "demo.yaml"
ALL = ("prepare", "base", "midtrain", "base-to-hf", "midtrain-to-hf", "rl-from-base", "rl-from-midtrain", "evaluate")
ALL = (*ALL, "analyze")
#: worked share, worked accuracy, terse share, terse accuracy, by checkpoint and temperature
TRACES: dict[tuple[str, float], tuple[float, float, float, float]] = {
    ("midtrain", 0.0): (0.50, 0.90, 0.48, 0.25),
    ("midtrain", 0.6): (0.54, 0.88, 0.44, 0.23),
    ("midtrain", 1.0): (0.55, 0.82, 0.42, 0.22),
    ("rl-from-midtrain", 0.0): (0.99, 0.90, 0.01, 0.0),
    ("rl-from-midtrain", 0.6): (0.98, 0.89, 0.02, 0.1),
    ("rl-from-midtrain", 1.0): (0.95, 0.84, 0.04, 0.2),
}
#: changed fraction at 1 %, relative L2, by pair
CHANGES = {
    ("base", "midtrain"): (0.992, 0.8581),
    ("midtrain", "rl-from-midtrain"): (0.414, 0.00621),
    ("base", "rl-from-base"): (0.0, 0.0),
}


def on_gpus(record: RunRecord) -> RunRecord:
    """The same run, every stage on two nodes with eight GPUs."""
    resources = Resources(nodes=2, gpus_per_node=8, ntasks_per_node=8)
    return replace(record, stages=tuple(asking(s, resources) for s in record.stages))


def plan_run(run: str = "demo", overrides: Iterable[str] = ()) -> RunRecord:
    """The demo's recipe, planned, under a name of its own."""
    (recipe,) = load_recipes(str(RECIPE), list(overrides), run)
    stages = build_plan(recipe, resolve_inputs(recipe), Limits(), Runtime())
    versions = {"prism-launch": "0.1.0", "python": "3.11.9"}
    return RunRecord(
        run, recipe.path, recipe.overrides, "local", recipe.resolved, stages, 1.76e9, versions, git="c0ffee+"
    )


def make_run(root: Path, record: RunRecord, done: Iterable[str] = ALL) -> RunRecord:
    """Write `run.json` and a whole artifact for each stage named in `done`."""
    write_run(root, record)
    for number, name in enumerate(done, 1):
        finish(root, record, record.stage(name), number)
    return record


def finish(root: Path, record: RunRecord, planned: PlannedStage, number: int) -> None:
    """Leave a stage as a worker and its supervisor would."""
    spec = planned.spec
    for output in spec.outputs.values():
        store.working_path(root, spec.artifact, output.path).mkdir(parents=True)
    facts = _MAKERS[spec.kind](store.partial_dir(root, spec.artifact), spec)
    receipt = store.Receipt(
        kind=spec.kind,
        kind_version=spec.kind_version,
        stage=spec.stage,
        run=record.run,
        fingerprint=spec.fingerprint,
        config=dict(spec.config),
        seed=spec.seed,
        inputs={},
        outputs={},
        files=store.list_files(store.partial_dir(root, spec.artifact)),
        record=facts,
        created=1.76e9 + 60 * number,
        seconds=10.0 * number + 0.25,
        cpu_seconds=9.0 * number + 0.5,
        peak_memory_bytes=(300 + number) << 20,
        attempts=1 + number % 2,
        made_by="someone",
        made_on=f"node{number:02}",
    )
    store.seal(root, spec.artifact, receipt)
    start = 1.76e9 + 1000 * number
    if number % 2:  # 10 of the 40 steps that it did were done again
        leave_attempt(root, spec, "local.1", start, start + 80, "crashed", (1, 40), message="killed\nby SIGKILL")
    leave_attempt(root, spec, "local.2", start + 100, start + 200 + number, steps=(31, 100) if number % 2 else None)


# -------------------------------------------------------------------------------------------------- what a stage leaves


def _prepare(folder: Path, spec: StageSpec) -> dict[str, Any]:
    tokens = {"general": 440_000, "general-unseen": 430_000, "general-probe": 29_000, "reasoning": 355_000}
    sources = [
        {
            "name": name,
            "kind": source["kind"],
            "documents": 100 + i,
            "tokens": tokens[name],
            "bytes": 2 * tokens[name] + i,
            "sha256": f"{i + 10:x}" * 64,
            "origin": {"interpreter": f"CPython 3.11.{i}", "sha256": f"{i}" * 64, "share": list(source["share"])},
        }
        for i, (name, source) in enumerate(spec.config["sources"].items())
    ]
    counts = {name: problems["count"] for name, problems in spec.config["problems"].items()}
    return {"sources": sources, "problems": counts, "versions": {"python": "3.11.9", "reasoning_gym": "0.1.25"}}


def train_metrics(spec: StageSpec, steps: int = 60) -> list[dict[str, Any]]:
    """A loss that falls, from another height in each stage."""
    batch = spec.config["global_batch_size"] * spec.config["seq_length"]
    every = max(1, spec.config["train_iters"] // steps)
    start = 6.2 if spec.stage == "base" else 4.1
    return [
        {
            "iteration": i,
            "loss": 1.1 + start * math.exp(-3 * i / spec.config["train_iters"]) + 0.2 * math.sin(i * 1.7),
            "lr": spec.config["lr"] * min(1, i / 12) * (1 + math.cos(math.pi * i / spec.config["train_iters"])) / 2,
            "grad_norm": 0.5 + 1 / i,
            "tokens": i * batch,
            "tokens_per_s": 15_000.0 + i,
            "seconds": 0.06,
        }
        for i in range(every, spec.config["train_iters"] + 1, every)
    ]


def _train(folder: Path, spec: StageSpec) -> dict[str, Any]:
    write_lines(folder / "metrics.jsonl", train_metrics(spec))
    total = spec.config["train_iters"] * spec.config["global_batch_size"] * spec.config["seq_length"]
    weights = spec.config["data"]
    return {
        "versions": {"torch": "2.13.0+cpu", "megatron-core": "0.16.1"},
        "cpu_mode": True,
        "parameters": 432_000,
        "tokens": total,
        "data": [
            {"source": name, "weight": weight, "tokens": int(weight * total), "epochs": weight * total / 400_000}
            for name, weight in weights.items()
        ],
        "loss": 1.5,
    }


def _convert(folder: Path, spec: StageSpec) -> dict[str, Any]:
    return {
        "verification": {
            "round_trip": "bit-exact",
            "tensors_read": 31 if spec.stage == "base-to-hf" else 32,
            "types": ["float32"],
        }
    }


def rl_metrics(spec: StageSpec) -> list[dict[str, Any]]:
    """Rewards that rise from the mid-trained model and stay 0 from the base."""
    silent = spec.stage == "rl-from-base"
    rewards = [0.0 if silent else min(0.9, 0.5 + 0.009 * i + 0.03 * math.sin(i)) for i in range(1, 51)]
    return [
        {
            "step": i,
            "reward": reward,
            "reward_std": 0.0 if silent else 0.4,
            "entropy": 2.5 if silent else 0.2 - 0.003 * i,
            "mean_length": 31.5 if silent else 13 + 0.14 * i,
            "zero_reward_share": 1 - reward,
            "lr": 5e-5,
            "seconds": 0.7,
        }
        for i, reward in enumerate(rewards, 1)
    ]


def _rl(folder: Path, spec: StageSpec) -> dict[str, Any]:
    rows = rl_metrics(spec)
    write_lines(folder / "metrics.jsonl", rows)
    zeros = round(sum(r["zero_reward_share"] * 128 for r in rows))
    rewards = {
        "step": 50,
        "samples": 6400,
        "zeros": zeros,
        "total": 6400.0 - zeros,
        "silent_steps": 50 if zeros == 6400 else 0,
        "mean": 1 - zeros / 6400,
        "all_zero": zeros == 6400,
    }
    return {"backend": "trl", "rewards": rewards, "versions": {"trl": "1.16.0", "torch": "2.13.0"}, "cpu_mode": True}


def result(checkpoint: str, temperature: float, n: int = 500) -> dict[str, Any]:
    """One line of results.json; checkpoints without traces in TRACES got nothing right."""
    worked, right, terse, terse_right = TRACES.get((checkpoint, temperature), (0.0, 0.0, 0.0, 0.0))
    accuracy = round(n * (worked * right + terse * terse_right)) / n
    return {
        "checkpoint": checkpoint,
        "benchmark": "held-out",
        "temperature": temperature,
        "accuracy": accuracy,
        "stderr": math.sqrt(accuracy * (1 - accuracy) / n),
        "n": n,
        "formed": worked + terse,
        "mean_length": 13.0 + 7 * worked,
        "worked_share": worked,
        "terse_share": terse,
        "worked_accuracy": right if worked else None,
        "terse_accuracy": terse_right if terse else None,
        **({"upper95": 3 / n} if accuracy == 0 else {}),
        "seconds": 1.5,
    }


def _evaluate(folder: Path, spec: StageSpec) -> dict[str, Any]:
    results = [result(c, t) for c in spec.config["checkpoints"] for t in spec.config["temperatures"]]
    (folder / "scores" / "results.json").write_text(json.dumps({"results": results}))
    return {"versions": {"transformers": "5.23.0"}, "engine": "transformers generate"}


def _analyze(folder: Path, spec: StageSpec) -> dict[str, Any]:
    weights, modules, cka = [], [], []
    for a, b in map(tuple, spec.config["pairs"]):
        share, norm = CHANGES[a, b]
        head = {"from": a, "to": b}
        for t in spec.config["thresholds"]:
            changed = share * (0.01 / t) ** 0.4 if share < 0.9 and share else share - t / 2 if share else 0.0
            row = {**head, "threshold": t, "changed_fraction": min(1.0, changed), "relative_l2": norm}
            weights.append({**row, "elements": 432_000, "bits_changed_fraction": 0.999 if share else 0.0})
        parts: list[tuple[int | None, str]] = [(i, m) for i in range(3) for m in ("attention", "mlp", "norm")]
        for number, (layer, module) in enumerate([*parts, (None, "embedding"), (None, "lm_head")]):
            row = {"layer": layer, "module": module, "threshold": 0.01, "relative_l2": norm * (1 + number / 50)}
            modules.append({**head, **row, "changed_fraction": share * (1 - number / 20)})
        for texts, bend in (("problems", 0.15), ("source", 0.04)):
            depth = bend * min(1.0, norm * 4) + bend * norm / 20
            cka += [
                {**head, "texts": texts, "layer": i, "value": 1 - depth * i, "debiased": 1 - depth * i - 0.01, "n": 200}
                for i in range(4)
            ]
    body = {"weights": weights, "weights_by_module": modules, "cka": cka, "dtypes": {"base": ["F32"]}}
    (folder / "analysis" / "analysis.json").write_text(json.dumps(body))
    return {"versions": {"safetensors": "0.8.0"}}


_MAKERS: dict[str, Callable[[Path, StageSpec], dict[str, Any]]] = {
    "prepare": _prepare,
    "train": _train,
    "convert": _convert,
    "rl": _rl,
    "evaluate": _evaluate,
    "analyze": _analyze,
}


def write_lines(path: Path, rows: Iterable[Any], end: str = "") -> None:
    """A JSON-lines file; `end` is put after the last line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows) + end)


def end(root: Path, record: RunRecord, stage: str, exit_class: str, message: str) -> None:
    """Leave the events of an attempt that ended, as the supervisor writes them."""
    start = {"time": 1.76e9, "event": "start", "fingerprint": record.stage(stage).spec.fingerprint}
    ended = {"time": 1.77e9, "event": "end", "class": exit_class, "message": message, "seconds": 12.5}
    write_lines(store.stage_dir(root, record.run, stage) / "local.1" / "events.jsonl", [start, ended])
