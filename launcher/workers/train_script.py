"""The worker of a `train` stage with an `entrypoint`: a Megatron-LM script of the user's own, on every rank.

The script gets the stage as Megatron-LM's arguments and saves into `progress/script/`; what it prints of its iterations
becomes heartbeat and metrics, and its last checkpoint the artifact.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

from launcher.configs import TrainConfig
from launcher.errors import UserError, WorldError
from launcher.models.families import shape_of
from launcher.progress import StageJob, Stopped, die_with_parent, run_worker
from launcher.references import item_of, port_of
from launcher.workers.devices import require_cuda
from launcher.workers.megatron_arguments import Paths, script_arguments

_TRACKER = "latest_checkpointed_iteration.txt"
#: megatron/training/training.py, training_log: ` iteration       10/     100 | ... | lm loss: 1.234567E+00 | ...`
_ITERATION = re.compile(r"\biteration\s+(\d+)\s*/\s*(\d+)\s*\|")
_FIGURES = {"loss": "lm loss", "lr": "learning rate", "grad_norm": "grad norm"}


def main(job: StageJob) -> None:
    """Run the script to its end. Raises UserError, Stopped, WorldError with its exit code."""
    config: TrainConfig = job.config(TrainConfig)
    assert config.entrypoint is not None
    require_cuda()
    script = Path(config.entrypoint)
    if not script.is_file():
        raise UserError(f"entrypoint: {script}: no such file on {os.uname().nodename}")
    save = job.workdir / "progress" / "script"
    save.mkdir(parents=True, exist_ok=True)
    words = script_arguments(config, shape_of(config.model.config), job.spec.seed, _paths(job, config, save))
    command = [sys.executable, "-u", str(script), *words]
    if job.rank == 0:
        job.truncate_metrics("iteration", _iteration(save) or 0)
        print(f"entrypoint: {' '.join(command)}", flush=True)
    code = _run(job, command, config.global_batch_size * config.seq_length)
    if code < 0:
        os.kill(os.getpid(), -code)  # whoever killed the script is dealt with as if it had killed this worker
    if code:
        raise WorldError(
            f"entrypoint: {script.name} ended with exit code {code}; its own words stand above in this log"
        )
    done = _iteration(save)
    if done != config.train_iters:
        if job.stop_requested:
            raise Stopped(f"saved at step {done or 0} of {config.train_iters} and stopped as asked")
        raise WorldError(
            f"entrypoint: {script.name} ended well, but {save / _TRACKER} says {done} and not {config.train_iters}; "
            "the script must save at its last iteration"
        )
    if job.rank == 0:
        _deliver(job, config, save)


def _paths(job: StageJob, config: TrainConfig, save: Path) -> Paths:
    folders = {ref: job.input(port_of(ref, "tokens")) for ref in config.data}
    data = {str(folders[ref] / item_of(ref)): weight for ref, weight in config.data.items()}
    tokenizers = [job.input(port) for port in sorted(job.spec.inputs) if port.endswith(".tokenizer")]
    start = job.input("checkpoint") if "checkpoint" in job.spec.inputs else None
    going_on = _iteration(save) is not None
    return Paths(data, tokenizers[0], save, save if going_on else start, is_start=not going_on)


def _iteration(folder: Path) -> int | None:
    """The last iteration that the script has saved; None where there is none."""
    try:
        return int((folder / _TRACKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _run(job: StageJob, command: list[str], step_tokens: int) -> int:
    """Run the script, its output into this log; a request to stop reaches it as TERM."""
    # Megatron-LM refuses tensor and context parallelism without it, on GPUs before Blackwell.
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", **os.environ}
    child = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        preexec_fn=partial(die_with_parent, os.getpid()),
        encoding="utf-8",
    )
    ended = threading.Event()

    def pass_on() -> None:
        while not ended.wait(0.1):
            if job.stop_requested:
                child.send_signal(signal.SIGTERM)
                return

    watcher = threading.Thread(target=pass_on, daemon=True)
    watcher.start()
    assert child.stdout is not None
    for line in child.stdout:
        print(line, end="", flush=True)
        figures = read_line(line)
        if figures is not None:
            step, total = figures.pop("iteration"), figures.pop("total")
            job.beat(step, total, **figures)
            job.metric(iteration=step, tokens=step * step_tokens, **figures)
    code = child.wait()
    ended.set()
    return code


def read_line(line: str) -> dict[str, Any] | None:
    """Iteration, total and figures of a line of Megatron-LM's log; None for any other line."""
    found = _ITERATION.search(line)
    if found is None:
        return None
    figures: dict[str, Any] = {"iteration": int(found[1]), "total": int(found[2])}
    for name, words in _FIGURES.items():
        value = re.search(rf"\b{words}:\s*([-+.\dEe]+)", line)
        if value:
            figures[name] = float(value[1])
    return figures


def _deliver(job: StageJob, config: TrainConfig, save: Path) -> None:
    """Put the last checkpoint into the port, with what a conversion back to Hugging Face's format needs."""
    import torch

    from launcher.convert import run_config
    from launcher.workers.megatron import hf_files

    target = job.output("checkpoint")
    name = f"iter_{config.train_iters:07d}"
    if not (save / name).is_dir():
        raise WorldError(f"{save / name}: named by {_TRACKER}, but it is not there")
    # The original stays until the artifact is whole: an attempt that is cut off before that starts from it again.
    shutil.copytree(save / name, target / name, copy_function=_link)
    (target / _TRACKER).write_text(str(config.train_iters), encoding="utf-8")
    start = job.input("checkpoint") / "hf" if "checkpoint" in job.spec.inputs else None
    tokenizer = next(job.input(port) for port in sorted(job.spec.inputs) if port.endswith(".tokenizer"))
    hf_files.write(target / "hf", start, tokenizer, config.model.config, config.precision)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    run_config.write_beside(target, shape_of(config.model.config), dtype, config.model.config)
    tokens = config.train_iters * config.global_batch_size * config.seq_length
    job.record(entrypoint=config.entrypoint, tokens=tokens)


def _link(source: str, target: str) -> None:
    """One file under two names; two files where the file system cannot do that."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


if __name__ == "__main__":
    run_worker(main)
