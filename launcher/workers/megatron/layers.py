"""The layers of megatron-core's GPT and hybrid models: Transformer Engine's on a GPU, plain ones elsewhere.

Transformer Engine fuses each norm into the linear layer after it, and that is how the checkpoint names it; the maps
here give the separate norms those names, so that a checkpoint moves between a GPU and a CPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import checkpoint
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from launcher.configs import Parallelism
from launcher.errors import UserError
from launcher.models.shape import ModelShape
from launcher.workers.megatron import cpu_mode, mamba_triton
from launcher.workers.megatron.attention import TorchAttention
from launcher.workers.megatron.parallel import ALONE
from launcher.workers.megatron.versions import fused_hybrid_stack

_Forward = Callable[..., torch.Tensor]

_ATTENTION_NORM = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
_MLP_NORM = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
_MAMBA_NORM = {"norm.": "mixer.in_proj.layer_norm_"}


def kernels() -> Literal["transformer-engine", "torch", "reference"]:
    """Whose kernels the layers use: without a GPU megatron-core's plain code and the Mamba-2 reference."""
    if cpu_mode.active():
        return "reference"
    return "transformer-engine" if importlib.util.find_spec("transformer_engine") else "torch"


def fusions(
    shape: ModelShape,
    parallelism: Parallelism = ALONE,
    precision: Literal["bf16", "fp32"] = "bf16",
    *,
    deterministic: bool = False,
) -> dict[str, bool]:
    """What megatron-core fuses on a GPU, as Megatron-LM's own scripts have it; fields of TransformerConfig.

    `torch.compile` wants a C compiler where the model runs. The accumulation of gradients is
    Transformer Engine's own, and Apex's in plain layers.
    """
    if cpu_mode.active():
        return {"gradient_accumulation_fusion": False}
    compiler = any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
    fused = kernels() == "transformer-engine"
    return {
        "bias_activation_fusion": compiler and shape.gated_linear_unit and shape.activation == "silu",
        "bias_dropout_fusion": compiler,
        # megatron-core's rounds the gradient to bf16, whatever the logits are; Megatron-LM calls it not deterministic.
        "cross_entropy_loss_fusion": compiler and precision == "bf16" and not deterministic,
        "apply_rope_fusion": fused,
        "gradient_accumulation_fusion": fused or _has_apex(),
        "use_mamba_mem_eff_path": mamba_triton.has_fused_kernel(),
        "deallocate_pipeline_outputs": parallelism.pipeline_model_parallel_size > 1,
    }


def kernel_fields(
    shape: ModelShape, parallelism: Parallelism, precision: Literal["bf16", "fp32"], *, deterministic: bool = False
) -> dict[str, Any]:
    """The fields of TransformerConfig that say by what a model is computed, and not what."""
    # Passed from rank to rank, its default, Transformer Engine cannot keep keys inside a window.
    gathers = shape.window_size is not None and parallelism.context_parallel_size > 1
    fused = fusions(shape, parallelism, precision, deterministic=deterministic)
    return {**fused, **({"cp_comm_type": "all_gather"} if gathers else {})}


def _has_apex() -> bool:
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


@contextlib.contextmanager
def unfused_accumulation(config: TransformerConfig) -> Iterator[list[torch.nn.Module]]:
    """Build a model inside, and put it into the list: its plain layers accumulate as they can without Apex.

    megatron-core refuses to build its plain output layer otherwise, where Transformer Engine's layers need no Apex.
    """
    built: list[torch.nn.Module] = []
    if not config.gradient_accumulation_fusion or _has_apex():
        yield built
        return
    plain: Any = sys.modules[ColumnParallelLinear.__module__]
    known, plain._grad_accum_fusion_available = plain._grad_accum_fusion_available, True
    try:
        yield built
    finally:
        plain._grad_accum_fusion_available = known
    for module in (m for model in built for m in model.modules()):
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            module.gradient_accumulation_fusion = False


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMS norm, built as megatron-core builds a norm; its gradient is summed over sequence-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float | None = None, **_: object) -> None:
        place = {"device": torch.cuda.current_device(), "dtype": config.params_dtype}
        super().__init__(hidden_size, config.layernorm_epsilon if eps is None else eps, **place)
        self.weight.sequence_parallel = config.sequence_parallel


