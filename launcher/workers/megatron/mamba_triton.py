"""mamba-ssm's Triton kernels on a GPU where its compiled extensions were not built, for want of a CUDA compiler.

The kernels of Mamba-2 are Triton alone, but mamba-ssm's `__init__` wants the extension of Mamba-1 too (up to 2.3.2) and
other libraries. `install` lets megatron-core import the modules below it all the same. Without causal-conv1d, whose
kernel is compiled, megatron-core convolves by torch and scans by Triton (`has_fused_kernel`).

Never run on a GPU. In Triton's interpreter on a CPU (3.9.0), the scan of mamba-ssm 2.3.2.post1, imported this way, gave
the outputs and gradients of `mamba_reference` within 2e-6 of the largest, fp32.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path

_PACKAGE = "mamba_ssm"


def install() -> None:
    """Import megatron-core's mixer with what there is of mamba-ssm. Does nothing where that is absent or whole."""
    folders = _folders()
    if not folders:
        return
    try:
        importlib.import_module(_PACKAGE)
    except (ImportError, OSError):  # OSError: a library that an extension is linked with
        with bare_package(_PACKAGE, folders):
            import megatron.core.ssm.mamba_mixer  # noqa: F401
            from megatron.core.utils import get_mamba_version

            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                get_mamba_version()  # kept from here on: a mixer that is given documents asks for it


def _folders() -> list[str]:
    """Where mamba-ssm lies, without importing it; nowhere where it is not installed."""
    found = importlib.util.find_spec(_PACKAGE)
    return list(found.submodule_search_locations or ()) if found else []


@contextlib.contextmanager
def bare_package(name: str, folders: list[str]) -> Iterator[None]:
    """Let modules in the folders of a package be imported without its `__init__`, which is gone again afterwards."""
    package = types.ModuleType(name)
    package.__path__ = folders
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        package.__dict__["__version__"] = importlib.metadata.version(name)
    sys.modules[name] = package
    try:
        yield
    finally:
        del sys.modules[name]


def has_scan() -> bool:
    """Whether megatron-core found the scan of Mamba-2, without which it builds no hybrid model."""
    from megatron.core.ssm import mamba_mixer

    return bool(mamba_mixer.HAVE_MAMBA_SSM)


def has_deterministic_mode() -> bool:
    """Whether the scan's backward sums in one order where torch is asked to: mamba-ssm 2.3 and newer."""
    return any(Path(folder, "utils", "determinism.py").is_file() for folder in _folders())


def has_fused_kernel() -> bool:
    """Whether convolution and scan can run as one kernel: it calls causal-conv1d's."""
    from megatron.core.ssm import mamba_mixer

    return mamba_mixer.causal_conv1d_fn is not None
