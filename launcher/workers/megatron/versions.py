"""What megatron-core calls by other names from one version to the next. Tried: 0.16.1 and 0.19.2.

Checkpoints, layers and configuration are the same in both as far as this trainer uses them; Granite's multipliers are
its own in both (`model`), so that a checkpoint means the same whatever trains it.
"""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.module import MegatronModule

_HYBRID = importlib.util.find_spec("megatron.core.models.hybrid") is not None


def hybrid_model(config: TransformerConfig, stack: ModuleSpec, pattern: str, **common: Any) -> MegatronModule:
    """The model of Mamba-2, attention and MLP layers: HybridModel, which was MambaModel."""
    if _HYBRID:
        from megatron.core.models.hybrid.hybrid_model import HybridModel

        return HybridModel(config, stack, hybrid_layer_pattern=pattern, **common)
    from megatron.core.models.mamba import MambaModel

    return MambaModel(config, stack, hybrid_override_pattern=pattern, **common)


def fused_hybrid_stack() -> ModuleSpec:
    """A copy of megatron-core's hybrid stack of Transformer Engine's layers."""
    if _HYBRID:
        from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as spec
    else:
        from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec as spec
    return copy.deepcopy(spec)
