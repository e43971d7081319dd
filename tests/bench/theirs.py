"""Megatron-LM's own script beside ours: the arguments that it needs besides a stage's, and its log lines."""

from __future__ import annotations

import importlib.util
import re
import statistics
from dataclasses import dataclass

#: megatron/training/training.py, training_log, and megatron/training/utils, report_memory (in MiB).
_MILLISECONDS = re.compile(r"elapsed time per iteration \(ms\): ([\d.]+)")
_MEMORY = re.compile(r"max allocated: ([\d.]+)")


@dataclass(frozen=True)
class Theirs:
    """Seconds of a step, and the peak of allocated memory where the log tells it."""

    seconds: float
    memory_gib: float | None


def script_words(device: str) -> list[str]:
    """What makes the script's run like ours: no mask in memory, weights alone saved, no fusion without its library."""
    words = ["--no-create-attention-mask-in-dataloader", "--no-save-optim", "--no-save-rng"]
    if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:
        words.append("--no-gradient-accumulation-fusion")
    if device == "gpu" and importlib.util.find_spec("transformer_engine") is None:
        words += ["--transformer-impl", "local", "--no-rope-fusion", "--no-persist-layer-norm"]
    return words


def read_log(log: str, warm_up: int) -> Theirs:
    """What a run took. Raises RuntimeError where the log has no line of a step after `warm_up` of them."""
    steps = [float(x) / 1000 for x in _MILLISECONDS.findall(log)][warm_up:]
    if not steps:
        raise RuntimeError("no `elapsed time per iteration` in the log of Megatron-LM's script after its warm-up")
    memory = [float(x) / 1024 for x in _MEMORY.findall(log)]
    return Theirs(statistics.median(steps), max(memory, default=None))
