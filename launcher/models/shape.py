"""The shape of a model in Megatron's names, read from a Hugging Face `config.json`. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from launcher.spec import Family


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Everything that decides a model's tensors and its forward pass.

    Field names are those of Megatron's TransformerConfig where it has one. `hybrid_override_pattern` is None for a
    model of attention + MLP layers; otherwise one character a Megatron layer: M Mamba-2, * attention, - MLP.
    The four Granite multipliers are 1.0 elsewhere; `attention_multiplier` None means 1/sqrt(kv_channels).
    """

    family: Family
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    norm_epsilon: float
    gated_linear_unit: bool = True
    activation: Literal["silu", "squared_relu"] = "silu"
    share_embeddings_and_output_weights: bool = False
    position_embedding_type: Literal["rope", "none"] = "rope"
    rotary_base: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    window_size: int | None = None
    hybrid_override_pattern: str | None = None
    mamba_state_dim: int = 0
    mamba_head_dim: int = 0
    mamba_num_heads: int = 0
    mamba_num_groups: int = 0
    mamba_conv_kernel: int = 4
    mamba_chunk_size: int = 128
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float | None = None
    logits_scaling: float = 1.0
    make_vocab_size_divisible_by: int = 128

    @property
    def has_mamba(self) -> bool:
        """Whether some layers are Mamba-2; a pattern may be of attention and MLP layers alone."""
        return "M" in (self.hybrid_override_pattern or "")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding in Megatron: a multiple of `make_vocab_size_divisible_by`, whatever TP is."""
        unit = self.make_vocab_size_divisible_by
        return -(-self.vocab_size // unit) * unit
