"""Nemotron-H: Mamba-2, attention without positions, or an MLP in each layer, by a pattern.

Names: transformers' modeling_nemotron_h.py (files say `backbone.`); megatron/core/models/mamba.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.models.reading import Config, common, mamba_norm, mamba_steps
from launcher.models.shape import ModelShape
from launcher.models.tensors import NORM_BEFORE, TensorMap, attention, copy, mamba, norm, vocab

_KINDS = {"linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*", "mlp": "-"}


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a config.json describes; `hybrid_override_pattern` or, as transformers 5 says it, a list."""
    c = Config(config)
    c.must("mlp_hidden_act", "relu2")
    c.must("mamba_hidden_act", "silu")
    for name in ("attention_bias", "mlp_bias", "use_bias", "mamba_proj_bias"):
        c.must(name, False)
    c.must("use_conv_bias", True)
    mamba_steps(c)
    pattern = c.get("hybrid_override_pattern")
    if pattern is None:
        layers = c.need("layers_block_type") or []
        pattern = "".join(_KINDS.get(kind, f"<{kind}>") for kind in layers)
    c.need("num_key_value_heads")
    head_dim = c.get("head_dim") or c.get("attention_head_dim")  # the published files have the second
    c.refuse(head_dim is None, "head_dim is missing")
    c.refuse(c.get("attention_head_dim", head_dim) != head_dim, "head_dim and attention_head_dim differ")
    if "M" in pattern:
        mamba_norm(c, "layer_norm_epsilon")
    strange = set(pattern) - set("M*-")
    c.refuse(bool(strange), f"layers of kind {', '.join(sorted(strange))} are not covered (no experts)")
    return c.done(
        lambda: ModelShape(
            family="nemotron_h",
            num_layers=len(pattern),
            hybrid_override_pattern=pattern,
            norm_epsilon=c.need("layer_norm_epsilon"),
            gated_linear_unit=False,
            activation="squared_relu",
            position_embedding_type="none",
            mamba_state_dim=c.need("ssm_state_size"),
            mamba_head_dim=c.need("mamba_head_dim"),
            mamba_num_heads=c.need("mamba_num_heads"),
            mamba_num_groups=c.need("n_groups"),
            mamba_conv_kernel=c.get("conv_kernel", 4),
            mamba_chunk_size=c.get("chunk_size", 128),
            **{**common(c), "kv_channels": head_dim},
        )
    )


def tensor_map(shape: ModelShape) -> tuple[TensorMap, ...]:
    """Every tensor, in the order of the model."""
    rows = [vocab("backbone.embeddings.weight", "embedding.word_embeddings.weight", shape, "embedding")]
    for i, kind in enumerate(shape.hybrid_override_pattern or ""):
        hf = f"backbone.layers.{i}"
        rows.append(norm(f"{hf}.norm.weight", NORM_BEFORE[kind], shape, i))
        if kind == "M":
            rows += mamba(f"{hf}.mixer", shape, i)
        elif kind == "*":
            rows += attention(f"{hf}.mixer", shape, i)
        else:
            inner, width = shape.ffn_hidden_size, shape.hidden_size
            rows += [
                copy(f"{hf}.mixer.up_proj.weight", "mlp.linear_fc1.weight", (inner, width), "mlp", i),
                copy(f"{hf}.mixer.down_proj.weight", "mlp.linear_fc2.weight", (width, inner), "mlp", i),
            ]
    rows.append(norm("backbone.norm_f.weight", "decoder.final_norm.weight", shape))
    if not shape.share_embeddings_and_output_weights:
        rows.append(vocab("lm_head.weight", "output_layer.weight", shape, "lm_head"))
    return tuple(rows)
