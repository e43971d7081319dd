"""Trainers whose every number is known from its global place alone, on any layout; what the tests of scale run."""

from __future__ import annotations

import types
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_checkpoints import CONFIGS
from torch import Tensor

import launcher.workers.megatron  # noqa: F401  must come before megatron.core

# isort: split
from launcher.configs import Parallelism
from launcher.models.families import shape_of
from launcher.workers.megatron import checkpoint, optimizer
from launcher.workers.megatron.model import build_model, freeze, initialize, sharded_tensors

#: Each state is drawn from a seed of its own; weights that are not trained have the last.
SEEDS = {"param": 11, "exp_avg": 12, "exp_avg_sq": 13, "frozen": 14}


@dataclass(frozen=True)
class Case:
    """A model and how it is trained; `bucket_size` in elements, 1 for a bucket a parameter."""

    model: str
    precision: str = "bf16"
    trainable: str = "all"
    bucket_size: int | None = 3000
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def shape(self) -> Any:
        return shape_of({**CONFIGS[self.model], **dict(self.changes)})


@dataclass
class Trainer:
    """What a Saver needs, and the wrapped model."""

    module: Any
    ddp: Any
    optimizer: Any
    scheduler: Any

    def saver(self, folder: Path) -> checkpoint.Saver:
        return checkpoint.Saver(folder, self.module, self.optimizer, self.scheduler, 2, None)

    def load(self, path: Path) -> int:
        return checkpoint.load_progress(path, self.module, self.optimizer, self.scheduler)


def build(
    case: Case, parallelism: Parallelism, seed: int = 0, build_module: Callable[..., Any] = build_model
) -> Trainer:
    """A trainer as `loop.build_trainer` makes it, but for the size of its buckets."""
    module = build_module(case.shape, parallelism, case.precision)
    initialize(module, case.shape, 0.02, seed)
    freeze(module, case.trainable)
    made = optimizer.DistributedDataParallelConfig
    optimizer.DistributedDataParallelConfig = lambda **k: made(**k, bucket_size=case.bucket_size)
    try:
        ddp = optimizer.wrap(module)
    finally:
        optimizer.DistributedDataParallelConfig = made
    config = types.SimpleNamespace(
        precision=case.precision,
        lr=1e-3,
        min_lr_ratio=0.1,
        weight_decay=0.1,
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_eps=1e-10,
        clip_grad=1.0,
        train_iters=10,
        global_batch_size=4,
        lr_warmup_fraction=0.2,
        lr_decay_style="cosine",
    )
    adam = optimizer.build_optimizer(config, ddp)
    return Trainer(module, ddp, adam, optimizer.build_scheduler(config, adam))


def step(trainer: Trainer, seed: int) -> None:
    """An optimizer step on gradients that are the same on every rank of a layout."""
    trainer.ddp.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    generator = torch.Generator().manual_seed(seed)
    for buffer in trainer.ddp.buffers:
        buffer.grad_data.copy_(torch.randn(buffer.grad_data.shape, generator=generator) * 1e-2)
    trainer.optimizer.step()
    trainer.scheduler.step(4)
    optimizer.gather_weights(trainer.ddp)


def fill(
    trainer: Trainer, case: Case, parallelism: Parallelism, build_module: Callable[..., Any] = build_model
) -> None:
    """Give every master weight, moment and frozen weight the number of its global place; three steps were taken."""
    step(trainer, 0)  # the moments come with it
    twins = _twins(case, parallelism, build_module)
    for name, state, live, place in _live(trainer):
        live.copy_(twins[state][name][place])
    names = {id(p): n for n, p in trainer.module.named_parameters()}
    for parameter in trainer.module.parameters():
        if not parameter.requires_grad:
            parameter.data.copy_(twins["frozen"][names[id(parameter)]].view(parameter.shape))
    for part in trainer.optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            state["step"].fill_(3.0)
    for _ in range(2):
        trainer.scheduler.step(4)


@torch.no_grad()
def wrong(
    trainer: Trainer, case: Case, parallelism: Parallelism, build_module: Callable[..., Any] = build_model
) -> dict[str, int]:
    """Numbers that are not what their global place says, by state; `weights` are those that forward would use."""
    twins = _twins(case, parallelism, build_module)
    found = dict.fromkeys([*SEEDS, "weights", "step", "schedule"], 0)
    for name, state, live, place in _live(trainer):
        found[state] += int((live != twins[state][name][place]).sum())
    for name, parameter in trainer.module.named_parameters():
        kind = "weights" if parameter.requires_grad else "frozen"
        wanted = twins["param" if parameter.requires_grad else "frozen"][name].to(parameter.dtype)
        found[kind] += int((parameter.detach().view(-1) != wanted).sum())
    for part in trainer.optimizer.chained_optimizers:
        found["step"] += sum(state["step"].item() != 3.0 for state in part.optimizer.state.values())
        own = [state["step"].data_ptr() for state in part.optimizer.state.values()]
        found["step"] += len(own) - len(set(own))
    found["schedule"] = int(trainer.scheduler.num_steps != 12)
    return found


@torch.no_grad()
def _twins(case: Case, parallelism: Parallelism, build_module: Callable[..., Any]) -> dict[str, dict[str, Tensor]]:
    """By state and parameter, this rank's part in fp32, flat: drawn for each whole global tensor, then cut."""
    twins = {}
    prefix = "module." if case.precision == "bf16" else ""
    module = build_module(case.shape, parallelism, "fp32")
    for state, seed in SEEDS.items():
        for piece in sharded_tensors(module):
            lead = piece.prepend_axis_num
            index, offset = piece.global_offset[:lead], piece.global_offset[lead:]
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{piece.key}/{index}".encode()))
            whole = torch.randn(piece.global_shape[lead:], generator=generator)
            piece.data.copy_(whole[tuple(slice(o, o + n) for o, n in zip(offset, piece.local_shape, strict=True))])
        twins[state] = {prefix + name: p.detach().clone().view(-1) for name, p in module.named_parameters()}
    return twins


def _live(trainer: Trainer) -> Iterator[tuple[str, str, Tensor, slice]]:
    """Of each trained parameter of this rank: its name, a state's name, the live tensor, and its place in the part."""
    names = {id(p): n for n, p in trainer.module.named_parameters()}
    for part in trainer.optimizer.chained_optimizers:
        for parameter in part.model_param_gbuf_map:
            place = part._get_model_param_range_map(parameter)["param"]
            for state, live in part._get_main_param_and_optimizer_states(parameter).items():
                if state != "step":
                    yield names[id(parameter)], state, live.detach(), slice(place.start, place.end)


def padded_buckets(trainer: Trainer) -> int:
    """Buckets that end in padding."""
    buckets = [bucket for buffer in trainer.ddp.buffers for bucket in buffer.buckets]
    return sum(bucket.grad_data.numel() != bucket.numel_unpadded for bucket in buckets)
