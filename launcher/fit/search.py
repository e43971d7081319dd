"""Layouts of a model on a number of GPUs: which can work, which fit, how long a step takes; best first. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from launcher.configs import Parallelism
from launcher.fit.gpus import Gpu, default_mfu
from launcher.fit.host import node_bytes
from launcher.fit.layers import Architecture, architecture_of, flops_per_token
from launcher.fit.memory import Layout, Memory, Precision, memory_of, needed_bytes
from launcher.fit.speed import RECOMPUTE_FACTOR, PastRun, layout_factor, measured_mfu
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


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be trained, on what. `fixed` holds sizes that the user chose, by their names in `Layout`.

    The MFU is `mfu` where it is given, else that of the runs in `past`, else the one that public runs have.
    """

    shape: ModelShape
    gpu: Gpu
    gpus: int
    seq_length: int
    global_batch_size: int
    train_iters: int
    gpus_per_node: int = 8
    mfu: float | None = None
    past: tuple[PastRun, ...] = ()
    precision: Precision = "bf16"
    trainable: Literal["all", "attention"] = "all"
    fixed: Mapping[str, Any] | None = None

    @property
    def mfu_source(self) -> str | None:
        """Where the MFU comes from: `given`, `measured: N runs …`, `assumed`; None where nothing is known.

        Public runs are in bf16, so in fp32 there is no time to tell, and what `step_seconds` gives is for ranking.
        """
        if self.mfu is not None:
            return "given"
        if self.past:
            kind = "hybrid" if self.shape.has_mamba else "dense"
            whose = "this model" if all(r.shape == self.shape for r in self.past) else f"other {kind} models"
            count = len(self.past)
            return f"measured: {count} run{'s' if count > 1 else ''} of {whose}"
        return "assumed" if self.precision == "bf16" else None


@dataclass(frozen=True)
class Fit:
    """A layout with what it needs of a GPU and of a node's own memory, in bytes, and how long a step takes."""

    layout: Layout
    memory: Memory
    needed: float
    fits: bool
    step_seconds: float
    gpu_hours: float
    host: float


def find_layouts(task: Task) -> list[Fit]:
    """Every layout that can work, those that fit first and the fastest of them first."""
    architecture = architecture_of(task.shape)
    found = [_fit(task, architecture, layout) for layout in _candidates(task)]
    alone = [f for f in found if f.layout.cp == 1]
    if task.seq_length < _LONG and "cp" not in (task.fixed or {}) and any(f.fits for f in alone):
        found = alone
    best = min((f.step_seconds for f in found), default=1.0)
    return sorted(found, key=lambda f: _rank(f, best))


def _rank(fit: Fit, best: float) -> tuple[bool, float, float, int, int, int]:
    """Fitting first, then speed against the best; layouts within 3 % of one another by free memory, then plainness."""
    layout = fit.layout
    pace = round(math.log(fit.step_seconds / best) / math.log(1.03))
    return (not fit.fits, pace if fit.fits else fit.needed, fit.needed, layout.tp, layout.pp, layout.cp)


def _candidates(task: Task) -> Iterator[Layout]:
    fixed = task.fixed or {}
    sizes = ([fixed[name]] if name in fixed else choices for name, choices in
             (("tp", _TP), ("pp", _PP), ("cp", _CP), ("micro_batch_size", _MICRO)))  # fmt: skip
    for tp, pp, cp, micro, kind in itertools.product(*sizes, RECOMPUTE_FACTOR):
        layout = Layout(
            gpus=task.gpus, tp=tp, pp=pp, cp=cp, micro_batch_size=micro,
            global_batch_size=task.global_batch_size, seq_length=task.seq_length, recompute=kind,
            precision=task.precision,
        )  # fmt: skip
        if not layout_problems(task, layout):
            yield layout


def layout_problems(task: Task, layout: Layout) -> list[str]:
    """Why a layout cannot work, whatever the memory; each line starts with the size's name."""
    tp, pp, cp = layout.tp, layout.pp, layout.cp
    found = split_problems(task.shape, parallelism_of(layout), task.seq_length)
    if tp > task.gpus_per_node:
        found.append(f"tensor_model_parallel_size: {tp} is more than the {task.gpus_per_node} GPUs of a node")
    elif task.gpus > task.gpus_per_node and task.gpus_per_node % tp:
        found.append(f"tensor_model_parallel_size: {tp} does not divide the {task.gpus_per_node} GPUs of a node")
    if task.gpus % (tp * pp * cp):
        found.append(f"tensor x pipeline x context parallel size {tp * pp * cp} does not divide {task.gpus} GPUs")
    elif task.global_batch_size % (layout.dp * layout.micro_batch_size):
        at_once = layout.dp * layout.micro_batch_size
        found.append(
            f"global_batch_size: {task.global_batch_size} is no multiple of {layout.dp} data-parallel replicas x "
            f"micro_batch_size {layout.micro_batch_size}; {-(-task.global_batch_size // at_once) * at_once} is"
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
    memory, needed, fits = room(task.gpu, architecture, layout)
    seconds = step_seconds(task, architecture, layout)
    hours = seconds * task.train_iters * task.gpus / 3600
    host = node_bytes(architecture, layout, min(task.gpus, task.gpus_per_node), trainable=task.trainable)
    return Fit(layout, memory, needed, fits, seconds, hours, host)


def room(gpu: Gpu, architecture: Architecture, layout: Layout) -> tuple[Memory, float, bool]:
    """What a layout needs of a GPU, in parts and in bytes, and whether that fits.

    In fp32 attention keeps its scores: Transformer Engine's fused kernels are for 16 bits.
    """
    memory = memory_of(architecture, layout, fused_attention=layout.precision == "bf16")
    needed = needed_bytes(memory, layout)
    return memory, needed, needed <= _ROOM * gpu.memory_gib * GIB


def base_mfu(task: Task, layout: Layout) -> float:
    """The MFU to expect of a layout before what `layout_factor` takes of it."""
    if task.mfu is not None:
        return task.mfu
    if task.past:
        return measured_mfu(task.past, layout)
    return default_mfu(task.gpu, parameter_count(task.shape), task.shape.has_mamba)


def step_seconds(task: Task, architecture: Architecture, layout: Layout) -> float:
    """Seconds of a step: its FLOPs at the share of the peak to expect."""
    tokens = task.global_batch_size * task.seq_length
    work = tokens * flops_per_token(architecture, task.seq_length, task.trainable)
    share = base_mfu(task, layout) * layout_factor(layout)
    return work / (task.gpus * task.gpu.tflops * 1e12 * share)
