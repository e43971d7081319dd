"""Makes `train` stages under a root (token files, tokenizer, stage.json) and runs them, a process a rank."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

import launcher.workers.megatron  # noqa: F401  must come before megatron.core
from launcher import spec, steps

# isort: split
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.dist_checkpointing import load_plain_tensors

REPOSITORY = Path(__file__).resolve().parents[3]
EXAMPLE = REPOSITORY / "tests" / "data" / "stage.json"


def model(name: str, **changes: Any) -> dict[str, Any]:
    """A model of `recipes/models/`, with changes to its config.json."""
    data: dict[str, Any] = yaml.safe_load((REPOSITORY / "recipes" / "models" / f"{name}.yaml").read_text())
    data["config"].update(changes)
    return data


def write_tokens(folder: Path, sources: Mapping[str, int], vocab: int = 512, seed: int = 0) -> None:
    """Token files of about so many tokens each: documents of a language with some order, ids 2 .. vocab - 1."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, tokens) in enumerate(sources.items()):
        rng = np.random.default_rng([seed, number])
        step = int(rng.integers(3, 40))
        builder = IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=np.uint16)
        while tokens > 0:
            length = min(int(rng.integers(20, 200)), tokens)
            noise = rng.integers(0, 5, length)
            document = 2 + (int(rng.integers(vocab)) + np.cumsum(step + noise)) % (vocab - 2)
            builder.add_document(document.astype(np.uint16), [length])
            tokens -= length
        builder.finalize(str(folder / f"{name}.idx"))


