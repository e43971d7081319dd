"""The training loop: batches, forward and backward by megatron-core's schedules, optimizer, metrics, checkpoints."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from launcher.configs import TrainConfig
from launcher.progress import Diverged, StageJob, Stopped
from launcher.workers import devices
from launcher.workers.megatron import checkpoint, cleanup, cpu_mode
from launcher.workers.megatron.attention import context_positions
from launcher.workers.megatron.data import Blend
from launcher.workers.megatron.documents import Batch, model_inputs, prepared
from launcher.workers.megatron.feeding import Ahead, Feed
from launcher.workers.megatron.metrics import Clock, Metrics, earlier_losses, open_metrics
from launcher.workers.megatron.optimizer import build_optimizer, build_scheduler, gather_weights, wrap
from launcher.workers.megatron.parallel import sum_over_ranks

#: What the schedule makes of the losses of a micro-batch: their mean, or their sum and how many they are.
_Reduction = Callable[[Tensor], tuple[Tensor, ...]]

#: Steps whose median a spike is measured by, once there are a fifth of them.
_SPIKE_STEPS = 100
#: Seconds between heartbeats of steps that are shorter: replacing a file takes a millisecond, more on a shared disk.
BEAT_S = 1.0


@dataclass
class Trainer:
    """What a step needs: the wrapped model, its optimizer, the learning-rate schedule and the data.

    `positions` are those of a sequence that this rank holds: all, but for context parallelism.
    """

    config: TrainConfig
    model: DistributedDataParallel
    optimizer: ChainedOptimizer
    scheduler: OptimizerParamScheduler
    blend: Blend
    held_out: Mapping[str, Blend]
    positions: Tensor
    clock: Clock
    feed: Feed


def build_trainer(
    config: TrainConfig, module: torch.nn.Module, blend: Blend, held_out: Mapping[str, Blend] | None = None
) -> Trainer:
    """Wrap a model whose weights are set for training: data parallelism, optimizer, schedule."""
    # Micro-batches count differently many tokens then: gradients are summed, and divided by the tokens of all.
    module.config.calculate_per_token_loss = config.document_masking or config.packing == "best-fit"
    model = wrap(module)
    optimizer = build_optimizer(config, model)
    module.config.finalize_model_grads_func = finalize_model_grads
    module.config.grad_scale_func = optimizer.scale_loss
    context = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    positions = context_positions(config.seq_length, *context).to(torch.cuda.current_device())
    scheduler = build_scheduler(config, optimizer)
    feed = Feed(partial(_micro_batches, config, blend), config.train_iters * config.global_batch_size)
    return Trainer(config, model, optimizer, scheduler, blend, held_out or {}, positions, Clock(), feed)


@dataclass(frozen=True)
class Step:
    """Figures of one step, the same on every rank.

    `document_length` is the mean within which a token sees others, weighted by tokens: the sequence's length where
    documents are not masked. `stop` is true where any rank was asked to stop, `written` where all have written their
    part of a checkpoint.
    """

    loss: float
    lr: float
    grad_norm: float
    document_length: float
    stop: bool = False
    written: bool = False


def run(job: StageJob, trainer: Trainer) -> float:
    """Train to the last step, from the newest checkpoint if there is one; returns the last loss.

    Raises Stopped after saving when asked to stop, and Diverged when a loss or gradient is not finite, or a loss far
    above the usual.
    """
    config, folder = trainer.config, job.workdir / "progress" / "checkpoints"
    state = trainer.model.module, trainer.optimizer, trainer.scheduler
    saver = checkpoint.Saver(
        folder, *state, config.keep_last, config.keep_every, partial(job.beat_again, pause_s=BEAT_S)
    )
    start = resume(job, trainer, folder)
    metrics = open_metrics(job, config, start)
    with contextlib.closing(trainer.feed), cleanup.collected():
        return _run(job, trainer, saver, metrics, start)


def _run(job: StageJob, trainer: Trainer, saver: checkpoint.Saver, metrics: Metrics, start: int) -> float:
    config = trainer.config
    loss, recent = math.nan, deque(earlier_losses(job, _SPIKE_STEPS), maxlen=_SPIKE_STEPS)
    began = time.monotonic()
    for iteration in range(start + 1, config.train_iters + 1):
        step_began = time.monotonic()
        step = train_step(trainer, iteration, job.stop_requested, saver.is_written)
        loss = step.loss
        seconds = time.monotonic() - step_began
        if wrong := _what_is_wrong(step, recent, config.loss_spike):
            metrics.close()
            raise diverged(job, trainer, iteration, step, wrong)
        recent.append(step.loss)
        cleanup.collect(iteration)
        last = iteration == config.train_iters
        held_out = evaluate(trainer) if last or iteration % config.eval_interval == 0 else {}
        report(job, config, metrics, iteration, step, seconds, trainer.clock.take() | held_out)
        due = not last and (step.stop or iteration % config.save_interval == 0)
        if step.written or due or last:
            with trainer.clock.part("checkpoint"):
                if last:
                    gather_weights(trainer.model)
                _save(saver, iteration, due, wait=step.stop or last)
        if step.stop and not last:
            metrics.close()
            raise Stopped(f"saved at step {iteration} of {config.train_iters} and stopped as asked")
        if job.rank == 0 and (last or iteration % max(1, config.train_iters // 20) == 0):
            _log(config, iteration, step, (time.monotonic() - began) / (iteration - start))
    metrics.close()
    return loss


def _save(saver: checkpoint.Saver, iteration: int, due: bool, wait: bool) -> None:
    """Finish the checkpoint that is written, begin the one that is due, and wait for it before leaving."""
    saver.finish()
    if due:
        saver.start(iteration)
    if wait:
        saver.finish()


def _what_is_wrong(step: Step, recent: deque[float], factor: float) -> str | None:
    """Why a step is divergence: it is not finite, or its loss is far above the usual; None where it is neither."""
    if not (math.isfinite(step.loss) and math.isfinite(step.grad_norm)):
        return f"loss {step.loss}, gradient norm {step.grad_norm}"
    if len(recent) < _SPIKE_STEPS // 5 or step.loss <= factor * (usual := statistics.median(recent)):
        return None
    return (
        f"loss {step.loss:.4g} is more than {factor:g} (loss_spike) times {usual:.4g}, the median of the steps before"
    )


def evaluate(trainer: Trainer) -> dict[str, float]:
    """The mean loss of each held-out source, the same on every rank, as `validation/NAME`."""
    losses = {}
    trainer.model.eval()
    with trainer.clock.part("validation"):
        for name, blend in trainer.held_out.items():
            losses[f"validation/{name}"] = _held_out_loss(trainer, blend)
    trainer.model.train()
    return losses


def _held_out_loss(trainer: Trainer, blend: Blend) -> float:
    batches = Ahead(_micro_batches(trainer.config, blend, 0, blend.samples))
    with torch.no_grad(), contextlib.closing(batches):
        found = _run_schedule(trainer, batches, Clock(), blend.samples, forward_only=True)
    total, count = sum_over_ranks(_sums(found))
    return total / max(count, 1.0)


def _micro_batches(config: TrainConfig, blend: Blend, first: int, last: int) -> Iterator[Batch]:
    """This rank's micro-batches of the samples first .. last, ready for the step; runs in the thread that reads."""
    pin = not cpu_mode.active()
    if pin:
        torch.cuda.set_device(devices.ordinal(torch.cuda.device_count()))  # each thread has a device of its own
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    # Only the ends of a pipeline have tokens to embed or labels to predict.
    text = parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage()
    joined = _joins_documents(config)
    for batch in blend.micro_batches(first, last, config.micro_batch_size, rank, ranks, text=text):
        yield prepared(batch, joined=joined, pin=pin)


