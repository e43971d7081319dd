"""`make bench-gpu`: the trainer on one NVIDIA GPU: speed, MFU, memory, agreement with a CPU, checkpoint stall.

    python -m tests.bench.gpu [CASE ...] [--megatron-lm PATH] [--json FILE] [--table FILE]

Every figure is from the worker that a pipeline's stage runs, on random tokens in .bin and .idx files. A case that
fails is named with its last words, and the others go on: exit code 1. docs/bench.md says how to read it.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.fit.gpus import GPUS
from launcher.fit.layers import architecture_of, flops_per_token
from launcher.fit.memory import Layout, memory_of, needed_bytes
from launcher.models.families import parameter_count, shape_of
from tests.bench import gpu_models, measure
from tests.bench.gpu_environment import describe, require_gpu
from tests.bench.gpu_models import Case
from tests.bench.stages import Root, Stage, make_stage, model_named
from tests.bench.theirs import Theirs, read_log, script_words

#: Steps of a case, and how many of them warm up: compilation, autotuning, Adam's moments.
STEPS, WARM_UP = 16, 6
#: Largest relative difference of a step's loss between CPU and GPU. fp32 is TF32 in Transformer Engine's products.
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}
#: Ours over Megatron-LM's own script.
AGAINST_THEIRS = 0.97


@dataclass(frozen=True)
class Figure:
    """One line of the table: a value, what is wanted of it, and whether it is so; None where nothing is wanted."""

    case: str
    what: str
    value: float | str
    unit: str = ""
    wanted: str = ""
    met: bool | None = None


@dataclass
class Bench:
    """Where it runs: `device` "gpu", or "cpu" for a rehearsal, whose figures say nothing."""

    scratch: Path
    device: str = "gpu"
    megatron_lm: Path | None = None
    gpu: str | None = None
    memory_bytes: float = math.inf
    steps: int = STEPS
    warm_up: int = WARM_UP
    cases: Sequence[Case] = gpu_models.CASES
    twins: Sequence[str] = ("llama-tiny", "nemotron-h-tiny")
    precisions: Sequence[str] = ("fp32", "bf16")
    failures: dict[str, str] = field(default_factory=dict)

    def root(self, name: str, vocab_size: int, tokens: int) -> Root:
        """A fresh root with tokens."""
        found = Root(self.scratch / name, vocab_size)
        found.fill(tokens)
        return found


def main(argv: Sequence[str]) -> int:
    """Measure the named cases, all by default; returns the exit code."""
    parser = argparse.ArgumentParser(prog="bench-gpu", description=(__doc__ or "").splitlines()[0])
    known = [c.name for c in gpu_models.CASES] + ["agreement", "stall"]
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(known)}")
    parser.add_argument("--megatron-lm", type=Path, metavar="PATH", help="a checkout, to compare with its own scripts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every value there")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table there too, in Markdown")
    args = parser.parse_args(argv)
    unknown = [name for name in args.cases if name not in known]
    if unknown:
        parser.error(f"no case {', '.join(unknown)}; there is {', '.join(known)}")
    if args.megatron_lm and not (args.megatron_lm / "pretrain_gpt.py").is_file():
        parser.error(f"--megatron-lm {args.megatron_lm}: no pretrain_gpt.py there")
    gpu = require_gpu()
    scratch = Path(tempfile.mkdtemp(prefix="prism-bench-gpu-"))
    try:
        name, memory = gpu
        bench = Bench(scratch, "gpu", args.megatron_lm and args.megatron_lm.resolve(), name, memory)
        figures = measure_all(bench, args.cases or known)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    facts = describe()
    if args.json:
        body = {"conditions": facts, "figures": [asdict(f) for f in figures], "failures": bench.failures}
        args.json.write_text(json.dumps(body, indent=2) + "\n")
    text = table(figures, facts)
    if args.table:
        args.table.write_text(text)
    print(text)
    for name, message in bench.failures.items():
        print(f"{name}: not measured: {message}", file=sys.stderr)
    return 1 if bench.failures else 0


def measure_all(bench: Bench, names: Sequence[str]) -> list[Figure]:
    """Every part that is named; what fails stands in `bench.failures`."""
    parts: dict[str, Callable[[], list[Figure]]] = {
        **{case.name: lambda c=case: measure_speed(bench, c) for case in bench.cases},  # type: ignore[misc]
        "agreement": lambda: measure_agreement(bench),
        "stall": lambda: measure_stall(bench),
    }
    figures: list[Figure] = []
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            figures += parts[name]()
        except Exception as error:
            # One case that breaks, for want of memory or of a library, must not take the others' figures with it.
            bench.failures[name] = f"{type(error).__name__}: {error}"
    return figures


# -------------------------------------------------------------------------------------------------------------- speed


def measure_speed(bench: Bench, case: Case) -> list[Figure]:
    """Tokens/s, MFU, parts of a step and peak memory of a model, with Megatron-LM's own where a checkout is given."""
    shape = shape_of(case.model["config"])
    architecture = architecture_of(shape)
    gpu = GPUS[bench.gpu] if bench.gpu else None
    layout = choose_layout(case, bench.memory_bytes)
    changes = {
        "seq_length": case.seq_length,
        "micro_batch_size": layout.micro_batch_size,
        "parallelism": {"recompute": layout.recompute},
        "global_batch_size": case.global_batch_size,
        "train_iters": bench.steps,
        "precision": "bf16",
    }
    tokens = max(100_000, (bench.steps + 1) * case.global_batch_size * case.seq_length)
    root = bench.root(case.name, shape.vocab_size, tokens)
    stage = make_stage(root, "ours", case.model, **changes)
    stage.run(bench.device)  # type: ignore[arg-type]
    rows = stage.metrics()[bench.warm_up :]
    speed = _median(rows, "tokens_per_s")
    flops = flops_per_token(architecture, case.seq_length)
    predicted = memory_of(architecture, layout).peak / measure.GIB
    peak = max(row["memory_gib"] for row in rows)
    name = case.name
    figures = [
        Figure(name, "parameters", parameter_count(shape) / 1e9, "B"),
        Figure(name, "micro-batch", f"{layout.micro_batch_size} x {case.seq_length} tokens"),
        Figure(name, "sequences a step", case.global_batch_size),
        Figure(name, "recomputation", layout.recompute),
        Figure(name, "kernels", str(stage.record()["kernels"])),
        Figure(name, "tokens/s", speed),
    ]
    if gpu is not None:
        mfu = speed * flops / gpu.tflops / 1e12
        figures.append(Figure(name, "MFU", mfu, "", f">= {case.mfu}", mfu >= case.mfu))
    figures += [
        Figure(name, "peak memory", peak, "GiB"),
        Figure(name, "peak memory by fit", predicted, "GiB"),
        Figure(name, "fit / measured", predicted / peak),
        *(Figure(name, f"of a step: {part}", _share(rows, part), "%") for part in _PARTS),
    ]
    if bench.megatron_lm is not None and case.script:
        theirs = _run_theirs(bench, case, root, changes)
        ratio = speed / (case.global_batch_size * case.seq_length / theirs.seconds)
        figures += [
            Figure(name, "Megatron-LM: tokens/s", case.global_batch_size * case.seq_length / theirs.seconds),
            Figure(name, "ours / Megatron-LM", ratio, "", f">= {AGAINST_THEIRS}", ratio >= AGAINST_THEIRS),
            Figure(name, "Megatron-LM: peak memory", theirs.memory_gib or "not said", "GiB"),
        ]
    shutil.rmtree(root.path)
    return figures


