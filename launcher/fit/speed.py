"""What share of the GPU's peak a training step reaches: as public runs have it, or as the user's own past runs did."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from launcher.configs import Parallelism, TrainConfig
from launcher.errors import UserError
from launcher.fit.gpus import GPUS, type_of_device
from launcher.fit.layers import architecture_of, flops_per_token
from launcher.fit.memory import Layout, Precision, Recompute
from launcher.models.families import shape_of
from launcher.models.shape import ModelShape
from launcher.spec import SpecError, decode
from launcher.store import Receipt

#: Share of the rate that is left with tensor parallelism inside a node, and with recomputation: docs/fit.md.
TP_FACTOR: Mapping[int, float] = {1: 1.0, 2: 0.97, 4: 0.92, 8: 0.75}
RECOMPUTE_FACTOR: Mapping[Recompute, float] = {"none": 1.0, "mlp": 0.84, "full": 0.75}


def layout_factor(layout: Layout) -> float:
    """What a layout leaves of the MFU that one GPU alone would reach: tensor parallelism, recomputation, the bubble."""
    bubble = (layout.pp - 1) / (layout.micro_batches * layout.vpp)
    return TP_FACTOR.get(layout.tp, 0.75) * RECOMPUTE_FACTOR[layout.recompute] / (1 + bubble)


@dataclass(frozen=True)
class PastRun:
    """How fast a training run was: on which GPU type, with what layout, at which MFU of the bf16 peak."""

    gpu: str
    shape: ModelShape
    layout: Layout
    mfu: float


def past_runs(receipts: Iterable[Receipt]) -> list[PastRun]:
    """The training runs that tell of a GPU's speed.

    Those do not that ran on a CPU or on a GPU of no known type, those of scripts, those too short to tell, and those
    that did less than training a whole model on whole sequences in one precision.
    """
    return [run for receipt in receipts if (run := _past_run(receipt)) is not None]


def _past_run(receipt: Receipt) -> PastRun | None:
    record = receipt.record
    gpu, speed, world_size = (record.get(name) for name in ("device", "tokens_per_s", "world_size"))
    gpu = type_of_device(gpu) if isinstance(gpu, str) else None
    if gpu is None or record.get("cpu_mode") or not isinstance(speed, (int, float)) or not isinstance(world_size, int):
        return None
    if world_size < 1:
        return None
    try:
        config = decode(TrainConfig, receipt.config)
        shape = shape_of(config.model.config)
    except (SpecError, UserError):  # of another version
        return None
    if uncounted(config) or not isinstance(config.parallelism, Parallelism) or not 0 < speed < float("inf"):
        return None
    per_token = flops_per_token(architecture_of(shape), config.seq_length)
    mfu = speed * per_token / (world_size * GPUS[gpu].tflops * 1e12)
    return PastRun(gpu, shape, layout_of(config, config.parallelism, world_size), mfu)


def uncounted(config: TrainConfig) -> list[str]:
    """What a stage does that memory and time do not count, in words."""
    told = [
        (config.fp8_format is not None, "fp8_format: FP8 is not counted, neither its memory nor its speed"),
        (config.document_masking, "document_masking: attention is counted over whole sequences"),
        (config.packing != "concatenate", "packing: padding is counted as tokens"),
        (config.trainable != "all", "trainable: the memory of a GPU is counted as if all weights were trained"),
        (config.deterministic_mode, "deterministic_mode: its kernels are slower, which is not counted"),
        (config.entrypoint is not None, "entrypoint: counted as our own loop; a script may do otherwise"),
    ]
    return [words for holds, words in told if holds]


def layout_of(config: TrainConfig, parallelism: Parallelism, gpus: int) -> Layout:
    """A stage's layout on so many GPUs."""
    return Layout(
        gpus=gpus,
        tp=parallelism.tensor_model_parallel_size,
        pp=parallelism.pipeline_model_parallel_size,
        cp=parallelism.context_parallel_size,
        sp=parallelism.sequence_parallel,
        recompute=parallelism.recompute,
        micro_batch_size=config.micro_batch_size,
        global_batch_size=config.global_batch_size,
        seq_length=config.seq_length,
        precision=config.precision,
        gathers_keys=config.document_masking and parallelism.context_parallel_size > 1,
    )


def runs_like(runs: Iterable[PastRun], gpu: str, shape: ModelShape, precision: Precision) -> tuple[PastRun, ...]:
    """The runs to learn from: on this type of GPU and in this precision, of this model; else of models of its class,
    dense or hybrid."""
    comparable = [r for r in runs if r.gpu == gpu and r.layout.precision == precision]
    same = [r for r in comparable if r.shape == shape]
    return tuple(same or (r for r in comparable if r.shape.has_mamba == shape.has_mamba))


def measured_mfu(runs: Sequence[PastRun], layout: Layout) -> float:
    """The MFU to expect before `layout_factor`: the median of runs with this tensor parallel size, else of all."""
    near = [r for r in runs if r.layout.tp == layout.tp] or runs
    return statistics.median(r.mfu / layout_factor(r.layout) for r in near)
