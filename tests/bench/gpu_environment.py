"""What a GPU measurement runs in: the GPU by the name that `fit` knows, and the libraries that decide about speed."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from typing import Any

from launcher.errors import UserError
from launcher.fit.gpus import type_of_device

LIBRARIES = (
    "torch", "triton", "megatron-core", "transformer-engine", "mamba-ssm", "causal-conv1d", "flash-attn", "apex",
)  # fmt: skip
NO_GPU = "needs an NVIDIA GPU and a torch built for CUDA: run `make bench-gpu` there"


def require_gpu() -> tuple[str | None, float]:
    """The GPU's name in `launcher.fit.gpus`, None for another, and its memory in bytes.

    Raises UserError where there is none.
    """
    import torch

    if not torch.cuda.is_available():
        raise UserError(f"bench-gpu {NO_GPU}")
    device = torch.cuda.get_device_properties(0)
    return type_of_device(device.name), device.total_memory


def describe() -> dict[str, Any]:
    """What the figures depend on."""
    import torch

    found: dict[str, Any] = {name: _version(name) for name in LIBRARIES}
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        found |= {"gpu": device.name, "memory_gib": round(device.total_memory / 2**30, 1), "cuda": torch.version.cuda}
        found |= {"driver": _driver()}
    return {**found, "python": platform.python_version()}


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
