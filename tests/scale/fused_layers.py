"""A stand-in for Transformer Engine's layers on a CPU: a norm and the linear layer after it in one module."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from launcher.workers.megatron import layers


class NormLinear(ColumnParallelLinear):
    """Named and saved as TELayerNormColumnParallelLinear is: `layer_norm_weight` comes before `weight`."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **named: Any) -> None:
        super().__init__(input_size, output_size, config=config, **named)
        weight = self.weight
        del self.weight
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel
        self.weight = weight

    def forward(self, hidden: Tensor, *arguments: Any, **named: Any) -> Any:
        """The norm, then the product."""
        epsilon = self.config.layernorm_epsilon
        normed = F.rms_norm(hidden, (hidden.shape[-1],), self.layer_norm_weight, epsilon)
        return super().forward(normed, *arguments, **named)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """The norm is whole on every tensor-parallel rank."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)


def install() -> None:
    """Let `launcher.workers.megatron.layers` build plain attention and MLP layers of these."""
    attention, mlp = layers._attention, layers._mlp

    def fused_attention(*arguments: Any) -> Any:
        spec = attention(*arguments)
        spec.submodules.linear_qkv = NormLinear
        return spec

    def fused_mlp() -> Any:
        spec = mlp()
        spec.submodules.linear_fc1 = NormLinear
        return spec

    layers._attention, layers._mlp = fused_attention, fused_mlp
    layers.TransformerLayerSubmodules = _without_norms(layers.TransformerLayerSubmodules)


def _without_norms(made: Any) -> Any:
    """The norms are in the linear layers, so the layer has none and no map of names."""
    norms = {"input_layernorm": IdentityOp, "pre_mlp_layernorm": IdentityOp, "sharded_state_dict_keys_map": {}}
    return lambda **named: made(**{k: norms.get(k, v) for k, v in named.items()})
