"""`prism-launch fit`: the layouts of a model that fit on a number of GPUs, best first, with what needs the memory."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher import store
from launcher.commands.shared import print_json, root_of
from launcher.errors import UserError
from launcher.fit.gpus import Gpu, gpu_of
from launcher.fit.layers import architecture_of, flops_per_token
from launcher.fit.memory import NOT_COUNTED, Layout
from launcher.fit.search import GIB, Fit, Task, base_mfu, find_layouts, layout_problems
from launcher.fit.speed import layout_factor, past_runs, runs_like
from launcher.models.families import parameter_count, shape_of
from launcher.models.headers import adapter_problem, read_config, shape_in
from launcher.models.shape import ModelShape
from launcher.terminal import console
from launcher.units import format_count, format_duration, significant

#: Options of the command line that fix a size, and the size's name in `Layout`.
_FIXED = {
    "tensor_model_parallel_size": "tp",
    "pipeline_model_parallel_size": "pp",
    "context_parallel_size": "cp",
    "micro_batch_size": "micro_batch_size",
}


def fit(args: argparse.Namespace) -> int:
    """List the layouts; 1 where none fits, 2 where the one that was asked for cannot work."""
    task = _task(args)
    found = find_layouts(task)
    if not found:
        raise UserError(_obstacles(task))
    if args.json:
        print_json(_json(args.model, args.gpu, task, found))
    else:
        _print(args.model, args.gpu, task, found)
    return 0 if any(f.fits for f in found) else 1


def _task(args: argparse.Namespace) -> Task:
    gpu = gpu_of(args.gpu)
    positive = ("gpus", "gpus_per_node", "seq_length", "global_batch_size", "gpu_memory_gib", "mfu", "tokens", *_FIXED)
    wrong = [n for n in positive if getattr(args, n) is not None and not 0 < getattr(args, n) < math.inf]
    if wrong:
        raise UserError([f"--{n.replace('_', '-')}: must be a number above 0, got {getattr(args, n)}" for n in wrong])
    if args.mfu is not None and args.mfu > 1:
        raise UserError(f"--mfu: a share of the peak rate, such as 0.4; got {args.mfu:g}")
    iters = round(args.tokens / (args.seq_length * args.global_batch_size))
    shape = _shape(args.model)
    if args.seq_length > shape.max_position_embeddings:
        limit = shape.max_position_embeddings
        raise UserError(f"--seq-length: {args.seq_length} is beyond the {limit} positions of {args.model}")
    past = () if args.mfu else past_runs(store.receipts(root_of(args), "train"))
    return Task(
        shape=shape,
        gpu=replace(gpu, memory_gib=args.gpu_memory_gib or gpu.memory_gib),
        gpus=args.gpus,
        gpus_per_node=args.gpus_per_node,
        seq_length=args.seq_length,
        global_batch_size=args.global_batch_size,
        train_iters=max(1, iters),
        mfu=args.mfu,
        past=runs_like(past, args.gpu, shape, args.precision),
        precision=args.precision,
        fixed={short: getattr(args, name) for name, short in _FIXED.items() if getattr(args, name) is not None},
    )


def _shape(model: str) -> ModelShape:
    """The shape of a model of ours by name, or of a checkpoint's folder or config.json."""
    from launcher.recipe.load import read_model

    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if file.suffix != ".json":
        return shape_of(read_model(model).config)
    if not file.exists():
        raise UserError(adapter_problem(path) or f"{file}: not there; name a model, or a checkpoint's folder")
    return shape_in(read_config(file), file)


def _obstacles(task: Task) -> list[str]:
    """Why no layout works, whatever the memory: what is wrong with the plainest of the sizes that were asked for."""
    layout = Layout(
        gpus=task.gpus, global_batch_size=task.global_batch_size, seq_length=task.seq_length, **(task.fixed or {})
    )  # fmt: skip
    return layout_problems(task, layout)


def _json(model: str, gpu: str, task: Task, found: Sequence[Fit]) -> dict[str, Any]:
    return {
        "model": model,
        "parameters": parameter_count(task.shape),
        "flops_per_token": flops_per_token(architecture_of(task.shape), task.seq_length),
        "gpu": gpu,
        "gpus": task.gpus,
        "gpu_memory_gib": task.gpu.memory_gib,
        "seq_length": task.seq_length,
        "global_batch_size": task.global_batch_size,
        "train_iters": task.train_iters,
        "precision": task.precision,
        "mfu_source": task.mfu_source,
        "layouts": [_layout_json(task, f) for f in found],
        "not_counted": list(NOT_COUNTED),
    }