_PARTS = ("data", "forward", "backward", "optimizer")


def choose_layout(case: Case, device_bytes: float) -> Layout:
    """The largest micro-batch that `fit` gives room, with recomputation where nothing else does.

    Raises RuntimeError for a model that does not fit.
    """
    architecture, needed = architecture_of(shape_of(case.model["config"])), math.inf
    choices = [(size, "none") for size in (8, 4, 2, 1)] + [(1, "mlp"), (1, "full")]
    for size, recompute in choices:
        if case.global_batch_size % size:
            continue
        layout = Layout(
            gpus=1,
            micro_batch_size=size,
            global_batch_size=case.global_batch_size,
            seq_length=case.seq_length,
            recompute=recompute,  # type: ignore[arg-type]
        )
        needed = needed_bytes(memory_of(architecture, layout), layout)
        if needed <= 0.95 * device_bytes:
            return layout
    raise RuntimeError(f"{needed / measure.GIB:.0f} GiB are needed, this GPU has {device_bytes / measure.GIB:.0f} GiB")


def _run_theirs(bench: Bench, case: Case, root: Root, changes: Mapping[str, Any]) -> Theirs:
    """The same model, data and layout by Megatron-LM's own script, as a stage with `entrypoint` runs it."""
    assert bench.megatron_lm is not None and case.script is not None
    script = str(bench.megatron_lm / case.script)
    stage = make_stage(
        root, "theirs", case.model, **changes, entrypoint=script, entrypoint_args=script_words(bench.device)
    )
    stage.run(bench.device)  # type: ignore[arg-type]
    return read_log(stage.log, bench.warm_up)


