"""How numbers are computed where a recipe says more than the precision: FP8, and the same bits each time."""

from __future__ import annotations

import os
from typing import Any

import torch

from launcher.configs import DETERMINISTIC, TrainConfig
from launcher.errors import UserError
from launcher.models.shape import ModelShape
from launcher.workers.megatron import cpu_mode, mamba_triton
from launcher.workers.megatron.layers import kernels

#: The least compute capability that Transformer Engine has a recipe for: Ada, Hopper, Blackwell.
_CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}


def numeric_fields(config: TrainConfig) -> dict[str, Any]:
    """The fields of megatron-core's TransformerConfig for FP8 and for `deterministic_mode`.

    In FP8 are the linear layers inside the layers, a Mamba mixer's two among them; embedding, attention, scan,
    convolution, norms and the output layer stay in bf16, and so do the weights between steps.
    """
    fp8 = {"fp8": config.fp8_format, "fp8_recipe": config.fp8_recipe} if config.fp8_format else {}
    return {"deterministic_mode": config.deterministic_mode, **fp8}


def ready(config: TrainConfig, shape: ModelShape) -> None:
    """Set this process up for what the recipe asks. Raises UserError, with the mend, for what is not here."""
    problems = [*(_fp8_problems(config) if config.fp8_format else ())]
    if config.deterministic_mode:
        torch.use_deterministic_algorithms(True)
        problems += [] if cpu_mode.active() else _determinism_problems(shape)
    if problems:
        raise UserError(problems)


def _fp8_problems(config: TrainConfig) -> list[str]:
    if kernels() != "transformer-engine":
        return [
            "fp8_format: Transformer Engine is not installed here; pip install --no-build-isolation "
            "'transformer-engine[pytorch]', or leave fp8_format out"
        ]
    least, here = _CAPABILITY[config.fp8_recipe], torch.cuda.get_device_capability()
    if here < least:
        name = torch.cuda.get_device_name()
        return [
            f"fp8_recipe: {config.fp8_recipe} needs compute capability {_dotted(least)}; {name} has {_dotted(here)}"
        ]
    return []


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _determinism_problems(shape: ModelShape) -> list[str]:
    unset = {name: value for name, value in DETERMINISTIC.items() if os.environ.get(name) != value}
    problems = [f"deterministic_mode: the stage is started without {name}={value}" for name, value in unset.items()]
    if shape.has_mamba and not mamba_triton.has_deterministic_mode():
        problems.append("deterministic_mode: the mamba-ssm here sums in any order in backward; install 2.3 or newer")
    return problems
