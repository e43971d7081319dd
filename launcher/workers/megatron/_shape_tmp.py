"""Stand-in for `launcher.models.families.shape_of` until that module is merged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.models.shape import ModelShape


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """The shape of the model that a `config.json` describes."""
    c = dict(config)
    heads = c["num_attention_heads"]
    rope = c.get("rope_parameters") or {"rope_type": "default", "rope_theta": c.get("rope_theta", 10000.0)}
    common: dict[str, Any] = dict(
        hidden_size=c["hidden_size"],
        ffn_hidden_size=c["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=c.get("num_key_value_heads", heads),
        kv_channels=c.get("head_dim") or c["hidden_size"] // heads,
        vocab_size=c["vocab_size"],
        max_position_embeddings=c["max_position_embeddings"],
        share_embeddings_and_output_weights=c.get("tie_word_embeddings", False),
    )
    if c["model_type"] == "nemotron_h":
        pattern = c["hybrid_override_pattern"]
        return ModelShape(
            family="nemotron_h",
            num_layers=len(pattern),
            hybrid_override_pattern=pattern,
            norm_epsilon=c["layer_norm_epsilon"],
            gated_linear_unit=False,
            activation="squared_relu",
            position_embedding_type="none",
            mamba_state_dim=c["ssm_state_size"],
            mamba_head_dim=c["mamba_head_dim"],
            mamba_num_heads=c["mamba_num_heads"],
            mamba_num_groups=c["n_groups"],
            mamba_conv_kernel=c["conv_kernel"],
            mamba_chunk_size=c["chunk_size"],
            **common,
        )
    return ModelShape(
        family=c["model_type"],
        num_layers=c["num_hidden_layers"],
        norm_epsilon=c["rms_norm_eps"],
        rotary_base=rope["rope_theta"],
        rope_scaling=rope if rope["rope_type"] != "default" else None,
        window_size=c.get("sliding_window"),
        embedding_multiplier=c.get("embedding_multiplier", 1.0),
        residual_multiplier=c.get("residual_multiplier", 1.0),
        attention_multiplier=c.get("attention_multiplier"),
        logits_scaling=c.get("logits_scaling", 1.0),
        **common,
    )
