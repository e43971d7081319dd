"""The seven base models of PRISM (arXiv 2603.17074): their config.json as data, and a tiny twin of each."""

from __future__ import annotations

from typing import Any

_MULTIPLIERS = {"embedding_multiplier": 12, "residual_multiplier": 0.22}
_MAMBA_HYBRID = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"

#: Name to config.json: the keys that decide the tensors and the forward pass, in the spelling of the published files.
REAL: dict[str, dict[str, Any]] = {
    "granite-3.3-8b-base": {
        "model_type": "granite", "hidden_size": 4096, "num_hidden_layers": 40, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 12800, "vocab_size": 49152, "max_position_embeddings": 131072,
        "rope_theta": 10000000.0, "rope_scaling": None, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "attention_bias": False, "mlp_bias": False, "hidden_act": "silu",
        **_MULTIPLIERS, "attention_multiplier": 0.0078125, "logits_scaling": 16.0,
    },
    "granite-4.0-micro-base": {
        "model_type": "granitemoehybrid", "hidden_size": 2560, "num_hidden_layers": 40, "num_attention_heads": 40,
        "num_key_value_heads": 8, "intermediate_size": 8192, "shared_intermediate_size": 8192, "vocab_size": 100352,
        "max_position_embeddings": 131072, "position_embedding_type": "rope", "rope_theta": 10000000,
        "rope_scaling": None, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "attention_bias": False,
        "hidden_act": "silu", "num_local_experts": 0, "num_experts_per_tok": 0, "layer_types": ["attention"] * 40,
        "mamba_d_state": 256, "mamba_n_heads": 128, "mamba_d_head": 40, "mamba_n_groups": 1, "mamba_d_conv": 4,
        "mamba_expand": 2, "mamba_chunk_size": 256, "mamba_conv_bias": True, "mamba_proj_bias": False,
        **_MULTIPLIERS, "attention_multiplier": 0.015625, "logits_scaling": 10,
    },
    "granite-4.0-h-micro-base": {
        "model_type": "granitemoehybrid", "hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 8192, "shared_intermediate_size": 8192, "vocab_size": 100352,
        "max_position_embeddings": 131072, "position_embedding_type": "nope", "rope_theta": 10000,
        "rope_scaling": None, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "attention_bias": False,
        "hidden_act": "silu", "num_local_experts": 0, "num_experts_per_tok": 0,
        "layer_types": ["attention" if i in (5, 15, 25, 35) else "mamba" for i in range(40)],
        "mamba_d_state": 128, "mamba_n_heads": 64, "mamba_d_head": 64, "mamba_n_groups": 1, "mamba_d_conv": 4,
        "mamba_expand": 2, "mamba_chunk_size": 256, "mamba_conv_bias": True, "mamba_proj_bias": False,
        **_MULTIPLIERS, "attention_multiplier": 0.015625, "logits_scaling": 8,
    },
    "Nemotron-H-8B-Base-8K": {
        "model_type": "nemotron_h", "hidden_size": 4096, "num_hidden_layers": 52, "num_attention_heads": 32,
        "num_key_value_heads": 8, "attention_head_dim": 128, "intermediate_size": 21504, "vocab_size": 131072,
        "max_position_embeddings": 8192, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False,
        "attention_bias": False, "mlp_bias": False, "use_bias": False, "use_conv_bias": True,
        "mamba_proj_bias": False, "mlp_hidden_act": "relu2", "mamba_hidden_act": "silu",
        "hybrid_override_pattern": _MAMBA_HYBRID, "ssm_state_size": 128, "mamba_head_dim": 64,
        "mamba_num_heads": 128, "n_groups": 8, "conv_kernel": 4, "expand": 2, "chunk_size": 128,
    },
    "Mistral-7B-v0.1": {
        "model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 32000, "max_position_embeddings": 32768,
        "rope_theta": 10000.0, "sliding_window": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "hidden_act": "silu",
    },
    "Llama-3.1-8B": {
        "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 131072,
        "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "attention_bias": False,
        "mlp_bias": False, "hidden_act": "silu",
        "rope_scaling": {
            "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    "Mistral-Small-24B-Base-2501": {
        "model_type": "mistral", "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 32768, "vocab_size": 131072,
        "max_position_embeddings": 32768, "rope_theta": 100000000.0, "sliding_window": None, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "hidden_act": "silu",
    },
}  # fmt: skip

#: Parameters with tied weights once, from the fields by hand; none of our code is in them.
PARAMETERS = {
    "granite-3.3-8b-base": 8.171e9,
    "granite-4.0-micro-base": 3.403e9,
    "granite-4.0-h-micro-base": 3.191e9,
    "Nemotron-H-8B-Base-8K": 8.101e9,
    "Mistral-7B-v0.1": 7.242e9,
    "Llama-3.1-8B": 8.030e9,
    "Mistral-Small-24B-Base-2501": 23.572e9,
}

# 48 = 4 x 12 as 4096 = 32 x 128; 40 != 4 x 12 as 5120 != 32 x 128. 300 words are no multiple of 128 rows.
_SMALLER = {
    "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 300,
    "max_position_embeddings": 128, "num_hidden_layers": 2,
}  # fmt: skip
_OWN: dict[str, dict[str, Any]] = {
    "granite-4.0-micro-base": {
        "shared_intermediate_size": 80, "layer_types": ["attention"] * 2, "mamba_n_heads": 8, "mamba_d_head": 12,
        "mamba_d_state": 16,
    },
    "granite-4.0-h-micro-base": {
        "shared_intermediate_size": 80, "num_hidden_layers": 4, "mamba_n_heads": 8, "mamba_d_head": 12,
        "layer_types": ["mamba", "attention", "mamba", "mamba"], "mamba_d_state": 16, "mamba_chunk_size": 32,
    },
    "Nemotron-H-8B-Base-8K": {
        "head_dim": 16, "attention_head_dim": 16, "num_hidden_layers": 6, "hybrid_override_pattern": "M-M*-M",
        "ssm_state_size": 16, "mamba_head_dim": 12, "mamba_num_heads": 8, "n_groups": 2, "chunk_size": 32,
    },
    "Mistral-7B-v0.1": {"sliding_window": 32},
    "Mistral-Small-24B-Base-2501": {"hidden_size": 40, "head_dim": 12},
}  # fmt: skip


def twin(name: str) -> dict[str, Any]:
    """A model of the same shape class, small: the same keys, ties, scaling, multipliers, groups and kinds of layers."""
    return {**REAL[name], **_SMALLER, **_OWN.get(name, {})}
