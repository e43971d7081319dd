"""Granite 4 without experts: Mamba-2 or attention, then a gated MLP, in every layer.

One layer in Hugging Face files is two in Megatron: layer i is 2i (`M` or `*`) and 2i+1 (`-`).
Names: transformers' modeling_granitemoehybrid.py; megatron/core/models/mamba.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from launcher.models.reading import Config, common, mamba_norm, mamba_steps, rope
from launcher.models.shape import ModelShape
from launcher.models.tensors import NORM_BEFORE, TensorMap, attention, copy, mamba, norm, vocab

_KINDS = {"linear_attention": "M-", "mamba": "M-", "full_attention": "*-", "attention": "*-"}


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a config.json describes."""
    c = Config(config)
    c.must("hidden_act", "silu")
    c.must("attention_bias", False)
    c.must("mamba_proj_bias", False)
    c.must("mamba_conv_bias", True)
    c.refuse(bool(c.need("num_local_experts")), f"{c.get('num_local_experts')} experts: experts are not covered")
    mamba_steps(c)
    layers = c.get("layer_types") or c.get("layers_block_type") or []
    c.refuse(len(layers) != c.need("num_hidden_layers"), "layer_types is missing, or not one for each hidden layer")
    c.refuse(not set(layers) <= set(_KINDS), f"layer types {sorted(set(layers) - set(_KINDS))} are not covered")
    positions = c.get("position_embedding_type")  # absent: none
    names = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")

    def build() -> ModelShape:
        pattern = "".join(_KINDS[kind] for kind in layers)
        values = {**common(c), **(rope(c) if positions == "rope" else {"position_embedding_type": "none"})}
        c.refuse("rope_scaling" in values, "RoPE scaling is not there for hybrid models in megatron-core")
        multipliers: dict[str, Any] = {name: float(c.get(name, 1.0)) for name in names}
        size: Callable[[str], Any] = c.get
        if "M" in pattern:
            size = c.need
            mamba_norm(c, "rms_norm_eps")
        return ModelShape(
            **{**values, "ffn_hidden_size": c.need("shared_intermediate_size")},
            family="granitemoehybrid",
            num_layers=len(pattern),
            hybrid_override_pattern=pattern,
            norm_epsilon=c.need("rms_norm_eps"),
            mamba_state_dim=size("mamba_d_state") or 0,
            mamba_head_dim=_head_dim(c),
            mamba_num_heads=size("mamba_n_heads") or 0,
            mamba_num_groups=size("mamba_n_groups") or 0,
            mamba_conv_kernel=c.get("mamba_d_conv", 4),
            mamba_chunk_size=c.get("mamba_chunk_size", 256),
            **multipliers,
        )

    return c.done(build)


def _head_dim(c: Config) -> int:
    named = c.get("mamba_d_head", 0)
    if named == "auto":
        return int(c.get("mamba_expand", 2) * c.need("hidden_size") // c.need("mamba_n_heads"))
    return int(named)


def tensor_map(shape: ModelShape) -> tuple[TensorMap, ...]:
    """Every tensor, in the order of the model."""
    rows = [vocab("model.embed_tokens.weight", "embedding.word_embeddings.weight", shape, "embedding")]
    pattern = shape.hybrid_override_pattern or ""
    for i in range(len(pattern) // 2):
        hf, first, second = f"model.layers.{i}", 2 * i, 2 * i + 1
        inner, width = shape.ffn_hidden_size, shape.hidden_size
        mixer = (
            mamba(f"{hf}.mamba", shape, first) if pattern[first] == "M" else attention(f"{hf}.self_attn", shape, first)
        )
        rows += [
            norm(f"{hf}.input_layernorm.weight", NORM_BEFORE[pattern[first]], shape, first),
            *mixer,
            norm(f"{hf}.post_attention_layernorm.weight", NORM_BEFORE["-"], shape, second),
            copy(f"{hf}.shared_mlp.input_linear.weight", "mlp.linear_fc1.weight", (2 * inner, width), "mlp", second),
            copy(f"{hf}.shared_mlp.output_linear.weight", "mlp.linear_fc2.weight", (width, inner), "mlp", second),
        ]
    rows.append(norm("model.norm.weight", "decoder.final_norm.weight", shape))
    if not shape.share_embeddings_and_output_weights:
        rows.append(vocab("lm_head.weight", "output_layer.weight", shape, "lm_head"))
    return tuple(rows)
