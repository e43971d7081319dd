"""What a checkpoint costs training: written beside it, against training that waits. Runs in a process of its own.

    python -m tests.bench.stall SCRATCH MODEL

prints, as JSON, a list of seconds for each: `start`, the step that begins a checkpoint; `finish`, the one that names
it; `slower steps`, what the steps between took longer than others; `synchronous`, the same state written while nothing
else is done; `resume`, the same state read back; and `bytes`, what the busiest rank wrote. MODEL is `small`, of 25
million parameters, `tiny`, or a case of `gpu_models`.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench.measure import CHECKOUT, Row, environment, python, run_watched

RUNS, PLAIN_STEPS = 3, 4


def measure(scratch: Path) -> list[Row]:
    """The rows of `make bench`, measured in a process of its own."""
    command = python("-W", "ignore", "-m", "tests.bench.stall", str(scratch / "run"), "small")
    return rows(json.loads(run_watched(command, environment(scratch), CHECKOUT)[0].strip().splitlines()[-1]))


def rows(found: dict[str, list[float]]) -> list[Row]:
    """The rows of `make bench`."""
    size = found["bytes"][0] / 1e6
    lost = tuple(a + b for a, b in zip(found["start"], found["finish"], strict=True))
    ratio = tuple(a / b for a, b in zip(lost, found["synchronous"], strict=True))
    what = f"{size:.0f} MB: weights or master weights, and moments, in a thread beside training"
    return [
        Row("checkpoint: stall when it begins", tuple(found["start"]), "s", f"{what}; copied"),
        Row("checkpoint: stall when it ends", tuple(found["finish"]), "s", "index, sync, name"),
        Row("checkpoint: steps meanwhile slower by", tuple(found["slower steps"]), "s", "the same processor writes"),
        Row("checkpoint: synchronous", tuple(found["synchronous"]), "s", "written and synced while training waits"),
        Row("checkpoint: resume", tuple(found["resume"]), "s", "the same read back, from the page cache"),
        Row("checkpoint: stall / synchronous", ratio, "x", "begin and end together", 0.3),
        Row("checkpoint: written by the busiest rank", tuple(b / 1e6 for b in found["bytes"]), "MB", "a process alone"),
    ]


def measure_stall(scratch: Path, name: str) -> dict[str, list[float]]:
    """Train, save beside training and in its stead, in turn; seconds by the wall clock."""
    import launcher.workers.megatron  # noqa: F401  must come before megatron.core

    # isort: split
    from launcher.workers.megatron import checkpoint, loop
    from launcher.workers.megatron.parallel import process_groups

    kinds = ("start", "finish", "slower steps", "synchronous", "resume", "bytes")
    found: dict[str, list[float]] = {name: [] for name in kinds}
    with process_groups():
        trainer = _trainer(scratch, name)
        saver, other = (
            checkpoint.Saver(scratch / where, trainer.model.module, trainer.optimizer, trainer.scheduler, 1, None)
            for where in ("saved", "synchronous")
        )
        steps = _Steps(loop, trainer)
        steps.take()  # Adam's moments come with the first
        for run in range((1 if name == "tiny" else RUNS) + 1):
            plain = statistics.median(steps.take() for _ in range(PLAIN_STEPS))
            started = _seconds(lambda: saver.start(steps.done))
            beside = []
            while not saver.is_written:
                beside.append(steps.take())
            finished = _seconds(saver.finish)
            synchronous = _seconds(lambda: (other.start(steps.done), other.finish()))
            written = other.folder / f"iter_{steps.done:07d}"
            state = saver.model, saver.optimizer, saver.scheduler
            resume = _seconds(partial(checkpoint.load_progress, written, *state))
            if run:  # the first warms up
                found["start"].append(started)
                found["finish"].append(finished)
                found["slower steps"].append(sum(beside) - plain * len(beside))
                found["synchronous"].append(synchronous)
                found["resume"].append(resume)
                found["bytes"].append(_busiest(written))
            shutil.rmtree(other.folder)
    return found


def _busiest(path: Path) -> int:
    return max(json.loads((path / "progress.json").read_text())["bytes"])


class _Steps:
    """Training steps, one after the other."""

    def __init__(self, loop: Any, trainer: Any) -> None:
        self.loop, self.trainer, self.done = loop, trainer, 0

    def take(self) -> float:
        """One step; its seconds."""
        self.done += 1
        return _seconds(lambda: self.loop.train_step(self.trainer, self.done))


def _seconds(work: Any) -> float:
    import torch

    began = time.monotonic()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic() - began


def _trainer(scratch: Path, name: str) -> Any:
    """A trainer that can take many steps on random tokens."""
    import dataclasses

    from launcher.configs import TrainConfig
    from launcher.models.families import shape_of
    from launcher.workers.megatron.data import Blend, read_sources
    from launcher.workers.megatron.loop import build_trainer
    from launcher.workers.megatron.model import build_model, initialize
    from tests.bench.gpu_models import CASES
    from tests.bench.stages import Root, make_stage, model_named

    case = next((c for c in CASES if c.name == name), None)
    model = case.model if case else model_named("llama-tiny")
    if name == "small":
        model["config"] |= SMALL
    sizes = {"seq_length": case.seq_length if case else 128, "global_batch_size": 4, "micro_batch_size": 1}
    precision = "bf16" if case else "fp32"
    root = Root(scratch, model["config"]["vocab_size"])
    root.fill(50_000 if not case else 1_000_000)
    stage = make_stage(root, "stall", model, train_iters=1000, precision=precision, **sizes)
    config = dataclasses.replace(_config(stage, TrainConfig), train_iters=1000)
    shape = shape_of(config.model.config)
    folder = root.path / stage.spec.inputs["prepare.tokens"].path
    sources = read_sources({"prepare": folder}, config.seq_length, config.data)
    blend = Blend(sources, 1000 * config.global_batch_size, config.seq_length, 0, shape.vocab_size, scratch / "index")
    module = build_model(shape, config.parallelism, config.precision)
    initialize(module, shape, config.model.init_method_std, 0)
    return build_trainer(config, module, blend)


def _config(stage: Any, cls: type[Any]) -> Any:
    from launcher.spec import decode

    return decode(cls, stage.spec.config)


#: 25 million parameters with the tiny Llama's other sizes: 300 MB of weights and moments in fp32.
SMALL = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}


def main(argv: Sequence[str]) -> int:
    """Print the measurements as JSON."""
    scratch, name = Path(argv[0]), argv[1]
    scratch.mkdir(parents=True, exist_ok=True)
    print(json.dumps(measure_stall(scratch, name)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
