"""Every number of a run, as plain JSON data, from receipts and from what the stages left. Standard library only."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from launcher import store
from launcher.costs import cost_of, lives_of, lost_seconds, queue_seconds
from launcher.errors import UserError
from launcher.progress import METRICS
from launcher.report.numbers import total_cost
from launcher.run_record import PlannedStage, RunRecord
from launcher.spec import StageSpec
from launcher.stages import kinds
from launcher.state import StageState, State, stage_states

Row = dict[str, Any]


def collect(root: Path, record: RunRecord, submitted: Mapping[str, float] | None = None) -> dict[str, Any]:
    """What a run has measured so far: one list of rows a name in TABLES, facts of the run, and `missing` in words.

    A row's `stage` is the stage it comes from. Figures that are no numbers (nan, inf) are None, so that the whole is
    JSON. `submitted` maps the run's Slurm jobs to when they were submitted. Raises UserError where no stage has left
    anything.
    """
    read = _read_stages(root, record, submitted or {})
    data: dict[str, Any] = {
        "run": record.run,
        "recipe": record.recipe,
        "overrides": list(record.overrides),
        "seed": record.resolved.get("seed"),
        "cluster": record.cluster,
        "created": record.created,
        "git": record.git,
        "versions": dict(record.versions),
        "model": _model(read),
        **{name: [row for stage in read for row in _rows(name, stage)] for name in _TABLES},
        "dtypes": {name: kinds for s in read for name, kinds in s.analysis.get("dtypes", {}).items()},
        "missing": [line for stage in read if (line := stage.missing)],
    }
    data["cost"] = total_cost(data["costs"])
    if not any(stage.has_figures for stage in read):
        reasons = "; ".join(line for stage in read if (line := stage.missing) and stage.state != "waiting")
        why = f" ({reasons})" if reasons else ""
        raise UserError(
            f"run {record.run}: nothing is done yet, so there is nothing to report{why}; "
            f"see `prism-launch status {record.run}`, go on with `prism-launch resume {record.run}`"
        )
    data["results"] = pooled(data["results_by_seed"])
    if len(data["results"]) == len(data["results_by_seed"]):
        data["results_by_seed"] = []  # one seed: the same rows
    finite: dict[str, Any] = _finite(data)
    return finite


def pooled(rows: Iterable[Row]) -> list[Row]:
    """One row for each checkpoint, benchmark and temperature: figures are means over the sampling seeds.

    `stderr` is the binomial one of the mean accuracy for `n` problems, however many seeds there are: samples of one
    problem are not independent, so this errs on the large side.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["stage"], row["checkpoint"], row["benchmark"], row["temperature"]), []).append(row)
    return [_mean(group) if len(group) > 1 else group[0] for group in groups.values()]


def _mean(group: list[Row]) -> Row:
    first = {k: v for k, v in group[0].items() if k not in ("seed", "upper95", "lower95")}
    for key in [k for k in first if k == "accuracy" or k.endswith(("_share", "_accuracy", "formed", "_length"))]:
        values = [row[key] for row in group if row.get(key) is not None]
        first[key] = sum(values) / len(values) if values else None
    accuracy, n = first["accuracy"], first["n"]
    bound = {0: {"upper95": 3 / n}, 1: {"lower95": 1 - 3 / n}}.get(accuracy, {})
    return {**first, "stderr": math.sqrt(accuracy * (1 - accuracy) / n), "seeds": len(group), **bound}


