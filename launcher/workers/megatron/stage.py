"""A whole `train` stage: check the inputs, build, train, leave the artifact, record what was done."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import is_main_replica

from launcher.configs import TrainConfig
from launcher.convert import run_config
from launcher.errors import UserError
from launcher.models.families import shape_of
from launcher.models.layout import check_layout, chosen_layout
from launcher.models.shape import ModelShape
from launcher.progress import METRICS, StageJob
from launcher.workers.megatron import checkpoint, cpu_mode, hf_files, loop, numerics
from launcher.workers.megatron.data import Blend, Source, read_sources, told_sources
from launcher.workers.megatron.layers import fusions, kernels
from launcher.workers.megatron.model import build_model, freeze, initialize, sharded_tensors
from launcher.workers.megatron.parallel import process_groups, sum_over_ranks

#: Steps that warm up caches and allocators; they do not count for the speed.
_WARM_STEPS = 10


def train(job: StageJob) -> None:
    """Run the stage. Raises UserError for inputs that do not fit, Stopped, Diverged."""
    config: TrainConfig = job.config(TrainConfig)
    shape, layout = shape_of(config.model.config), chosen_layout(config)
    problems = check_layout(shape, config, job.world_size, cpu=cpu_mode.active())
    if problems:
        raise UserError(problems)
    folders = {port.removesuffix(".tokens"): job.input(port) for port in job.spec.inputs if port.endswith(".tokens")}
    found = _read(config, folders) if job.rank == 0 else (None, None)
    start = job.input("checkpoint") if "checkpoint" in job.spec.inputs else None
    tokenizers = _tokenizers(job, start)
    hf_files.check_tokenizers(tokenizers, shape.vocab_size)
    if start is not None:
        hf_files.check_start(start / "hf", shape)
    if cpu_mode.active() and job.rank == 0:
        print(cpu_mode.NOTICE, flush=True)
    with process_groups(layout, job.rank, job.world_size, job.spec.seed, job.spec.limits.hang_s):
        samples = config.train_iters * config.global_batch_size
        progress = job.workdir / "progress"
        sources, held = (told_sources(folders, w, s) for w, s in zip(_weights(config), found, strict=True))
        blend = _blend(config, sources, samples, job.spec.seed, shape, progress / "index")
        held_out = _held_out(config, held, shape, progress / "index")
        numerics.ready(config, shape)
        fields = numerics.numeric_fields(config)
        module = build_model(shape, layout, config.precision, document_masking=config.document_masking, **fields)
        newest = checkpoint.newest_for_all(progress / "checkpoints")
        if newest is None:
            _set_weights(module, shape, config, start, job.spec.seed)
        freeze(module, config.trainable)
        trainer = loop.build_trainer(config, module, blend, held_out)
        counts = _count_parameters(module, shape)
        if job.rank == 0:
            job.record(**counts, **_facts(config, shape, blend, job.world_size))
            for source in blend.mix():
                print(_blend_line(source))
        loss = loop.run(job, trainer)
        waiting = partial(job.beat_again, pause_s=loop.BEAT_S)
        checkpoint.save_weights(job.output("checkpoint"), config.train_iters, module, waiting)
        if job.rank == 0:
            run_config.write_beside(
                job.output("checkpoint"), shape, next(module.parameters()).dtype, config.model.config
            )
            hf = start / "hf" if start is not None else None
            tokenizer = next(iter(tokenizers.values()), None)
            hf_files.write(job.output("checkpoint") / "hf", hf, tokenizer, config.model.config, config.precision)
            job.record(loss=loss, tokens_per_s=_speed(job, newest))


def _blend(
    config: TrainConfig, sources: Sequence[Source], samples: int, seed: int, shape: ModelShape, index: Path
) -> Blend:
    options: dict[str, Any] = {"document_masking": config.document_masking, "packing": config.packing}
    return Blend(sources, samples, config.seq_length, seed, shape.vocab_size, index, **options)


def _blend_line(source: dict[str, Any]) -> str:
    line = "blend: {source}, weight {weight:.3g}: {tokens:,} tokens, {epochs:.2f} epochs".format(**source)
    return line + (f", {source['padding']:.3%} padding" if "padding" in source else "")


def _weights(config: TrainConfig) -> tuple[dict[str, float], dict[str, float]]:
    """Sources by name: those that training draws from, and those whose losses are measured."""
    return dict(config.data), dict.fromkeys(config.validation, 1.0)


def _read(config: TrainConfig, folders: dict[str, Path]) -> tuple[Sequence[Source], Sequence[Source]]:
    drawn, held = (read_sources(folders, config.seq_length, weights, config.packing) for weights in _weights(config))
    return drawn, held


def _held_out(config: TrainConfig, sources: Sequence[Source], shape: ModelShape, index: Path) -> dict[str, Blend]:
    """The sources whose losses are measured: the same sequences of each every time, whatever the run's seed."""
    samples = config.eval_iters * config.global_batch_size
    return {s.name: _blend(config, [s], samples, 0, shape, index) for s in sources}


