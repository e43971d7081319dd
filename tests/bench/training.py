"""The training loop against the bare megatron-core step: same model, same weights, same batches, one process.

The bare step is forward and backward by megatron-core's schedule, the optimizer and the learning-rate schedule, on
batches that lie in memory. What ours does besides is reading samples, heartbeat, metrics, checks and log.

Two measurements: both loops in turn, which sees everything but on a busy machine not to a percent; and, inside our
loop, the time spent outside megatron-core's calls over that spent in them, which is steady.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from tests.bench.measure import CHECKOUT, Row

STEPS, ROUNDS = 40, 5
SMALL_STEPS, SMALL_ROUNDS = 5, 3
#: 10 million parameters, with the other sizes of the demo's model.
SMALL = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "head_dim": 64,
}


def measure(scratch: Path) -> list[Row]:
    """CPU seconds of our loop over those of the bare step. Raises RuntimeError where the losses are not the same."""
    import launcher.workers.megatron  # noqa: F401  must come before megatron.core

    # isort: split
    from launcher.workers.megatron.parallel import process_groups

    _write_tokens(scratch / "tokens" / "text", tokens=200_000)
    (scratch / "attempt").mkdir()
    with process_groups():
        return [*_measure_tiny(scratch), *_measure_small(scratch)]


def _measure_tiny(scratch: Path) -> list[Row]:
    config = _config(STEPS)
    job, ours = _job(scratch, "tiny"), _trainer(config, scratch)
    bare = _trainer(config, scratch)
    batches = [_batches(ours.blend, i, config) for i in range(STEPS)]
    rounds = []
    for _ in range(ROUNDS + 1):
        whole, core, samples = _ours(job, ours)
        theirs, plain = _bare(bare, batches)
        _compare(job, theirs)
        rounds.append((whole, core, samples, plain))
    what = f"llama-tiny, {config.global_batch_size} x {config.seq_length} tokens a step, one thread, same losses"
    return _rows(rounds[1:], what)  # the first round warms up


def _measure_small(scratch: Path) -> list[Row]:
    """A model whose step is not all overhead: 10 million parameters, 4 x 256 tokens in four micro-batches."""
    config = _config(SMALL_STEPS, SMALL, seq_length=256, global_batch_size=4, micro_batch_size=1)
    job, trainer = _job(scratch, "small"), _trainer(config, scratch)
    rounds = [_ours(job, trainer) for _ in range(SMALL_ROUNDS + 1)][1:]
    over = tuple((whole / core - 1) * 100 for whole, core, _ in rounds)
    how = f"10 M parameters, 4 x 256 tokens, {sum(r[1] for r in rounds) / len(rounds) / SMALL_STEPS:.2f} s a step"
    return [Row("our loop, a larger model: own work / megatron-core's", over, "%", how, 2.0)]


def _rows(rounds: list[tuple[float, float, float, float]], what: str) -> list[Row]:
    beside = tuple((whole / core - 1) * 100 for whole, core, *_ in rounds)
    cost = tuple((whole - core) / STEPS * 1000 for whole, core, *_ in rounds)
    reading = tuple(samples / STEPS * 1000 for _, _, samples, _ in rounds)
    over = tuple((whole / plain - 1) * 100 for whole, _, _, plain in rounds)
    return [
        Row("bare megatron-core step", tuple(p / STEPS * 1000 for *_, p in rounds), "ms CPU", what),
        Row("our loop: a step's own work", cost, "ms CPU", "samples, heartbeat, metrics, checks, log"),
        Row("  of it, reading samples", reading, "ms CPU", "megatron-core's datasets, and the check of token ids"),
        Row("our loop: own work / megatron-core's", beside, "%", "inside our loop, by where the time is spent", 2.0),
        Row("our loop over the bare loop", over, "%", f"the two loops in turn, {STEPS} steps each; {what}"),
    ]


def _ours(job: Any, trainer: Any) -> tuple[float, float, float]:
    """CPU seconds of `loop.run`, of megatron-core's calls in it without the samples they ask for, and of these."""
    from launcher.workers.megatron import loop

    core = _Clock()
    samples = _Clock()
    timed = [
        mock.patch.object(loop, "get_forward_backward_func", lambda: core.around(get())),
        mock.patch.object(trainer.optimizer, "step", core.around(trainer.optimizer.step)),
        mock.patch.object(trainer.optimizer, "zero_grad", core.around(trainer.optimizer.zero_grad)),
        mock.patch.object(trainer.model, "zero_grad_buffer", core.around(trainer.model.zero_grad_buffer)),
        mock.patch.object(trainer.scheduler, "step", core.around(trainer.scheduler.step)),
        mock.patch.object(trainer.blend, "batch", samples.around(trainer.blend.batch)),
    ]
    get = loop.get_forward_backward_func
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        for patch in timed:
            stack.enter_context(patch)
        began = time.process_time()
        loop.run(job, trainer)
        whole = time.process_time() - began
    return whole, core.seconds - samples.seconds, samples.seconds


