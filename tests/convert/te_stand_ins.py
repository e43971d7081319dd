"""Stand-ins for Transformer Engine's modules, so that code written for it builds its models on a CPU. Not a test.

Megatron-LM's and Megatron-Bridge's layer specs are used as they are; only the modules that they name are replaced, by
megatron-core's plain ones under Transformer Engine's parameter names, with the states that it asks checkpoints for.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
import types
from typing import Any

import torch

#: Modules of megatron-core, of 0.16.1 and of 0.19.2, that import triton, for what nothing here turns on.
_TRITON = (
    "megatron.core.transformer.custom_layers.batch_invariant_kernels",
    "megatron.core.transformer.moe.ops.paged_stash",
)


def install(*packages: str) -> None:
    """Ready this process: CPU mode, the stand-ins, and empty packages: `transformer_engine` and those named."""
    for name in _TRITON:
        sys.modules[name] = _Empty(name)
    import launcher.workers.megatron  # noqa: F401  (CPU mode comes before megatron.core)

    sys.meta_path.insert(0, _Finder(("transformer_engine", *packages)))
    import megatron.core.extensions.transformer_engine as real
    from megatron.core.transformer import transformer_block

    _say_yes()
    stand_ins = _stand_ins()
    transformer_block.LayerNormImpl = stand_ins["TENorm"]
    for name, stand_in in stand_ins.items():
        old = getattr(real, name)
        for module in [m for n, m in sys.modules.items() if n.startswith("megatron.core") and m]:
            if getattr(module, name, None) is old:
                setattr(module, name, stand_in)


def _say_yes() -> None:
    """Where megatron-core asks whether a kernel of Transformer Engine or Apex is there; none of these is called."""
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.tensor_parallel import layers
    from megatron.core.transformer.moe import moe_utils

    gpt_layer_specs.HAVE_TE, gpt_layer_specs.TESpecProvider = True, TESpecProvider
    layers._grad_accum_fusion_available = True
    rope_utils.fused_apply_rotary_pos_emb = _named("transformer_engine.rope")
    for name in (
        "permute",
        "permute_with_probs",
        "unpermute",
        "sort_chunks_by_index",
        "sort_chunks_by_index_with_probs",
    ):
        setattr(moe_utils, f"fused_{name}", _named(f"transformer_engine.{name}"))


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module of some packages, and nothing in them."""

    def __init__(self, packages: tuple[str, ...]):
        self._packages = tuple(f"{package}." for package in packages)

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        wanted = f"{name}.".startswith(self._packages)
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if wanted else None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...


class _Empty(types.ModuleType):
    """A module that has any class one asks for, and those have any within them; an object of one cannot be made."""

    __version__ = "2.10.0"

    def __init__(self, name: str):
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _named(f"{self.__name__}.{name}")


class _Named(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _named(f"{cls.__module__}.{cls.__name__}.{name}")


@functools.cache
def _named(name: str) -> Any:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"{name}: a stand-in, of which only the name is there")

    module, _, own = name.rpartition(".")
    return _Named(own, (torch.nn.Module,), {"__init__": refuse, "__module__": module})


def _stand_ins() -> dict[str, Any]:
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    from launcher.workers.megatron.attention import TorchAttention

    class Stateful(torch.nn.Module):
        def get_extra_state(self) -> None:
            return None

        def set_extra_state(self, state: Any) -> None: ...

    class Norm(torch.nn.RMSNorm, Stateful):
        def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5):
            super().__init__(hidden_size, eps, dtype=config.params_dtype)

    class NormAndLinear(ColumnParallelLinear):
        def __init__(self, input_size: int, output_size: int, *, config: Any, **rest: Any):
            super().__init__(input_size, output_size, config=config, **rest)
            self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))

        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            norm = torch.nn.functional.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.config.layernorm_epsilon)
            return super().forward(norm, *args, **kwargs)

    class Attention(TorchAttention, Stateful): ...

    return {
        "TELinear": _named("transformer_engine.TELinear"),
        "TENorm": Norm,
        "TELayerNormColumnParallelLinear": NormAndLinear,
        "TEColumnParallelLinear": ColumnParallelLinear,
        "TERowParallelLinear": RowParallelLinear,
        "TEDotProductAttention": Attention,
    }
