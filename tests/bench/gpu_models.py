"""What `make bench-gpu` trains: dense models of 1 and 3 billion parameters, hybrids of 1.4 and 3 billion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.bench.stages import model_named


@dataclass(frozen=True)
class Case:
    """A model at a sequence length, and the sequences of a step.

    `script` is Megatron-LM's own for it, None where its arguments do not describe the model; `mfu` is what is aimed at.
    """

    name: str
    model: Mapping[str, Any]
    seq_length: int
    global_batch_size: int
    mfu: float
    script: str | None = None


def _llama(name: str, hidden: int, layers: int, heads: int, head_dim: int) -> dict[str, Any]:
    """The sizes of Llama 3.2: grouped queries in 8 groups, tied embeddings, MLP of 8192; plain RoPE."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": 8192,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
    }
    return {"name": name, "family": "llama", "config": config}


def _hybrid() -> dict[str, Any]:
    """Nemotron-H's layers and vocabulary at half its width and half its depth, its state and groups as they are."""
    model = model_named("nemotron-h-8b")
    model["config"] |= {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-",
        "num_attention_heads": 16,
        "mamba_num_heads": 64,
    }
    return {"name": "nemotron-h-like", "family": "nemotron_h", "config": model["config"]}


LLAMA_1B, LLAMA_3B = _llama("llama-3.2-1b", 2048, 16, 32, 64), _llama("llama-3.2-3b", 3072, 28, 24, 128)
GRANITE_H = model_named("granite-4.0-h-micro")
CASES = (
    Case("dense-1b-4k", LLAMA_1B, 4096, 32, 0.55, "pretrain_gpt.py"),
    Case("dense-1b-8k", LLAMA_1B, 8192, 16, 0.55, "pretrain_gpt.py"),
    Case("dense-3b-4k", LLAMA_3B, 4096, 16, 0.55, "pretrain_gpt.py"),
    Case("hybrid-1b-4k", _hybrid(), 4096, 32, 0.45, "pretrain_mamba.py"),
    Case("hybrid-1b-8k", _hybrid(), 8192, 16, 0.45, "pretrain_mamba.py"),
    # Megatron-LM's arguments have no words for Granite's multipliers.
    Case("granite-4.0-h-micro-4k", GRANITE_H, 4096, 16, 0.45),
)
#: The model whose checkpoints are timed.
STALL = "dense-1b-4k"
