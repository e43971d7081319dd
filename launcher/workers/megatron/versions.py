"""What megatron-core calls by other names from one version to the next. Tried: 0.16.1 and 0.19.2.

Checkpoints, layers and configuration are the same in both as far as this trainer uses them; Granite's multipliers are
its own in both (`model`), so that a checkpoint means the same whatever trains it.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import logging
from functools import partial
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.module import MegatronModule

_HYBRID = importlib.util.find_spec("megatron.core.models.hybrid") is not None

#: Newer ones write asynchronously through nvidia-resiliency-ext unless told to use their own writer.
ASYNC_SAVE = (
    {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters else {}
)

#: What newer ones say of themselves at every start, by the module that says it; no user can mend it.
_SAID = {
    "models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "transformer.transformer_layer": "Rewrapping ModuleSpec",
    "distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
    "dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
}


def _is_news(known: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(known)


for _module, _known in _SAID.items():
    logging.getLogger(f"megatron.core.{_module}").addFilter(partial(_is_news, _known))


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
