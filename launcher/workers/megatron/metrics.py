"""What a run tells of itself, step by step: metrics.jsonl, TensorBoard, and Weights & Biases where it is named."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from launcher.configs import TrainConfig
from launcher.errors import UserError
from launcher.fit.gpus import GPUS, type_of_device
from launcher.fit.layers import architecture_of, flops_per_token
from launcher.models.families import shape_of
from launcher.progress import METRICS, StageJob
from launcher.workers.megatron import cpu_mode
from launcher.workers.megatron.parallel import sum_over_ranks

#: Figures of a step that TensorBoard and W&B get too, by their names in metrics.jsonl.
_SCALARS = ("loss", "lr", "grad_norm", "tokens_per_s", "tflops_per_rank", "mfu", "memory_gib", "seconds")


@dataclass
class Clock:
    """Seconds of a step's parts on this rank, by the host's clock.

    `backward` is the rest of the schedule, waits for other pipeline stages with it. A GPU works on while the
    host goes ahead, so what it has left to do is waited for, and counted, in `optimizer`.
    """

    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what runs inside."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def take(self) -> dict[str, float]:
        """The parts so far, each without those that ran inside it, and start again."""
        parts, self.seconds = self.seconds, {}
        if "backward" in parts:
            parts["backward"] -= parts.get("data", 0.0) + parts.get("forward", 0.0)
        return {f"seconds_{name}": value for name, value in parts.items()}


def memory_gib() -> float:
    """Most memory so far: allocated on the GPU, or resident where there is none."""
    if cpu_mode.active():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return int(torch.cuda.max_memory_allocated()) / 2**30


def peak_tflops() -> float | None:
    """The GPU's dense bf16 peak in TFLOP/s; None for one that `launcher.fit.gpus` does not know, and on a CPU."""
    device = None if cpu_mode.active() else type_of_device(torch.cuda.get_device_name())
    return GPUS[device].tflops if device else None


@dataclass
class Metrics:
    """Writes the figures of steps; on ranks other than 0 it does nothing."""

    job: StageJob
    per_token: Callable[[float], float]
    peak: float | None
    boards: Sequence[TensorBoard | WeightsAndBiases]

    def step(
        self, iteration: int, tokens: int, speed: float, figures: Mapping[str, float], document_length: float
    ) -> None:
        """One training step: `tokens` so far, `speed` in tokens a second of all ranks.

        `document_length` is the mean length, weighted by tokens, within which tokens see each other.
        """
        if self.job.rank:
            return
        rate = speed * self.per_token(document_length) / self.job.world_size / 1e12
        row = {"iteration": iteration, "tokens": tokens, "tokens_per_s": speed, "tflops_per_rank": rate}
        if self.peak:
            row["mfu"] = rate / self.peak
        row |= {"memory_gib": memory_gib(), **figures}
        self.job.metric(**row)
        scalars = {f"train/{name}": row[name] for name in _SCALARS if name in row}
        scalars |= {name: value for name, value in row.items() if name.startswith("validation/")}
        for board in self.boards:
            board(iteration, scalars)

    def close(self) -> None:
        """Let the boards write what they hold."""
        for board in self.boards:
            board.close()


def open_metrics(job: StageJob, config: TrainConfig, done: int) -> Metrics:
    """Metrics of a run that goes on after `done` steps: what stands beyond them is dropped."""
    boards: list[TensorBoard | WeightsAndBiases] = []
    if job.rank == 0:
        job.truncate_metrics("iteration", done)
        if importlib.util.find_spec("tensorboard"):
            boards.append(TensorBoard(job, done))
        else:
            print("tensorboard is not installed here: none of its files are written", flush=True)
        boards += [WeightsAndBiases(job, config)] if config.wandb_project else []
    architecture = architecture_of(shape_of(config.model.config))
    per_token = partial(flops_per_token, architecture, trainable=config.trainable)
    return Metrics(job, per_token, peak_tflops(), boards)


def earlier_losses(job: StageJob, most: int) -> list[float]:
    """The last losses, at most so many, of the lines that the attempts before have left; all ranks call it.

    Rank 0's word: on a network file system others may not see yet what it sees.
    """
    path, found = job.workdir / METRICS, list[float]()
    if job.rank == 0 and path.exists():
        found = [json.loads(line)["loss"] for line in path.read_text(encoding="utf-8").splitlines()][-most:]
    count, *losses = sum_over_ranks([len(found), *found, *[0.0] * (most - len(found))])
    return losses[: int(count)]


class TensorBoard:
    """Event files under `tensorboard/` of the artifact; those of a life that was cut off are cut at its last step."""

    def __init__(self, job: StageJob, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(job.workdir / "tensorboard"), purge_step=done + 1)

    def __call__(self, iteration: int, values: Mapping[str, float]) -> None:
        """The values of a step, as one record: `add_scalar` makes a record of each, with a checksum in Python."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self.writer.file_writer.add_summary(Summary(value=scalars), iteration)

    def close(self) -> None:
        """Write out."""
        self.writer.close()


class WeightsAndBiases:
    """A run of the project that the recipe names; without WANDB_API_KEY kept under `wandb/` for `wandb sync`."""

    def __init__(self, job: StageJob, config: TrainConfig) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError("wandb_project: the library wandb is not installed here; pip install wandb") from None
        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        spec = job.spec
        options = {
            "project": config.wandb_project,
            "name": f"{spec.run}.{spec.stage}",
            "id": spec.fingerprint,
            "resume": "allow",
            "dir": str(job.workdir),
            "config": dict(spec.config),
            "settings": wandb.Settings(console="off", silent=True),
        }
        try:
            self.run = wandb.init(mode=mode, **options)
        except wandb.errors.CommError as error:  # a service out of reach is no reason not to train
            print(f"Weights & Biases: {error}; kept here instead, for `wandb sync`", flush=True)
            wandb.teardown()  # else the run counts as in use
            self.run = wandb.init(mode="offline", **options)

    def __call__(self, iteration: int, values: Mapping[str, float]) -> None:
        """The values of a step."""
        self.run.log(dict(values), step=iteration)

    def close(self) -> None:
        """Write out."""
        self.run.finish()