class _Stage:
    """A stage with what it left: its receipt if it is done, its metrics also where it is not."""

    def __init__(
        self, root: Path, planned: PlannedStage, receipt: store.Receipt | None, now: StageState, waits: _Waits
    ):
        self.planned, self.receipt = planned, receipt
        self.lives = lives_of(root, planned, time.time(), now.state == "running")
        self.queue_seconds = queue_seconds(self.lives, *waits)
        self.state, self.message = now.state, now.message
        spec = planned.spec
        self.metrics = _read_lines(
            (root / spec.artifact if receipt else store.partial_dir(root, spec.artifact)) / METRICS
        )
        scores = _read_port(root, spec, "scores", "results.json") if receipt else {}
        self.results: list[Row] = scores.get("results", [])
        self.analysis: Row = _read_port(root, spec, "analysis", "analysis.json") if receipt else {}

    @property
    def spec(self) -> StageSpec:
        return self.planned.spec

    @property
    def config(self) -> Mapping[str, Any]:
        return self.spec.config

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the workers recorded; empty where the stage is not done."""
        return self.receipt.record if self.receipt else {}

    @property
    def has_figures(self) -> bool:
        return self.receipt is not None or bool(self.metrics)

    @property
    def missing(self) -> str | None:
        """What the report lacks because of this stage, in words."""
        if self.state == "done":
            return None
        message = f": {self.message.strip().splitlines()[0]}" if self.message.strip() else ""
        return f"{self.spec.stage} ({self.spec.kind}) {_STATES[self.state]}{message}"


_STATES: dict[State, str] = {
    "running": "is running",
    "failed": "failed",
    "stopped": "was stopped",
    "interrupted": "was interrupted",
    "queued": "waits in the queue",
    "waiting": "has not been run",
}


#: When each job was submitted, and when the stage could have begun.
_Waits = tuple[Mapping[str, float], float]


def _read_stages(root: Path, record: RunRecord, submitted: Mapping[str, float]) -> list[_Stage]:
    receipts = {s.spec.stage: store.read_receipt(root, s.spec.artifact) for s in record.stages}
    states = stage_states(root, record, {name: receipt for name, receipt in receipts.items() if receipt})
    made = {name: receipt.created for name, receipt in receipts.items() if receipt}
    return [
        _Stage(
            root,
            planned,
            receipts[planned.spec.stage],
            now,
            (submitted, max((made.get(d, 0.0) for d in planned.depends), default=0.0)),
        )
        for planned, now in zip(record.stages, states, strict=True)
    ]


def _read_port(root: Path, spec: StageSpec, port: str, name: str) -> Row:
    """A JSON file that a finished stage left in a port; empty where the stage has no such port."""
    return (store.read_json(root / spec.outputs[port].path / name) if port in spec.outputs else None) or {}


def _read_lines(path: Path) -> list[Row]:
    """Rows of a JSON-lines file; no file is no error."""
    with contextlib.suppress(OSError):
        return store.read_rows(path)
    return []


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value


def _model(stages: Iterable[_Stage]) -> Row | None:
    """Name, family and number of parameters of the model that is trained, where one is."""
    for stage in stages:
        model = stage.config.get("model")
        if stage.spec.kind == "train" and isinstance(model, Mapping):
            counted = stage.facts.get("parameters")
            return {"name": model.get("name"), "family": model.get("family"), "parameters": counted}
    return None


# ----------------------------------------------------------------------------------------------------- rows of a stage


def _rewards(stage: _Stage) -> list[Row]:
    rewards = stage.facts.get("rewards")
    facts = {"backend": stage.config.get("backend"), "start": stage.config.get("checkpoint")}
    return [{**facts, **rewards}] if rewards else []


def _rl(stage: _Stage) -> list[Row]:
    """Metrics of each step, with the number of samples that a mean of the step is over."""
    samples = stage.config.get("prompts_per_step", 0) * stage.config.get("num_generations", 0)
    return [{**row, "samples": samples} for row in stage.metrics]


def _sources(stage: _Stage) -> list[Row]:
    """Sources of a prepare stage; `terse_share` is None but for problems."""
    configs = stage.config.get("sources", {})
    keys = ("problems", "terse_share")
    return [
        {**row, **{k: configs.get(row["name"], {}).get(k) if row["kind"] == "problems" else None for k in keys}}
        for row in stage.facts.get("sources", ())
    ]


def _problem_sets(stage: _Stage) -> list[Row]:
    counts = stage.facts.get("problems", {})
    keys = ("task", "exclude", "settings", "totals")
    return [
        {"name": name, "count": counts[name], **{k: config.get(k) for k in keys}}
        for name, config in stage.config.get("problems", {}).items()
        if name in counts
    ]


def _engine(stage: _Stage) -> str:
    """What did the work of a stage, in words; `cpu_mode` is named plainly."""
    engine, cpu = kinds()[stage.spec.kind].engine(stage.config), stage.facts.get("cpu_mode")
    if engine is None:
        return str(stage.facts.get("engine", ""))
    where = {True: " on a CPU", False: " on GPUs"}.get(cpu, "") if isinstance(cpu, bool) else ""
    return f"{engine}{where}{' with reference kernels' if cpu and stage.spec.kind == 'train' else ''}"


def _stages(stage: _Stage) -> list[Row]:
    """One row: what ran, on what, with which versions and at what cost."""
    spec, made = stage.spec, stage.receipt
    row = {
        "kind": spec.kind,
        "state": stage.state,
        "message": stage.message,
        "inserted": stage.planned.inserted,
        "depends": list(stage.planned.depends),
        "start": stage.config.get("checkpoint") if spec.kind in ("train", "rl") else None,
        "engine": _engine(stage),
        "backend": stage.config.get("backend"),
        "cpu_mode": stage.facts.get("cpu_mode"),
        "seed": spec.seed,
        "parameters": stage.facts.get("parameters"),
        "tokens": stage.facts.get("tokens"),
        "seconds": made and made.seconds,
        "cpu_seconds": made and made.cpu_seconds,
        "peak_memory_bytes": made and made.peak_memory_bytes,
        "attempts": made and made.attempts,
        "made_on": made and made.made_on,
        "made_by_run": made and made.run,
        "image": made and made.image,
        "versions": dict(stage.facts.get("versions", {})),
        "verification": stage.facts.get("verification"),
        "fingerprint": spec.fingerprint,
    }
    return [row]


def _costs(stage: _Stage) -> list[Row]:
    """One row: what this run's attempts at the stage have cost; zeros where another run made the artifact."""
    cost, made = cost_of(stage.lives, stage.planned), stage.receipt
    core_seconds = made.seconds * cost.cores if made and stage.lives else 0
    row = {
        "attempts": cost.attempts,
        "classes": dict(cost.classes or {}),
        "seconds": cost.seconds,
        "gpus": cost.gpus,
        "cores": cost.cores,
        "gpu_hours": cost.gpu_hours,
        "core_hours": cost.core_hours,
        "queue_seconds": stage.queue_seconds,
        "lost_seconds": cost.lost_seconds,
        "lost_share": cost.lost_seconds / cost.seconds if cost.seconds else None,
        "core_use": made.cpu_seconds / core_seconds if made and core_seconds else None,
    }
    return [row]