def _tokenizers(job: StageJob, start: Path | None) -> dict[str, Path]:
    """Every tokenizer that the stage is given, by what it belongs to."""
    prepared = {port: job.input(port) for port in job.spec.inputs if port.endswith(".tokenizer")}
    return ({"checkpoint": start / "hf"} if start is not None else {}) | prepared


def _set_weights(
    module: torch.nn.Module, shape: ModelShape, config: TrainConfig, start: Path | None, seed: int
) -> None:
    if start is None:
        initialize(module, shape, config.model.init_method_std, seed)
    else:
        checkpoint.load_weights(start, module)


def _count_parameters(module: torch.nn.Module, shape: ModelShape) -> dict[str, int]:
    """Elements of the whole model's parameters: each once, however many ranks hold it, and no vocabulary padding."""
    mine = [p for p in sharded_tensors(module) if is_main_replica(p.replica_id)]
    trained = sum(p.data.numel() for p in mine if p.data.requires_grad)
    whole, trained = (int(n) for n in sum_over_ranks([sum(p.data.numel() for p in mine), trained]))
    matrices = 1 if shape.share_embeddings_and_output_weights else 2
    padding = matrices * (shape.padded_vocab_size - shape.vocab_size) * shape.hidden_size
    return {"parameters": whole - padding, "trainable_parameters": trained - (padding if trained == whole else 0)}


def _speed(job: StageJob, resumed: Path | None) -> float | None:
    """Median tokens/s of the steps since the checkpoint gone on from, but for the first; None where there are too few.

    Steps before it may have run on another layout.
    """
    start = int(resumed.name.removeprefix("iter_")) if resumed else 0
    rows = map(json.loads, (job.workdir / METRICS).read_text(encoding="utf-8").splitlines())
    speeds = [row["tokens_per_s"] for row in rows if row["iteration"] > start + _WARM_STEPS]
    return statistics.median(speeds) if speeds else None


def _facts(config: TrainConfig, shape: ModelShape, blend: Blend, world_size: int) -> dict[str, Any]:
    layout = chosen_layout(config)
    fused = fusions(shape, layout, config.precision, deterministic=config.deterministic_mode)
    return {
        "versions": {"torch": torch.__version__, "megatron-core": version("megatron-core")},
        "cpu_mode": cpu_mode.active(),
        "device": None if cpu_mode.active() else torch.cuda.get_device_name(),
        "world_size": world_size,
        "tokens": config.train_iters * config.global_batch_size * config.seq_length,
        "data": blend.mix(),
        "layout": {
            "tensor_model_parallel_size": layout.tensor_model_parallel_size,
            "pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
            "context_parallel_size": layout.context_parallel_size,
            "sequence_parallel": layout.sequence_parallel,
            "recompute": layout.recompute,
        },
        "kernels": kernels(),
        "fusions": sorted(name for name, on in fused.items() if on),
        "fp8": config.fp8_format and f"{config.fp8_format}, {config.fp8_recipe}",
        "deterministic_mode": torch.are_deterministic_algorithms_enabled(),
    }