def write_tokenizer(folder: Path, vocab: int = 512) -> None:
    """The two files of a tokenizer that the trainer reads; ids 0 and 1 are <pad> and <eos>."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = {"<pad>": 0, "<eos>": 1, **{f"t{i}": i for i in range(2, vocab)}}
    tokenizer = {"model": {"type": "WordLevel", "vocab": ids}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {"pad_token": "<pad>", "eos_token": {"content": "<eos>"}, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@dataclasses.dataclass(frozen=True)
class TrainStage:
    """A stage on disk, and where its artifact is made."""

    root: Path
    spec: spec.StageSpec

    @property
    def path(self) -> Path:
        return self.root / "runs" / "test" / "stages" / self.spec.stage / "stage.json"

    @property
    def workdir(self) -> Path:
        return self.root / f"{self.spec.artifact}.partial"

    @property
    def checkpoint(self) -> Path:
        return self.workdir / "checkpoint"

    @property
    def progress(self) -> Path:
        return self.workdir / "progress" / "checkpoints"

    def saved(self) -> list[str]:
        return sorted(p.name for p in self.progress.glob("iter_*"))

    def attempt(self, number: int = 0) -> Path:
        return self.path.parent / f"attempt-{number}"

    def ending(self, number: int = 0, rank: int = 0) -> dict[str, Any]:
        return json.loads((self.attempt(number) / f"exit.train.{rank}.json").read_text())

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.workdir / "metrics.jsonl").read_text().splitlines()]

    def losses(self) -> list[float]:
        return [row["loss"] for row in self.metrics()]

    def record(self) -> dict[str, Any]:
        return json.loads((self.workdir / "record.json").read_text())


def make_stage(root: Path, name: str = "base", *, start: TrainStage | None = None, **changes: Any) -> TrainStage:
    """Write `stage.json` of a train stage; `start` is the finished stage whose checkpoint it goes on from.

    `changes` are of the config, besides `seed` and `ranks`, the number of processes; `data` maps sources of the one
    prepare stage to weights.
    """
    example = json.loads(EXAMPLE.read_text())
    config = {**example["config"], "checkpoint": None, "train_iters": 8, "save_interval": 100, "seq_length": 32}
    config |= {"global_batch_size": 4, "micro_batch_size": 2, "lr": 1e-2}
    config |= {"data": {"prepare/one": 1.0}, "lr_warmup_fraction": 0.1, **changes}
    config["checkpoint"] = start.spec.stage if start else None
    seed, ranks = config.pop("seed", 0), config.pop("ranks", 1)
    inputs = {k: v for k, v in example["inputs"].items() if k != "checkpoint"}
    if start:
        relative = str(start.checkpoint.relative_to(root))
        inputs["checkpoint"] = {"path": relative, "format": "megatron", "fingerprint": "x" * 20}
    fingerprint = name.ljust(20, "0")
    data = {**example, "stage": name, "fingerprint": fingerprint, "seed": seed, "config": config, "inputs": inputs}
    data["outputs"] = {"checkpoint": {"path": f"artifacts/train/{fingerprint}/checkpoint", "format": "megatron"}}
    data["steps"] = [{**example["steps"][0], "ntasks": ranks}]
    stage = TrainStage(root, spec.decode(spec.StageSpec, data))
    stage.path.parent.mkdir(parents=True, exist_ok=True)
    stage.path.write_text(spec.stage_text(stage.spec))
    return stage


def tokens_dir(root: Path) -> Path:
    """Where the port `prepare.tokens` of every stage here lies."""
    return root / json.loads(EXAMPLE.read_text())["inputs"]["prepare.tokens"]["path"]


def tokenizer_dir(root: Path) -> Path:
    """Where the port `prepare.tokenizer` of every stage here lies."""
    return root / json.loads(EXAMPLE.read_text())["inputs"]["prepare.tokenizer"]["path"]


# ------------------------------------------------------------------------------------------------- running a stage

_DEADLINE_S = 120.0
#: Every rank is a process of its own, forked from one that has imported the trainer: an import takes seconds.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["launcher.workers.megatron.stage", "torch._dynamo"])

#: What a test does to a rank before it starts, by patching: `signal_at`, `signal_in`, `poison_at`.
Fault = Callable[[], None]


def run(stage: TrainStage, fault: Fault | None = None, attempt: int = 0) -> list[int | None]:
    """Run an attempt of a stage with the processes of its step; returns their exit codes, -9 for one that was killed.

    Where a rank fails, the others are ended, as a supervisor would.
    """
    stage.attempt(attempt).mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    step = stage.spec.steps[0]
    place = steps.Place(
        root=str(stage.root),
        stage_json=str(stage.path),
        attempt_dir=str(stage.attempt(attempt)),
        python=sys.executable,
        hosts={step.name: "127.0.0.1"},
        ports={step.name: port},
    )
    commands = steps.local_commands(stage.spec, step, place, "")
    ranks = [_PROCESSES.Process(target=_worker, args=(argv, env, fault)) for argv, env in commands]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(_DEADLINE_S)
        if rank.exitcode != 0:
            _end(ranks)
    return [rank.exitcode for rank in ranks]


def _end(ranks: list[Any]) -> None:
    for rank in ranks:
        rank.join(1.0)
        if rank.exitcode is None:
            rank.kill()
            rank.join()


def _worker(argv: tuple[str, ...], env: Mapping[str, str], fault: Fault | None) -> None:
    """What `python -m launcher.workers.train stage.json` does, in this process."""
    os.environ.update(env)
    log = os.open(Path(env["PRISM_ATTEMPT_DIR"]) / f"log.{env['RANK']}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = list(argv[2:])  # python -m apart
    from launcher.progress import run_worker
    from launcher.workers.train import main

    _await_writers()
    if fault:
        fault()
    run_worker(main)


def _await_writers() -> None:
    """A checkpoint is whole at the end of the step after it, however slow the machine."""
    from launcher.workers.megatron import checkpoint

    def is_written(saver: checkpoint.Saver) -> bool:
        if saver.pending is not None:
            saver.pending.thread.join()
        return saver.pending is not None

    checkpoint.Saver.is_written = property(is_written)  # type: ignore[assignment]


def log(stage: TrainStage, attempt: int = 0, rank: int = 0) -> str:
    """What a rank wrote to stdout and stderr."""
    return (stage.attempt(attempt) / f"log.{rank}").read_text()


def signal_at(step: int, number: int = signal.SIGUSR2, times: int = 1) -> Fault:
    """The rank gets a signal when it reports step `step`."""
    return partial(_signal_at, step, number, times)


def _signal_at(step: int, number: int, times: int) -> None:
    from launcher.progress import StageJob

    beat = StageJob.beat

    def beat_and_signal(job: StageJob, now: int, *args: Any, **figures: Any) -> None:
        beat(job, now, *args, **figures)
        for _ in range(times if now == step else 0):
            os.kill(os.getpid(), number)

    StageJob.beat = beat_and_signal  # type: ignore[method-assign]


def kill_in_save(count: int) -> Fault:
    """The rank is killed inside its `count`th checkpoint: files are written, but not yet by their final name."""
    return partial(_kill_in_save, count)


def _kill_in_save(count: int) -> None:
    from launcher.workers.megatron import checkpoint

    saves = []

    def killed(path: Path) -> None:
        saves.append(path)
        if len(saves) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.sync_tree = killed


def signal_in_save(number: int = signal.SIGUSR2) -> Fault:
    """The rank, and all that it has started, get a signal while a checkpoint is written."""
    return partial(_signal_in_save, number)


def _signal_in_save(number: int) -> None:
    from launcher.workers.megatron import checkpoint

    os.setpgid(0, 0)
    write = checkpoint.write_share

    def signalled(*args: Any) -> None:
        os.killpg(0, number)
        write(*args)

    checkpoint.write_share = signalled


def kill_after(seconds: float) -> Fault:
    """The rank is killed so long after it began, whatever it is doing, its writer beside it."""
    return partial(_kill_after, seconds)


def _kill_after(seconds: float) -> None:
    from launcher.workers.megatron import checkpoint

    alive = property(lambda saver: saver.pending is not None and not saver.pending.thread.is_alive())
    checkpoint.Saver.is_written = alive  # type: ignore[assignment]
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()


def slow_writer(seconds: float) -> Fault:
    """Writing a checkpoint takes a while, and training does not wait for it."""
    return partial(_slow_writer, seconds)


def _slow_writer(seconds: float) -> None:
    from launcher.workers.megatron import checkpoint

    write = checkpoint.write_share

    def slowly(*args: Any) -> None:
        time.sleep(seconds)
        write(*args)

    checkpoint.write_share = slowly
    alive = property(lambda saver: saver.pending is not None and not saver.pending.thread.is_alive())
    checkpoint.Saver.is_written = alive  # type: ignore[assignment]


def exchange(bucket_size: int | None = None, overlap: bool = True) -> Fault:
    """Data-parallel ranks exchange buckets of so many parameters, or all of them when all is computed."""
    return partial(_exchange, bucket_size, overlap)


def _exchange(bucket_size: int | None, overlap: bool) -> None:
    from launcher.workers.megatron import optimizer

    made = optimizer.DistributedDataParallelConfig
    changes: dict[str, Any] = {} if overlap else {"overlap_grad_reduce": False, "overlap_param_gather": False}

    def config(**given: Any) -> Any:
        return made(**{**given, **changes}, bucket_size=bucket_size)

    optimizer.DistributedDataParallelConfig = config  # type: ignore[assignment,misc]


def poison_at(step: int) -> Fault:
    """A weight is NaN when step `step` begins."""
    return partial(_poison_at, step)


def _poison_at(step: int) -> None:
    from launcher.workers.megatron import loop

    train_step = loop.train_step

    def poisoned(trainer: Any, iteration: int, *args: Any) -> Any:
        if iteration == step:
            next(trainer.model.parameters()).data.fill_(float("nan"))
        return train_step(trainer, iteration, *args)

    loop.train_step = poisoned


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint in format `megatron`; needs process groups."""
    number = int((checkpoint / "latest_checkpointed_iteration.txt").read_text())
    state = load_plain_tensors(str(checkpoint / f"iter_{number:07d}"))
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