def _attempts(stage: _Stage) -> list[Row]:
    """One row an attempt, the oldest first."""
    gpus = stage.planned.gpus
    return [
        {
            "attempt": life.attempt.name,
            "job": life.attempt.owner.job if life.attempt.owner else None,
            "class": life.exit_class,
            "message": life.attempt.end.message if life.attempt.end else "",
            "started": life.started,
            "seconds": life.seconds,
            "gpu_hours": gpus * life.seconds / 3600,
            "first_step": life.first,
            "last_step": life.attempt.beat.step if life.attempt.beat else None,
            "lost_seconds": lost,
        }
        for life, lost in zip(stage.lives, lost_seconds(stage.lives), strict=True)
    ]


#: Table to the kind of stage that fills it ("": every kind) and what it gives.
_TABLES: dict[str, tuple[str, Callable[[_Stage], Iterable[Mapping[str, Any]]]]] = {
    "results_by_seed": ("evaluate", lambda s: s.results),
    "weights": ("analyze", lambda s: s.analysis.get("weights", ())),
    "weights_by_module": ("analyze", lambda s: s.analysis.get("weights_by_module", ())),
    "cka": ("analyze", lambda s: s.analysis.get("cka", ())),
    "training": ("train", lambda s: s.metrics),
    "rl": ("rl", _rl),
    "rewards": ("rl", _rewards),
    "data_mix": ("train", lambda s: s.facts.get("data", ())),
    "sources": ("prepare", _sources),
    "problem_sets": ("prepare", _problem_sets),
    "stages": ("", _stages),
    "costs": ("", _costs),
    "attempts": ("", _attempts),
}
#: The tables of the report: each a list of rows under this key of the JSON, and a CSV file of this name.
TABLES = ("results", *_TABLES)


def _rows(table: str, stage: _Stage) -> list[Row]:
    kind, read = _TABLES[table]
    # Parts of a stage that fans out are one stage in every table but that of the stages.
    name = stage.planned.part_of if kind and stage.planned.part_of else stage.spec.stage
    return [{"stage": name, **row} for row in read(stage)] if kind in ("", stage.spec.kind) else []
