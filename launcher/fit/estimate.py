"""What the stages of a plan will take and write, estimated before they run: time, GPU-hours, memory, bytes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.configs import Parallelism, TrainConfig
from launcher.fit.gpus import GPUS
from launcher.fit.host import node_bytes, stop_seconds
from launcher.fit.layers import architecture_of
from launcher.fit.memory import Layout
from launcher.fit.saving import saving_of
from launcher.fit.search import GIB, Task, room, step_seconds
from launcher.fit.speed import PastRun, layout_of, runs_like, uncounted
from launcher.models.families import parameter_count, shape_of
from launcher.models.shape import ModelShape
from launcher.run_record import PlannedStage
from launcher.spec import decode


@dataclass(frozen=True)
class Estimate:
    """What is known of a stage; None where nothing is.

    tokens: to train on; seconds, gpu_hours: of training, without starts, checkpoints and validation; mfu_source: what
    they rest on; memory_gib, fits: of the GPU that needs most; host_gib: of a node's own memory; stop_seconds: from a
    request to stop to a whole checkpoint; writes: bytes of the artifact; keeps: bytes that the
    checkpoints to resume from take at most until it is whole; notes: what it does not count.
    """

    tokens: int | None = None
    seconds: float | None = None
    gpu_hours: float | None = None
    mfu_source: str | None = None
    memory_gib: float | None = None
    fits: bool | None = None
    host_gib: float | None = None
    stop_seconds: float | None = None
    writes: int | None = None
    keeps: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Weights:
    """A checkpoint's bytes, and its parameters where they are known."""

    bytes: int
    parameters: int | None = None


def estimates(stages: Iterable[PlannedStage], gpu: str | None, past: Iterable[PastRun]) -> Mapping[str, Estimate]:
    """An estimate for each stage, in the plan's order, by name. `gpu` is the cluster's type."""
    runs, made, found = tuple(past), dict[str, _Weights | None](), dict[str, Estimate]()
    for stage in stages:
        spec = stage.spec
        if spec.kind == "train":
            config = decode(TrainConfig, spec.config)
            shape = shape_of(config.model.config)
            count = parameter_count(shape)
            made[spec.fingerprint] = _Weights(count * _weight_bytes(config), count)
            found[spec.stage] = _of_training(config, shape, stage, gpu, runs)
            continue
        made[spec.fingerprint] = weights = _of_checkpoint(stage, made)
        found[spec.stage] = Estimate(writes=weights.bytes if weights else None)
    return found


def _weight_bytes(config: TrainConfig) -> int:
    return 2 if config.precision == "bf16" else 4


def _of_checkpoint(stage: PlannedStage, made: Mapping[str, _Weights | None]) -> _Weights | None:
    """The checkpoint that a stage makes of another: as large where it is converted or merged; by TRL in fp32."""
    spec = stage.spec
    ports = spec.inputs if spec.kind == "merge" else ("checkpoint",)
    read = [spec.inputs[port] for port in ports if port in spec.inputs and "checkpoint" in spec.outputs]
    known = (made[i.fingerprint] if i.fingerprint in made else _on_disk(Path(i.path)) for i in read)
    weights = next((w for w in known if w is not None), None)
    if weights is None or spec.kind in ("convert", "merge"):
        return weights
    if spec.config.get("backend") == "trl" and weights.parameters:
        return _Weights(4 * weights.parameters, weights.parameters)
    return None


def _on_disk(path: Path) -> _Weights | None:
    """A checkpoint outside the store, where it is one of Hugging Face's."""
    with contextlib.suppress(OSError):
        if size := sum(file.stat().st_size for file in path.glob("*.safetensors")):
            return _Weights(size)
    return None


def _of_training(
    config: TrainConfig, shape: ModelShape, stage: PlannedStage, gpu: str | None, runs: tuple[PastRun, ...]
) -> Estimate:
    count, width = parameter_count(shape), _weight_bytes(config)
    # The bytes of a checkpoint to resume from depend on no layout; there is one more while the next is written.
    each = saving_of(architecture_of(shape), Layout(gpus=1, precision=config.precision), trainable=config.trainable)
    saved = (config.train_iters - 1) // config.save_interval
    forever = (config.train_iters - 1) // math.lcm(config.save_interval, config.keep_every) if config.keep_every else 0
    kept = min(saved, config.keep_last + 1 + forever)
    known = Estimate(
        tokens=config.train_iters * config.global_batch_size * config.seq_length,
        writes=count * width,
        keeps=None if config.entrypoint else kept * int(each.total_bytes),
    )
    gpus = stage.resources.nodes * stage.resources.ntasks_per_node
    if gpu not in GPUS or not stage.resources.gpus_per_node or not isinstance(config.parallelism, Parallelism):
        return known
    task = Task(
        shape=shape,
        gpu=GPUS[gpu],
        gpus=gpus,
        seq_length=config.seq_length,
        global_batch_size=config.global_batch_size,
        train_iters=config.train_iters,
        past=runs_like(runs, gpu, shape, config.precision),
        precision=config.precision,
        trainable=config.trainable,
        gpus_per_node=stage.resources.ntasks_per_node,
    )
    return _with_gpus(known, task, config, config.parallelism)


def _with_gpus(known: Estimate, task: Task, config: TrainConfig, parallelism: Parallelism) -> Estimate:
    """What the GPUs add: time, and the memory that the layout needs. Nothing in FP8, which is not counted."""
    notes = tuple(uncounted(config))
    if config.fp8_format is not None:
        return replace(known, notes=notes)
    architecture, layout = architecture_of(task.shape), layout_of(config, parallelism, task.gpus)
    _, needed, fits = room(task.gpu, architecture, layout)
    timed = task.mfu_source is not None
    seconds = task.train_iters * step_seconds(task, architecture, layout)
    ranks = task.gpus_per_node
    saving = saving_of(architecture, layout, gpus_per_node=ranks, trainable=config.trainable)
    return replace(
        known,
        seconds=seconds if timed else None,
        gpu_hours=seconds * task.gpus / 3600 if timed else None,
        mfu_source=task.mfu_source,
        memory_gib=needed / GIB,
        fits=fits,
        host_gib=node_bytes(architecture, layout, ranks, trainable=config.trainable) / GIB,
        stop_seconds=stop_seconds(saving, max(1, task.gpus // ranks), seconds / task.train_iters if timed else 0.0),
        notes=notes,
    )