def _layout_json(task: Task, f: Fit) -> dict[str, Any]:
    layout, memory = f.layout, f.memory
    parts = {"weights": memory.weights, "gradients": memory.gradients, "optimizer": memory.optimizer}
    parts |= {"activations": memory.activations, "workspace": memory.workspace, "beside": f.needed - memory.peak}
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "context_parallel_size": layout.cp,
        "data_parallel_size": layout.dp,
        "sequence_parallel": layout.sequence_parallel,
        "micro_batch_size": layout.micro_batch_size,
        "recompute": layout.recompute,
        "memory_gib": round(f.needed / GIB, 2),
        "memory": {name: round(value / GIB, 2) for name, value in parts.items()},
        "parameters_per_rank": memory.parameters,
        "host_gib_per_node": round(f.host / GIB, 1),
        "fits": f.fits,
        "mfu": round(_mfu(task, f), 3) if task.mfu_source else None,
        "step_seconds": significant(f.step_seconds) if task.mfu_source else None,
        "gpu_hours": significant(f.gpu_hours) if task.mfu_source else None,
    }


def _mfu(task: Task, f: Fit) -> float:
    """The MFU that the step's time stands for."""
    return base_mfu(task, f.layout) * layout_factor(f.layout)


# ---------------------------------------------------------------------------------------------------------- terminal

#: What needs the memory, in the order of the bar, and its colour.
_PARTS = (
    ("weights", "blue"),
    ("gradients", "cyan"),
    ("optimizer", "green"),
    ("activations", "yellow"),
    ("workspace", "magenta"),
)
_BAR = 22
_SHOWN = 8


def _print(model: str, gpu: str, task: Task, found: Sequence[Fit]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shape, out = task.shape, console()
    flops = flops_per_token(architecture_of(shape), task.seq_length)
    out.print(
        f"{model}\n{parameter_count(shape):,} parameters, {flops / 1e9:.2f} GFLOP a token at {task.seq_length}\n"
        f"{task.gpus} × {gpu} with {task.gpu.memory_gib:g} GiB, {task.global_batch_size} sequences a step, "
        f"{task.precision}",
        highlight=False,
    )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("TP", "PP", "CP", "DP", "mb", "recompute", "GiB", "memory", "host", "s/step", "GPU-h"):
        table.add_column(name, justify="left" if name in ("recompute", "memory") else "right", no_wrap=True)
    fitting = [f for f in found if f.fits]
    for f in (fitting or list(found))[:_SHOWN]:
        layout = f.layout
        table.add_row(
            *map(str, (layout.tp, layout.pp, layout.cp, layout.dp, layout.micro_batch_size, layout.recompute)),
            Text(f"{f.needed / GIB:.1f}", "" if f.fits else "red"),
            _bar(f, task.gpu),
            f"{f.host / GIB:.0f}",
            f"{f.step_seconds:.2f}" if task.mfu_source else "-",
            f"{f.gpu_hours:,.0f}" if task.mfu_source else "-",
        )
    out.print(table)
    legend = Text.assemble(*(part for name, colour in _PARTS for part in (("█ ", colour), f"{name}  ")), "░ CUDA, NCCL")
    out.print(legend)
    out.print(f"host: GiB of a node's own memory. Not counted: {', '.join(NOT_COUNTED)}.", highlight=False)
    if not fitting:
        out.print("Nothing fits; these come closest. More GPUs, or tensor or pipeline parallelism, make room.")
    elif len(fitting) > _SHOWN:
        out.print(f"{len(fitting) - _SHOWN} more fit; --json lists all.")
    out.print(_time(task, (fitting or found)[0]), highlight=False)


def _time(task: Task, first: Fit) -> str:
    """How long the first layout takes, and what that rests on."""
    tokens = f"{format_count(task.train_iters * task.global_batch_size * task.seq_length)} tokens"
    if task.mfu_source is None:
        return f"{tokens}; no public run tells how fast {task.precision} is: give --mfu, or train for some steps."
    took = format_duration(first.gpu_hours / task.gpus * 3600)
    band = ", ± 20 %" if task.mfu_source == "assumed" else ""
    return (
        f"{tokens}, {task.train_iters:,} steps: {took} with the first, at an MFU of {_mfu(task, first):.0%} "
        f"({task.mfu_source}{band})."
    )


def _bar(f: Fit, gpu: Gpu) -> Any:
    """The device as a bar: what needs its memory, up to its edge."""
    from rich.text import Text

    scale = _BAR / (gpu.memory_gib * GIB)
    bar, end = Text(), 0.0
    for name, colour in _PARTS:
        start, end = round(end), end + getattr(f.memory, name) * scale
        bar.append("█" * (min(round(end), _BAR) - min(start, _BAR)), colour)
    used = min(round(end), _BAR)
    rest = min(round(f.needed * scale), _BAR) - used
    bar.append("░" * max(0, rest) + "·" * (_BAR - used - max(0, rest)), "dim")
    return bar.append("▏" if f.fits else "▶", "" if f.fits else "red")