class _Clock:
    """CPU seconds spent in the functions that it was put around."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - began

        return timed


def _config(steps: int, model: Mapping[str, Any] | None = None, **changes: Any) -> Any:
    from launcher.configs import TrainConfig
    from launcher.spec import decode

    data = json.loads((CHECKOUT / "tests" / "data" / "stage.json").read_text())["config"]
    data["model"]["config"] |= model or {}
    data |= {"checkpoint": None, "data": {"prepare/text": 1.0}, "train_iters": steps, "save_interval": 10**6}
    return decode(TrainConfig, data | changes)


def _job(scratch: Path, name: str) -> Any:
    from launcher.progress import StageJob
    from launcher.spec import Input, StageSpec, decode

    spec = decode(StageSpec, json.loads((CHECKOUT / "tests" / "data" / "stage.json").read_text()))
    inputs = {"prepare.tokens": Input("tokens", "tokens", "0" * 20)}
    spec = dataclasses.replace(spec, inputs=inputs, fingerprint=name.ljust(20, "0"))
    return StageJob(spec, scratch, scratch / "attempt", "train")


def _batches(blend: Any, step: int, config: Any) -> list[Any]:
    first = step * config.global_batch_size
    return list(blend.micro_batches(first, first + config.global_batch_size, config.micro_batch_size, 0, 1))


def _write_tokens(prefix: Path, tokens: int) -> None:
    import numpy

    from launcher.workers.tokens import write_indexed

    prefix.parent.mkdir()
    random = numpy.random.default_rng(0)
    documents = [random.integers(2, 512, 200) for _ in range(tokens // 200)]
    write_indexed(prefix, documents, numpy.dtype(numpy.uint16))


def _trainer(config: Any, scratch: Path) -> Any:
    from launcher.models.families import shape_of
    from launcher.workers.megatron.data import Blend, read_sources
    from launcher.workers.megatron.loop import build_trainer
    from launcher.workers.megatron.model import build_model, initialize

    shape = shape_of(config.model.config)
    sources = read_sources({"prepare": scratch / "tokens"}, config.seq_length, config.data)
    samples = config.train_iters * config.global_batch_size
    blend = Blend(sources, samples, config.seq_length, 0, shape.vocab_size, scratch / "index")
    module = build_model(shape, config.parallelism, config.precision)
    initialize(module, shape, config.model.init_method_std, 0)
    return build_trainer(config, module, blend)


def _bare(trainer: Any, batches: list[list[Any]]) -> tuple[list[float], float]:
    """The losses of a step a batch, and CPU seconds."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    config, losses = trainer.config, []
    positions = trainer.positions.expand(config.micro_batch_size, -1)

    def forward(iterator: Any, model: Any) -> Any:
        tokens, labels, *_ = next(iterator)
        return model(tokens, positions, None, labels=labels), _mean

    step = get_forward_backward_func()
    began = time.process_time()
    for batch in batches:
        trainer.model.zero_grad_buffer()
        trainer.optimizer.zero_grad()
        found = step(
            forward_step_func=forward,
            data_iterator=iter(batch),
            model=[trainer.model],
            num_microbatches=len(batch),
            seq_length=config.seq_length,
            micro_batch_size=config.micro_batch_size,
            forward_only=False,
        )
        trainer.optimizer.step()
        trainer.scheduler.step(config.global_batch_size)
        losses.append(found)
    used = time.process_time() - began
    return [float(sum(found) / len(found)) for found in losses], used


def _mean(losses: Any) -> Any:
    mean = losses.float().mean()
    return mean, mean.detach().clone()


def _compare(job: Any, theirs: list[float]) -> None:
    lines = (job.workdir / "metrics.jsonl").read_text().splitlines()
    ours = [json.loads(line)["loss"] for line in lines]
    if ours != theirs:
        raise RuntimeError(f"the two loops do not train the same: losses {ours} and {theirs}")
