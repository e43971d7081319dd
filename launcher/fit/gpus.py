"""GPU types: memory and peak rate. Figures for others are given on the command line."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.errors import UserError
from launcher.spec import did_you_mean


@dataclass(frozen=True)
class Gpu:
    """A GPU type: memory that programs get, in GiB; dense bf16 peak in TFLOP/s; what share of it training reaches.

    `mfu` counts half of attention's square and no recomputation; a band of 20 % around what follows from it is honest.
    `devices` are the names that CUDA has for it.
    """

    memory_gib: float
    tflops: float
    mfu: float
    devices: tuple[str, ...]


#: Memory as torch reports it. Peak rates from NVIDIA's data sheets: half of what stands there "with sparsity", and less
#: for the cards (PCIe, NVL) than for the SXM modules. Shares from public runs of 7B and 8B dense models in bf16
#: (docs/fit.md), none of which was on a PCIe or NVL card of Hopper: those have their sisters'.
GPUS = {
    "a100-40gb": Gpu(39.4, 312.0, 0.50, ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB")),
    "a100-80gb": Gpu(79.2, 312.0, 0.50, ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe")),
    "h100-80gb": Gpu(79.2, 989.4, 0.42, ("NVIDIA H100 80GB HBM3",)),
    "h100-pcie-80gb": Gpu(79.1, 756.0, 0.42, ("NVIDIA H100 PCIe",)),
    "h100-nvl-94gb": Gpu(93.0, 835.5, 0.42, ("NVIDIA H100 NVL",)),
    "h200-141gb": Gpu(139.8, 989.4, 0.42, ("NVIDIA H200",)),
    "h200-nvl-141gb": Gpu(139.8, 835.5, 0.42, ("NVIDIA H200 NVL",)),
}


def gpu_of(name: str) -> Gpu:
    """The GPU type of this name. Raises UserError with those there are."""
    if name not in GPUS:
        raise UserError(f"GPU {name}: not known{did_you_mean(name, GPUS)}; there is {', '.join(GPUS)}")
    return GPUS[name]


def type_of_device(device: str) -> str | None:
    """The type that CUDA calls so; None for another, a MIG slice and a vendor's own cut among them."""
    return next((name for name, gpu in GPUS.items() if device in gpu.devices), None)


def default_mfu(gpu: Gpu, parameters: float, hybrid: bool) -> float:
    """The share of the peak to expect: less for small models and for hybrids, as public runs have it."""
    if hybrid:
        return gpu.mfu * 0.38 / 0.42
    if parameters < 5e9:
        return gpu.mfu * 0.38 / 0.42
    return gpu.mfu * (0.40 / 0.42 if parameters > 10e9 else 1.0)
