"""Makes the environment of `make bench-gpu`: torch for CUDA, megatron-core, and what kernels can be built here.

    python tests/bench/gpu_setup.py FOLDER

Where the interpreter that runs this has Transformer Engine, as in NVIDIA's images, its packages are used and the rest
is added. Else Transformer Engine, causal-conv1d and mamba-ssm are compiled where there is a CUDA compiler; where there
is none, torch's attention and mamba-ssm's Triton kernels stand for them. A package that cannot be built is named, and
the others go on. Standard library only. Never run on a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
#: Of pyproject.toml's extra `local`: what the trainer does not use, and torch, which comes first.
LEFT_OUT = ("torch", "trl", "datasets", "accelerate", "reasoning-gym")
#: Of its extra `train`: what is compiled for CUDA.
COMPILED = ("transformer-engine", "causal-conv1d", "mamba-ssm")


@dataclass(frozen=True)
class Install:
    """One call of pip. Without an optional one the measurement goes on."""

    words: tuple[str, ...]
    optional: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)


def installs(
    extras: Mapping[str, Sequence[str]], login: Sequence[str], *, ready: bool, compiler: bool
) -> list[Install]:
    """What is to be installed, in order. `ready`: torch and Transformer Engine are there. `compiler`: nvcc is."""
    local = [r for r in extras["local"] if not r.startswith(LEFT_OUT)]
    train = [next(r for r in extras["train"] if r.startswith(name)) for name in COMPILED]
    mamba = train[-1]
    alone = {"MAMBA_FORCE_BUILD": "TRUE", "MAMBA_SKIP_CUDA_BUILD": "TRUE"}
    triton_alone = Install(("--no-deps", "--no-build-isolation", mamba), True, alone)
    tools = ("setuptools", "wheel", "packaging", "ninja", "pybind11")
    plan = [] if ready else [Install((next(r for r in extras["local"] if r.startswith("torch")),))]
    plan += [Install((*tools, *local, *login)), Install(("--no-deps", "-e", str(CHECKOUT)))]
    if ready:
        return plan
    if compiler:
        return [*plan, *(Install(("--no-build-isolation", requirement), True) for requirement in train)]
    return [*plan, triton_alone]


def main(argv: Sequence[str]) -> int:
    """Make the environment, unless it is whole; returns the exit code."""
    import tomllib

    folder = Path(argv[0]).absolute()
    stamp = folder / "installed"
    if stamp.is_file():
        return 0
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    ready = importlib.util.find_spec("transformer_engine") is not None
    compiler = (
        shutil.which("nvcc") is not None or Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin/nvcc").exists()
    )
    site = ["--system-site-packages"] if ready else []
    subprocess.run([sys.executable, "-m", "venv", *site, str(folder)], check=True)
    absent = []
    for step in installs(project["optional-dependencies"], project["dependencies"], ready=ready, compiler=compiler):
        command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", *step.words]
        print(" ".join([*(f"{k}={v}" for k, v in step.variables.items()), *command]), flush=True)
        code = subprocess.run(command, env={**os.environ, **step.variables}).returncode
        if code and not step.optional:
            return code
        absent += [step.words[-1]] if code else []
    if absent:
        print(f"bench-gpu: goes on without {', '.join(absent)}, which could not be built here", file=sys.stderr)
    stamp.touch()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