def _joins_documents(config: TrainConfig) -> bool:
    """Whether masked documents of a micro-batch are one row (`documents`)."""
    return config.document_masking and parallel_state.get_context_parallel_world_size() == 1


def _run_schedule(
    trainer: Trainer, batches: Iterator[Batch], clock: Clock, samples: int, *, forward_only: bool
) -> list[Tensor]:
    """megatron-core's schedule over this rank's micro-batches of `samples`: of each, sum and count of its losses.

    They are on the last pipeline stage alone, and the same on each of its tensor-parallel ranks.
    """
    config, ranks = trainer.config, parallel_state.get_data_parallel_world_size()
    rows, joined = config.micro_batch_size, _joins_documents(config)
    losses: list[Tensor] = get_forward_backward_func()(
        forward_step_func=partial(_forward, trainer.positions, clock),
        data_iterator=batches,
        model=[trainer.model],
        num_microbatches=samples // (rows * ranks),
        seq_length=config.seq_length * (rows if joined else 1),
        micro_batch_size=1 if joined else rows,
        forward_only=forward_only,
    )
    return losses


def _sums(losses: list[Tensor]) -> list[float]:
    """Sum and count of all, in one go: the host waits for a GPU at each number that it asks for.

    The count is 0 where all that a step read are documents of one token, masked from each other.
    """
    found: list[float] = torch.stack(losses).double().sum(0).tolist() if losses else [0.0, 0.0]
    return found


def resume(job: StageJob, trainer: Trainer, folder: Path) -> int:
    """Go back to the newest checkpoint of an earlier attempt; returns the steps done."""
    path = checkpoint.newest_for_all(folder)
    if path is None:
        done = 0
    else:
        done = checkpoint.load_progress(path, trainer.model.module, trainer.optimizer, trainer.scheduler)
    if job.rank == 0 and done:
        print(f"resumed from {path} after step {done}", flush=True)
    return done


