"""From a model's shape to megatron-core's module, and its random initial weights.

One function for every family: llama, mistral, granite (GPTModel) and the hybrid ones. Process groups must be there
(`parallel.process_groups`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module, MegatronModule
from torch import Tensor, nn

from launcher.configs import Parallelism
from launcher.errors import UserError
from launcher.models.shape import ModelShape
from launcher.workers.megatron import layers
from launcher.workers.megatron.parallel import ALONE
from launcher.workers.megatron.versions import hybrid_model

Precision = Literal["bf16", "fp32"]

#: How a sharded state dict is laid out: GPT layers stacked. Our optimizer state has files of its own (`shares`).
SHARDING = {
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
    "distrib_optim_sharding_type": "fully_reshardable",
}
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
_FP32_PARAMETERS = ("A_log", ".D")
_ATTENTION_MATRICES = (".self_attention.linear_qkv.weight", ".self_attention.linear_proj.weight")


def transformer_config(
    shape: ModelShape, parallelism: Parallelism = ALONE, precision: Precision = "fp32", **fields: Any
) -> TransformerConfig:
    """The shape and layout in megatron-core's terms; `fields` are further ones of its TransformerConfig.

    Granite's residual multiplier r is taken up by the substitution y = x / r for the residual stream: norms get
    epsilon / r^2, and the embedding's output is scaled by 1 / r besides its own multiplier (`build_model`).
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    mamba = {
        "is_hybrid_model": True,
        "mamba_state_dim": shape.mamba_state_dim,
        "mamba_head_dim": shape.mamba_head_dim,
        "mamba_num_groups": shape.mamba_num_groups,
        "mamba_num_heads": shape.mamba_num_heads,
    }
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        gated_linear_unit=shape.gated_linear_unit,
        activation_func=F.silu if shape.activation == "silu" else _squared_relu,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_epsilon / shape.residual_multiplier**2,
        # A window of w is the token itself and w - 1 before it.
        window_size=(shape.window_size - 1, 0) if shape.window_size else None,
        softmax_scale=shape.attention_multiplier or shape.kv_channels**-0.5,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=parallelism.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallelism.pipeline_model_parallel_size,
        context_parallel_size=parallelism.context_parallel_size,
        sequence_parallel=parallelism.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision == "bf16",
        # `initialize` sets every weight anew, the same for every layout; megatron-core's own initialization stays on
        # because it is what marks tensor-parallel parameters, which the norm of the gradient goes by
        perform_initialization=True,
        use_cpu_initialization=not torch.cuda.is_available(),
        **layers.kernel_fields(shape, parallelism, precision, deterministic=fields.get("deterministic_mode", False)),
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        **(_RECOMPUTE[parallelism.recompute] if not _recomputes_itself(shape, parallelism) else {}),
        **(mamba if shape.hybrid_override_pattern else {}),
        **fields,
    )


def _recomputes_itself(shape: ModelShape, parallelism: Parallelism) -> bool:
    """Whether `layers.recompute_layers` does what megatron-core's hybrid stack, in 0.16.1, passes over in silence."""
    return parallelism.recompute == "full" and shape.hybrid_override_pattern is not None


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def build_model(
    shape: ModelShape,
    parallelism: Parallelism = ALONE,
    precision: Precision = "fp32",
    *,
    parallel_output: bool = True,
    document_masking: bool = False,
    **fields: Any,
) -> MegatronModule:
    """This rank's part of the model, with weights yet to be set by `initialize` or a checkpoint.

    Its forward takes (input_ids, position_ids, attention_mask=None, labels=None), b s each, and gives losses b s, or
    logits b s vocabulary without labels; on pipeline stages before the last, hidden states. Logits of the rows that
    pad the vocabulary are -inf, so they are never predicted and never trained. `parallel_output` False gathers logits
    over tensor-parallel ranks: for evaluation only. With `document_masking` its layers take what
    `documents.model_inputs` says of documents. `fields` are further ones of megatron-core's TransformerConfig.
    """
    config = transformer_config(shape, parallelism, precision, **fields)
    common: dict[str, Any] = {
        "vocab_size": shape.padded_vocab_size,
        "max_sequence_length": shape.max_position_embeddings,
        "pre_process": parallel_state.is_pipeline_first_stage(),
        "post_process": parallel_state.is_pipeline_last_stage(),
        "parallel_output": parallel_output,
        "share_embeddings_and_output_weights": shape.share_embeddings_and_output_weights,
        "position_embedding_type": shape.position_embedding_type,
        "rotary_base": shape.rotary_base,
    }
    model: MegatronModule
    with layers.unfused_accumulation(config) as built:
        if shape.hybrid_override_pattern:
            if shape.rope_scaling:
                raise UserError(f"config.json: rope scaling {shape.rope_scaling} is not there for hybrid models")
            spec = layers.hybrid_layers(config, shape, document_masking)
            model = hybrid_model(config, spec, shape.hybrid_override_pattern, **common)
            if _recomputes_itself(shape, parallelism):
                layers.recompute_layers(model.decoder)
        else:
            model = GPTModel(config, layers.gpt_layers(config, document_masking), **common, **_rope_scaling(shape))
        built.append(model)
    _scale_ends(model, shape)
    return _in_bf16(config, model) if precision == "bf16" else model


