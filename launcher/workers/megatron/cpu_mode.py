"""Runs megatron-core, which takes CUDA for granted, on a machine that has none.

Three things are put in its way, and only where CUDA is absent:

* a torch function mode that reads the device "cuda" as "cpu" and spells tensor types as the optimizers compare them;
* answers for the parts of `torch.cuda` that the training path calls; the CUDA random state is the CPU generator's;
* stand-ins for the one module that imports triton, and for the Mamba-2 kernels (`mamba_reference`).

`install` must run before megatron-core is imported; importing `launcher.workers.megatron` does it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn, TypeVar

import torch
from torch.overrides import TorchFunctionMode

T = TypeVar("T")

NOTICE = "cpu_mode: no CUDA here; megatron-core runs on the CPU with gloo, local layers and reference kernels"

_CPU = torch.device("cpu")
_TYPE_NAMES = {
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
}
_TRITON_MODULE = "megatron.core.inference.contexts.attention_context.triton.tensor_ops"
_TRITON_NAMES = ("tensor_get_slice_after", "tensor_masked_update", "tensor_merge")

_mode: CudaMeansCpu | None = None


# What megatron-core and torch say of themselves here at every start, and no user can mend.
_KNOWN_WARNINGS = (
    "(Transformer Engine and )?Apex (is|are) not installed",
    "full scope is deprecated",
    "[A-Za-z]+ is experimental and still under active development",
    "The .grad attribute of a Tensor that is not a leaf Tensor",
    "`torch.distributed.[a-z_]+` is deprecated",
)


def active() -> bool:
    """Whether megatron-core runs on the CPU in this process."""
    return _mode is not None


def install() -> bool:
    """Ready this process for megatron-core without CUDA; returns `active()`. Does nothing where CUDA is there."""
    global _mode
    if _mode is not None or torch.cuda.is_available():
        return active()
    if "megatron.core" in sys.modules:
        raise RuntimeError("cpu_mode.install must run before megatron.core is imported")
    for message in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message)
    _import_with_stand_ins()
    import megatron.core.tensor_parallel.random as rng

    for name, answer in _cuda_answers().items():
        setattr(torch.cuda, name, answer)
    rng._get_cuda_rng_state, rng._set_cuda_rng_state = torch.cuda.get_rng_state, torch.cuda.set_rng_state
    # The CUDA state is the CPU's here, so megatron-core's guard against mixing them up cries at every dropout.
    logging.getLogger(rng.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())
    _mode = CudaMeansCpu()
    _mode.__enter__()  # for the life of the process
    rng.CheckpointFunction.backward = staticmethod(partial(_in_mode, rng.CheckpointFunction.backward))
    return True


def _in_mode(backward: Callable[..., Any], *args: Any) -> Any:
    """Run what backward computes again as forward ran it: autograd leaves function modes behind."""
    with _mode or contextlib.nullcontext():
        return backward(*args)


class CudaMeansCpu(TorchFunctionMode):
    """Every torch call under it finds the CPU where it asks for CUDA."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func` with every "cuda" device read as the CPU, whose memory is never pinned."""
        if kwargs and "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        if kwargs and kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is torch.Tensor.to:
            args = (args[0], *(_on_cpu(a) for a in args[1:]))
        elif func is torch.Tensor.cuda:
            return args[0]
        elif func is torch.Tensor.type and len(args) == 1 and not kwargs:
            name = func(*args)
            return _TYPE_NAMES.get(name, name)
        return func(*args, **(kwargs or {}))


def _on_cpu(device: Any) -> Any:
    if isinstance(device, str) and device.startswith("cuda"):
        return "cpu"
    if isinstance(device, torch.device) and device.type == "cuda":
        return _CPU
    return device


class _Stream:
    """Stands for streams and events: on a CPU everything has happened when the call returns."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _always(None)


class _Event(_Stream): ...


def _always(value: T) -> Callable[..., T]:
    """A function of its own for each answer: torch's compiler, once imported, wants no two names for one function."""
    return lambda *args, **kwargs: value


def _cuda_answers() -> dict[str, Any]:
    generator = torch.random.default_generator
    return {
        "current_device": _always(_CPU),
        "set_device": _always(None),
        "device_count": _always(1),
        "synchronize": _always(None),
        "empty_cache": _always(None),
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": _always(_Stream()),
        "default_stream": _always(_Stream()),
        "stream": lambda *_: contextlib.nullcontext(),
        "device": lambda *_: contextlib.nullcontext(),
        "manual_seed": lambda seed: generator.manual_seed(int(seed)) and None,
        "get_rng_state": lambda *_, **__: generator.get_state(),
        "set_rng_state": lambda state, *_, **__: generator.set_state(state),
        "memory_allocated": _always(0),
        "max_memory_allocated": _always(0),
    }


def _import_with_stand_ins() -> None:
    """Import the modules of megatron-core that look for a compiler or a kernel while stand-ins can be found."""
    if importlib.util.find_spec("triton") is None:
        sys.modules[_TRITON_MODULE] = _stand_in(_TRITON_MODULE, **dict.fromkeys(_TRITON_NAMES, _no_kernel))
    with _no_compiler(), _mamba_kernels():
        import megatron.core.ssm.mamba_mixer  # noqa: F401
        from megatron.core.utils import get_causal_conv1d_version, get_mamba_version

        # Asked for, and kept, now: a mixer asks later whether its kernels know packed sequences. These do.
        get_mamba_version(), get_causal_conv1d_version()


@contextlib.contextmanager
def _no_compiler() -> Iterator[None]:
    """Leave functions as they are that megatron-core hands to `torch.compile` at import: it wants a C++ compiler."""
    compile_, torch.compile = torch.compile, lambda function: function
    try:
        yield
    finally:
        torch.compile = compile_


@contextlib.contextmanager
def _mamba_kernels() -> Iterator[None]:
    """Let `mamba_ssm` and `causal_conv1d` be found, and be gone again: other libraries ask for them too."""
    from launcher.workers.megatron import mamba_reference

    ssm, conv = "mamba_ssm.ops.triton", "causal_conv1d"
    modules = [
        _stand_in("mamba_ssm", __version__="2.0.0"),
        _stand_in("mamba_ssm.ops"),
        _stand_in(ssm),
        _stand_in(f"{ssm}.selective_state_update", selective_state_update=_no_kernel),
        _stand_in(f"{ssm}.layernorm_gated", RMSNorm=mamba_reference.RMSNorm),
        _stand_in(
            f"{ssm}.ssd_combined",
            mamba_chunk_scan_combined=_no_kernel,
            mamba_split_conv1d_scan_combined=mamba_reference.mamba_split_conv1d_scan_combined,
        ),
        _stand_in(
            conv,
            __version__="1.4.0",
            causal_conv1d_fn=mamba_reference.causal_conv1d_fn,
            causal_conv1d_update=_no_kernel,
        ),
        _stand_in(f"{conv}.causal_conv1d_varlen", causal_conv1d_varlen_states=_no_kernel),
    ]
    sys.modules.update({m.__name__: m for m in modules})
    try:
        yield
    finally:
        for module in modules:
            del sys.modules[module.__name__]


def _stand_in(name: str, **contents: object) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__path__ = []  # a package, so that modules inside it can be imported
    module.__dict__.update(contents)
    return module


def _no_kernel(*args: object, **kwargs: object) -> NoReturn:
    raise NotImplementedError("a kernel of inference, which training on the CPU does not have")
