"""Llama, Mistral and Granite 3: attention with RoPE and a gated MLP in every layer.

Names: transformers' modeling_llama.py, modeling_mistral.py, modeling_granite.py; megatron/core/models/gpt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.models.reading import Config, common, rope
from launcher.models.shape import ModelShape
from launcher.models.tensors import TensorMap, attention, gated_mlp, norm, vocab


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a config.json describes."""
    c = Config(config)
    c.must("hidden_act", "silu")
    c.must("attention_bias", False)
    c.must("mlp_bias", False)
    family = c.get("model_type")
    window = None
    if family == "mistral":  # what transformers takes for an absent key is Mistral 7B's, unlike elsewhere
        c.need("num_key_value_heads")
        c.refuse("sliding_window" not in config, "sliding_window is missing; null means none")
        window = c.get("sliding_window")
    granite: dict[str, Any] = {}
    if family == "granite":
        names = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
        granite = {name: float(c.get(name, 1.0)) for name in names}
    return c.done(
        lambda: ModelShape(
            family=family,
            num_layers=c.need("num_hidden_layers"),
            norm_epsilon=c.need("rms_norm_eps"),
            window_size=window,
            **common(c),
            **rope(c),
            **granite,
        )
    )


def tensor_map(shape: ModelShape) -> tuple[TensorMap, ...]:
    """Every tensor, in the order of the model."""
    rows = [vocab("model.embed_tokens.weight", "embedding.word_embeddings.weight", shape, "embedding")]
    for i in range(shape.num_layers):
        hf = f"model.layers.{i}"
        rows += [
            norm(f"{hf}.input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight", shape, i),
            *attention(f"{hf}.self_attn", shape, i),
            norm(f"{hf}.post_attention_layernorm.weight", "mlp.linear_fc1.layer_norm_weight", shape, i),
            *gated_mlp(f"{hf}.mlp", shape, i),
        ]
    rows.append(norm("model.norm.weight", "decoder.final_layernorm.weight", shape))
    if not shape.share_embeddings_and_output_weights:
        rows.append(vocab("lm_head.weight", "output_layer.weight", shape, "lm_head"))
    return tuple(rows)
