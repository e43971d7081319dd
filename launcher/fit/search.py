"""Layouts of a model on a number of GPUs: which can work, which fit, how long a step takes; best first. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from launcher.configs import Parallelism
from launcher.fit.gpus import Gpu, default_mfu
from launcher.fit.layers import Architecture, architecture_of, flops_per_token
from launcher.fit.memory import Layout, Memory, Recompute, memory_of, needed_bytes
from launcher.models.families import parameter_count
from launcher.models.layout import split_problems
from launcher.models.shape import ModelShape

GIB = 2**30
#: Share of the device that a layout may need and still be called fitting.
_ROOM = 0.95
#: From this length on, splitting a sequence is worth trying though something else fits; Megatron-Bridge's recipes.
_LONG = 16384
_TP = (1, 2, 4, 8)
_PP = (1, 2, 4, 8, 16)
_CP = (1, 2, 4, 8)
_MICRO = (1, 2, 4)
#: Share of the rate that is left with tensor parallelism inside a node, and with recomputation: docs/fit.md.
_TP_FACTOR: Mapping[int, float] = {1: 1.0, 2: 0.97, 4: 0.92, 8: 0.75}
_RECOMPUTE_FACTOR: Mapping[Recompute, float] = {"none": 1.0, "mlp": 0.84, "full": 0.75}


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be trained, on what. `fixed` holds sizes that the user chose, by their names in `Layout`."""

    shape: ModelShape
    gpu: Gpu
    gpus: int
    seq_length: int
    global_batch_size: int
    train_iters: int
    gpus_per_node: int = 8
    mfu: float | None = None
    fixed: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Fit:
    """A layout with what it needs and how long a step takes."""

    layout: Layout
    memory: Memory
    needed: float
    fits: bool
    step_seconds: float
    gpu_hours: float


def find_layouts(task: Task) -> list[Fit]:
    """Every layout that can work, those that fit first and the fastest of them first."""
    architecture = architecture_of(task.shape)
    found = [_fit(task, architecture, layout) for layout in _candidates(task)]
    alone = [f for f in found if f.layout.cp == 1]
    if task.seq_length < _LONG and "cp" not in (task.fixed or {}) and any(f.fits for f in alone):
        found = alone
    return sorted(found, key=_rank)


def _rank(fit: Fit) -> tuple[bool, float, float, int, int, int]:
    """Fitting first, then speed; layouts within 3 % of one another by free memory, then by plainness."""
    layout = fit.layout
    pace = round(math.log(fit.step_seconds) / math.log(1.03))
    return (not fit.fits, pace if fit.fits else fit.needed, fit.needed, layout.tp, layout.pp, layout.cp)


def _candidates(task: Task) -> Iterator[Layout]:
    fixed = task.fixed or {}
    sizes = ([fixed[name]] if name in fixed else choices for name, choices in
             (("tp", _TP), ("pp", _PP), ("cp", _CP), ("micro_batch_size", _MICRO)))  # fmt: skip
    for tp, pp, cp, micro, kind in itertools.product(*sizes, _RECOMPUTE_FACTOR):
        layout = Layout(
            gpus=task.gpus, tp=tp, pp=pp, cp=cp, micro_batch_size=micro,
            global_batch_size=task.global_batch_size, seq_length=task.seq_length, recompute=kind,
        )  # fmt: skip
        if not layout_problems(task, layout):
            yield layout


def layout_problems(task: Task, layout: Layout) -> list[str]:
    """Why a layout cannot work, whatever the memory; each line starts with the size's name."""
    tp, pp, cp = layout.tp, layout.pp, layout.cp
    found = split_problems(task.shape, parallelism_of(layout), task.seq_length)
    if tp > task.gpus_per_node:
        found.append(f"tensor_model_parallel_size: {tp} is more than the {task.gpus_per_node} GPUs of a node")
    if task.gpus % (tp * pp * cp):
        found.append(f"tensor x pipeline x context parallel size {tp * pp * cp} does not divide {task.gpus} GPUs")
    elif task.global_batch_size % (layout.dp * layout.micro_batch_size):
        found.append(
            f"global_batch_size: {task.global_batch_size} is no multiple of {layout.dp} data-parallel replicas x "
            f"micro_batch_size {layout.micro_batch_size}"
        )
    return found


def parallelism_of(layout: Layout) -> Parallelism:
    """A layout as a recipe's `parallelism:`."""
    return Parallelism(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.sequence_parallel,
        recompute=layout.recompute,
    )


def _fit(task: Task, architecture: Architecture, layout: Layout) -> Fit:
    memory = memory_of(architecture, layout)
    needed = needed_bytes(memory, layout)
    seconds = step_seconds(task, architecture, layout)
    hours = seconds * task.train_iters * task.gpus / 3600
    return Fit(layout, memory, needed, needed <= _ROOM * task.gpu.memory_gib * GIB, seconds, hours)


def step_seconds(task: Task, architecture: Architecture, layout: Layout) -> float:
    """Seconds of a step: its FLOPs at the share of the peak to expect, and the pipeline's bubble."""
    hybrid = task.shape.hybrid_override_pattern is not None and "M" in task.shape.hybrid_override_pattern
    share = task.mfu or default_mfu(task.gpu, parameter_count(task.shape), hybrid)
    share *= _TP_FACTOR.get(layout.tp, 0.75) * _RECOMPUTE_FACTOR[layout.recompute]
    tokens = task.global_batch_size * task.seq_length
    work = tokens * flops_per_token(architecture, task.seq_length)
    bubble = (layout.pp - 1) / (layout.micro_batches * layout.vpp)
    return work / (task.gpus * task.gpu.tflops * 1e12 * share) * (1 + bubble)