def gpt_layers(config: TransformerConfig, document_masking: bool = False) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage of a model of attention + MLP layers."""
    count = get_num_layers_to_build(config)
    if kernels() == "transformer-engine":
        from megatron.core.extensions.transformer_engine import TENorm
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        fused = get_gpt_layer_with_transformer_engine_spec()
        if document_masking and config.context_parallel_size > 1:
            _attend_by_torch(fused)
        return TransformerBlockSubmodules(layer_specs=[fused] * count, layer_norm=TENorm)
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=_attention(config, document_masking),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=_mlp(),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=_ATTENTION_NORM | _MLP_NORM,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=RMSNorm)


def hybrid_layers(config: TransformerConfig, shape: ModelShape, document_masking: bool = False) -> ModuleSpec:
    """The three kinds of layers of a hybrid model: Mamba-2, attention, MLP, each with its own norm."""
    sizes = {"d_conv": shape.mamba_conv_kernel, "chunk_size": shape.mamba_chunk_size}
    if shape.has_mamba and not mamba_triton.has_scan():
        raise UserError(
            "Mamba-2 layers need mamba-ssm, which cannot be imported here: pip install --no-build-isolation mamba-ssm "
            "causal-conv1d, or without a CUDA compiler, for its Triton kernels alone: MAMBA_FORCE_BUILD=TRUE "
            "MAMBA_SKIP_CUDA_BUILD=TRUE pip install --no-deps --no-build-isolation mamba-ssm"
        )
    if document_masking and shape.has_mamba and not mamba_triton.has_fused_kernel():
        raise UserError(
            "document_masking: Mamba-2 layers keep documents apart by causal-conv1d, which cannot be imported here: "
            "pip install --no-build-isolation causal-conv1d, or set document_masking false"
        )
    if kernels() == "transformer-engine":
        stack = fused_hybrid_stack()
        stack.submodules.mamba_layer.submodules.mixer.params |= sizes
        if document_masking and config.context_parallel_size > 1:
            _attend_by_torch(stack.submodules.attention_layer)
        return stack
    mixer = ModuleSpec(
        module=MambaMixer,
        params=sizes,
        submodules=MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear),
    )
    mamba = MambaLayerSubmodules(
        norm=RMSNorm, mixer=mixer, mamba_bda=get_bias_dropout_add, sharded_state_dict_keys_map=_MAMBA_NORM
    )
    attention = TransformerLayerSubmodules(
        input_layernorm=RMSNorm,
        self_attention=_attention(config, document_masking),
        self_attn_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map=_ATTENTION_NORM,
    )
    mlp = TransformerLayerSubmodules(
        pre_mlp_layernorm=RMSNorm, mlp=_mlp(), mlp_bda=get_bias_dropout_add, sharded_state_dict_keys_map=_MLP_NORM
    )
    kinds = MambaStackSubmodules(
        mamba_layer=ModuleSpec(module=MambaLayer, submodules=mamba),
        attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
        mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
    )
    return ModuleSpec(module=HybridStack, submodules=kinds)


class HybridStack(MambaStack):
    """megatron-core's stack of mixed layers, whose last norm is Transformer Engine's alone."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, post_layer_norm=False, **kwargs)
        if self.post_process:
            self.final_norm = RMSNorm(config, config.hidden_size)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The stack, then the last norm."""
        hidden = super().forward(*args, **kwargs)
        return self.final_norm(hidden) if self.post_process else hidden


def recompute_layers(stack: MambaStack) -> None:
    """Let backward compute every layer of a hybrid stack again, from the hidden states that enter it."""
    for layer in stack.layers:
        layer.forward = partial(_recomputed, layer, layer.forward)


def _recomputed(
    layer: torch.nn.Module, forward: _Forward, hidden_states: torch.Tensor, **further: object
) -> torch.Tensor:
    trained = hidden_states.requires_grad or any(p.requires_grad for p in layer.parameters())
    if not (trained and layer.training and torch.is_grad_enabled()):
        return forward(hidden_states=hidden_states, **further)
    if not hidden_states.requires_grad:  # what is below is not trained: autograd would skip the layer
        hidden_states = hidden_states.detach().requires_grad_()
    return checkpoint(lambda hidden: forward(hidden_states=hidden, **further), False, hidden_states)


def _attend_by_torch(layer: ModuleSpec) -> None:
    """Transformer Engine would cut every document over context-parallel ranks: lengths would have to be multiples."""
    layer.submodules.self_attention.submodules.core_attention = TorchAttention


def _attention(config: TransformerConfig, document_masking: bool) -> ModuleSpec:
    # On a CPU megatron-core's own, but where it lacks something.
    lacking = document_masking or config.window_size is not None or config.context_parallel_size > 1
    core = TorchAttention if lacking or kernels() != "reference" else DotProductAttention
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear, core_attention=core, linear_proj=RowParallelLinear
        ),
    )


def _mlp() -> ModuleSpec:
    return ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    )