def _median(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return statistics.median(float(row[name]) for row in rows)


def _share(rows: Sequence[Mapping[str, Any]], part: str) -> float:
    return 100 * _median(rows, f"seconds_{part}") / _median(rows, "seconds")


# ---------------------------------------------------------------------------------------------------------- agreement


def measure_agreement(bench: Bench) -> list[Figure]:
    """Tiny models on CPU and GPU: losses of the first steps, keys of the checkpoints, and the CPU's on the GPU."""
    figures = []
    for twin in bench.twins:
        model = model_named(twin)
        root = bench.root(twin, model["config"]["vocab_size"], 20_000)
        for precision in bench.precisions:
            figures += _agreement_of(bench, root, twin, model, precision)
    return figures


def _agreement_of(bench: Bench, root: Root, twin: str, model: Mapping[str, Any], precision: str) -> list[Figure]:
    def run(name: str, device: str, start: Stage | None = None) -> Stage:
        changes = {"seq_length": 128, "global_batch_size": 4, "micro_batch_size": 2, "train_iters": 4, "lr": 1e-3}
        stage = make_stage(root, f"{name}-{precision}", model, start, precision=precision, **changes)
        stage.run(device)  # type: ignore[arg-type]
        return stage

    cpu, gpu = run("cpu", "cpu"), run("gpu", bench.device)
    started, reference = run("gpu-from-cpu", bench.device, cpu), run("cpu-from-cpu", "cpu", cpu)
    case, tolerance = f"{twin}, {precision}", TOLERANCE[precision]
    figures = []
    for what, mine, other in (
        ("losses from random weights, CPU to GPU", gpu, cpu),
        ("losses from the CPU's checkpoint, CPU to GPU", started, reference),
    ):
        apart = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(mine.metrics(), other.metrics(), strict=True))
        figures.append(Figure(case, what, apart, "relative", f"<= {tolerance:g}", apart <= tolerance))
    differing = sorted(keys_of(cpu) ^ keys_of(gpu))
    figures.append(Figure(case, "keys not in both checkpoints", len(differing), "", "0", not differing))
    if differing:
        print(f"{case}: keys not in both checkpoints: {', '.join(differing)}", file=sys.stderr)
    return figures


def keys_of(stage: Stage) -> set[str]:
    """The tensors of a stage's checkpoint with their shapes; Transformer Engine's `_extra_state`s are left out."""
    from launcher.convert.metadata import read_metadata

    number = int((stage.checkpoint / "latest_checkpointed_iteration.txt").read_text())
    found = read_metadata(stage.checkpoint / f"iter_{number:07d}" / ".metadata")
    return {
        f"{key} {_shape_of(entry)}" for key, entry in found.state_dict_metadata.items() if "_extra_state" not in key
    }


def _shape_of(entry: Any) -> str:
    return str(list(entry.size)) if hasattr(entry, "size") else "bytes"


# -------------------------------------------------------------------------------------------------------------- stall


def measure_stall(bench: Bench) -> list[Figure]:
    """What a checkpoint costs the step that begins it and the one that finishes it, in a process of its own."""
    name = gpu_models.STALL if bench.device == "gpu" else "tiny"
    words = ["-m", "tests.bench.stall", str(bench.scratch / "stall"), name]
    out, _ = measure.run_watched(
        measure.python(*words), measure.environment(bench.scratch), measure.CHECKOUT, timeout=900
    )
    found = json.loads(out.strip().splitlines()[-1])
    return [Figure("stall", what, statistics.median(found[what]), unit) for what, unit in _STALL]


_STALL = (
    *(("bytes", "B"), ("start", "s"), ("finish", "s")),
    *(("slower steps", "s"), ("synchronous", "s"), ("resume", "s")),
)


# -------------------------------------------------------------------------------------------------------------- table


def table(figures: Sequence[Figure], facts: Mapping[str, Any]) -> str:
    """Markdown to paste into docs/bench.md."""
    lines = ["| case | what | value | wanted | |", "|---|---|---|---|---|"]
    for f in figures:
        value = f.value if isinstance(f.value, str) else f"{f.value:,.4g}"
        verdict = {True: "met", False: "**missed**", None: ""}[f.met]
        lines.append(f"| {f.case} | {f.what} | {value} {f.unit} | {f.wanted} | {verdict} |".replace("  ", " "))
    lines += ["", ", ".join(f"{key} {value}" for key, value in facts.items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