def train_step(trainer: Trainer, iteration: int, stop: bool = False, written: bool = False) -> Step:
    """One optimizer step on samples (iteration - 1) * global_batch_size and on."""
    config, model = trainer.config, trainer.model
    first = (iteration - 1) * config.global_batch_size
    count = config.global_batch_size // (config.micro_batch_size * parallel_state.get_data_parallel_world_size())
    whole = config.micro_batch_size * config.seq_length**2
    squares: list[int] = []

    def batches() -> Iterator[Batch]:
        for batch in trainer.feed.step(first, first + config.global_batch_size, count):
            squares.append(whole if batch.lengths is None else batch.squares)
            yield batch

    model.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    with trainer.clock.part("backward"):
        losses = _run_schedule(trainer, batches(), trainer.clock, config.global_batch_size, forward_only=False)
    lr = trainer.optimizer.param_groups[0]["lr"]
    with trainer.clock.part("optimizer"):
        _, grad_norm, _ = trainer.optimizer.step()
    trainer.scheduler.step(config.global_batch_size)
    total, count, stops, parts, square = sum_over_ranks(
        [*_sums(losses), float(stop), float(written), float(sum(squares))]
    )
    readers = dist.get_world_size() // parallel_state.get_data_parallel_world_size()
    length = square / (readers * config.global_batch_size * config.seq_length)
    return Step(total / max(count, 1.0), lr, float(grad_norm), length, stops > 0, parts == dist.get_world_size())


def _forward(
    positions: Tensor, clock: Clock, batches: Iterator[Batch], model: torch.nn.Module
) -> tuple[Tensor, _Reduction]:
    with clock.part("data"):
        inputs, mask = model_inputs(next(batches), positions)
    with clock.part("forward"):
        losses = model(**inputs)
    return losses, _mean if mask is None else partial(_sum, mask)


def _mean(losses: Tensor) -> tuple[Tensor, Tensor]:
    mean = losses.float().mean()
    # The schedule divides the first in place, and multiplies it by the ranks that share a sequence: gradients are
    # averaged over those too.
    parts = torch.stack([mean.detach(), torch.ones_like(mean)])
    return mean / parallel_state.get_context_parallel_world_size(), parts


def _sum(mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The losses that count, and how many: megatron-core divides the gradients by those of the whole batch."""
    total, count = (losses.float() * mask).sum(), mask.sum()
    return total, count.to(torch.int), torch.stack([total.detach(), count])


def report(
    job: StageJob,
    config: TrainConfig,
    metrics: Metrics,
    iteration: int,
    step: Step,
    seconds: float,
    further: Mapping[str, float],
) -> None:
    """Heartbeat of every rank, metrics of rank 0."""
    per_step = config.global_batch_size * config.seq_length
    speed = per_step / seconds
    pause = 0.0 if step.stop or iteration == config.train_iters else BEAT_S
    job.beat(iteration, config.train_iters, pause_s=pause, loss=step.loss, tokens_per_s=speed)
    measured = any(name.startswith("validation/") for name in further)
    if measured or iteration % config.log_interval == 0 or iteration == config.train_iters:
        figures = {"loss": step.loss, "lr": step.lr, "grad_norm": step.grad_norm, "seconds": seconds, **further}
        figures |= {"document_length": step.document_length} if config.document_masking else {}
        metrics.step(iteration, iteration * per_step, speed, figures, step.document_length)


def _log(config: TrainConfig, iteration: int, step: Step, seconds: float) -> None:
    speed = config.global_batch_size * config.seq_length / seconds
    left = (config.train_iters - iteration) * seconds
    print(
        f"step {iteration}/{config.train_iters}  loss {step.loss:.4f}  lr {step.lr:.2e}  "
        f"grad norm {step.grad_norm:.3f}  {speed:,.0f} tokens/s  {left:.0f} s left",
        flush=True,
    )


def diverged(job: StageJob, trainer: Trainer, iteration: int, step: Step, wrong: str) -> Diverged:
    """Keep the samples of a step that went wrong; returns what to raise."""
    first = (iteration - 1) * trainer.config.global_batch_size
    samples = [trainer.blend.origin(i) for i in range(first, first + trainer.config.global_batch_size)]
    if job.rank == 0:
        kept = [{"source": source, "sample": number} for source, number in samples]
        job.record(diverged={"iteration": iteration, "loss": str(step.loss), "samples": kept})
    return Diverged(
        f"step {iteration}: {wrong}; the samples of the step stand in "
        f"{job.workdir / 'record.json'} under `diverged`; lower lr, or raise lr_warmup_fraction"
    )