def _rope_scaling(shape: ModelShape) -> dict[str, Any]:
    rope = dict(shape.rope_scaling or {})
    if not rope or rope.get("rope_type", rope.get("type")) == "default":
        return {}
    if rope.get("rope_type") != "llama3" or any(rope.get(k) != v for k, v in _LLAMA3_ROPE.items()):
        raise UserError(
            f"config.json: rope scaling {rope} cannot be trained: megatron-core knows rope_type llama3 with "
            f"{', '.join(f'{k} {v:g}' for k, v in _LLAMA3_ROPE.items())} alone"
        )
    return {"rope_scaling": True, "rope_scaling_factor": rope["factor"]}


def _scale_ends(model: MegatronModule, shape: ModelShape) -> None:
    """Scale the embedding's output and the logits as Granite does, and close the padding rows of the vocabulary."""
    embed = shape.embedding_multiplier / shape.residual_multiplier
    if model.pre_process and embed != 1.0:
        model.embedding.register_forward_hook(lambda _m, _i, out: out * embed)
    if model.post_process and (shape.logits_scaling != 1.0 or shape.vocab_size != shape.padded_vocab_size):
        model.output_layer.register_forward_hook(lambda _m, _i, out: (_finish_logits(out[0], shape), *out[1:]))


def _finish_logits(logits: Tensor, shape: ModelShape) -> Tensor:
    rows = logits.shape[-1]  # all of the padded vocabulary, or this tensor-parallel rank's share of it
    first = parallel_state.get_tensor_model_parallel_rank() * rows if rows < shape.padded_vocab_size else 0
    real = min(max(shape.vocab_size - first, 0), rows)
    if shape.logits_scaling != 1.0:
        logits = logits * (1.0 / shape.logits_scaling)
    return logits if real == rows else F.pad(logits[..., :real], (0, rows - real), value=-math.inf)


def _in_bf16(config: TransformerConfig, model: MegatronModule) -> Float16Module:
    """The model in bf16, but for the Mamba parameters that are exponents: A_log and D stay in fp32."""
    wrapped = Float16Module(config, model)
    for name, parameter in wrapped.named_parameters():
        if name.endswith(_FP32_PARAMETERS):
            parameter.data = parameter.data.float()
    return wrapped


def freeze(model: nn.Module, trainable: Literal["all", "attention"]) -> None:
    """Leave what is not trained without gradients; call it before data parallelism and the optimizer are built.

    `attention`: the matrices of attention layers, linear_qkv and linear_proj. The norm that Transformer Engine puts
    into linear_qkv is the layer's, not the attention's, as in a Hugging Face checkpoint, and stays as it is.
    """
    if trainable == "all":
        return
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(_ATTENTION_MATRICES))
    for module in model.modules():
        # A layer that backward computes again passes no gradient on where its input has none, its own weights' neither.
        if isinstance(module, LanguageModelEmbedding) and module.config.recompute_granularity == "full":
            module.register_forward_hook(lambda _m, _i, out: out.requires_grad_())


# -------------------------------------------------------------------------------------------------- initial weights


def sharded_tensors(model: nn.Module) -> Iterator[ShardedTensor]:
    """This rank's pieces of the model's global tensors, as a checkpoint would hold them; `data` is the live weight."""
    sharded = model.sharded_state_dict(metadata=sharding_metadata())
    apply_factories(sharded)
    return (piece for piece in nested_values(sharded) if isinstance(piece, ShardedTensor))


def sharding_metadata() -> dict[str, Any]:
    """`SHARDING` with the group that megatron-core wants beside it."""
    return {**SHARDING, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def initialize(model: nn.Module, shape: ModelShape, std: float, seed: int) -> None:
    """Set random initial weights: matrices from N(0, std^2), norms 1, Mamba-2's own parameters as its authors do.

    Each global tensor is drawn from a generator of its own, named by the seed and the tensor's key, so that every
    parallel layout starts from the same model.
    """
    count = 0
    with torch.no_grad():
        for piece in sharded_tensors(model):
            stacked = piece.prepend_axis_num
            index, offset = piece.global_offset[:stacked], piece.global_offset[stacked:]
            whole = _draw(f"{seed}/{piece.key}/{index}", piece.key, piece.global_shape[stacked:], std, shape)
            if piece.key in ("embedding.word_embeddings.weight", "output_layer.weight"):
                whole[shape.vocab_size :] = 0.0
            piece.data.copy_(whole[tuple(slice(o, o + n) for o, n in zip(offset, piece.local_shape, strict=True))])
            count += piece.data.numel()
    if count != sum(p.numel() for p in model.parameters()):
        raise RuntimeError("a parameter of the model was left without an initial value")


def _draw(name: str, key: str, size: tuple[int, ...], std: float, shape: ModelShape) -> Tensor:
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1)
    if key.endswith(("norm.weight", "norm_weight", ".D")):
        return torch.ones(size)
    if key.endswith("A_log"):
        return torch.empty(size).uniform_(1.0, 16.0, generator=generator).log()
    if key.endswith("dt_bias"):  # softplus(dt_bias) is log-uniform in 0.001 .. 0.1
        dt = torch.empty(size).uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp()
        return dt + torch.log(-torch.expm1(-dt))
    if ".conv1d." in key:
        bound = shape.mamba_conv_kernel**-0.5
        return torch.empty(size).uniform_(-bound, bound, generator=generator)
    return torch.empty(size).normal_(0.0, std, generator=generator)
