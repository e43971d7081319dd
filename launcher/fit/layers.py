"""One layer's parameters, kept activations and FLOPs, by its letter: `*` attention, `-` MLP, `M` Mamba-2. Pure.

Letters are those of Megatron's hybrid patterns; a Llama layer is `*-`. Sources: Korthikanti et al. 2022 (arXiv
2205.05198) for activations, corrected for grouped queries, gated MLPs and flash attention; megatron-core's
MambaMixer for what Mamba-2 keeps; Megatron-LM's num_floating_point_operations for what counts as a FLOP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from launcher.models.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The sizes that memory and FLOPs depend on. `unit` letters are never cut apart by the pipeline. Logits are
    copied where they are scaled, and where the vocabulary is padded, whose rows are closed.

    The last four are of older models than ours, on which most published measurements were made.
    """

    hidden: int
    pattern: str
    heads: int
    groups: int
    head_dim: int
    ffn: int
    vocab: int
    padded_vocab: int
    gated: bool = True
    tied: bool = False
    logits_copies: int = 0
    window: int | None = None
    mamba_heads: int = 0
    mamba_inner: int = 0
    mamba_groups: int = 0
    mamba_state: int = 0
    mamba_conv: int = 4
    mamba_chunk: int = 128
    unit: int = 1
    bias: bool = False
    layernorm: bool = False
    positions: int = 0
    dropout: bool = False


def architecture_of(shape: ModelShape) -> Architecture:
    """The sizes of one of our models."""
    pattern = shape.hybrid_override_pattern
    return Architecture(
        hidden=shape.hidden_size,
        pattern=pattern or "*-" * shape.num_layers,
        heads=shape.num_attention_heads,
        groups=shape.num_query_groups,
        head_dim=shape.kv_channels,
        ffn=shape.ffn_hidden_size,
        vocab=shape.vocab_size,
        padded_vocab=shape.padded_vocab_size,
        gated=shape.gated_linear_unit,
        tied=shape.share_embeddings_and_output_weights,
        logits_copies=(shape.logits_scaling != 1.0) + (shape.vocab_size != shape.padded_vocab_size),
        window=shape.window_size,
        mamba_heads=shape.mamba_num_heads,
        mamba_inner=shape.mamba_num_heads * shape.mamba_head_dim,
        mamba_groups=shape.mamba_num_groups,
        mamba_state=shape.mamba_state_dim,
        mamba_conv=shape.mamba_conv_kernel,
        mamba_chunk=shape.mamba_chunk_size,
        unit=1 if pattern else 2,
    )


# -------------------------------------------------------------------------------------------------------- parameters


def layer_parameters(a: Architecture, letter: str, tp: int = 1) -> float:
    """Parameters of one layer on one of `tp` tensor-parallel ranks."""
    h = a.hidden
    norm = h * (2 if a.layernorm else 1)
    if letter == "M":
        state = a.mamba_groups * a.mamba_state
        projections = h * (2 * a.mamba_inner + 2 * state + a.mamba_heads) + a.mamba_inner * h
        convolution = (a.mamba_inner + 2 * state) * (a.mamba_conv + 1)
        return (projections + convolution + 3 * a.mamba_heads + a.mamba_inner) / tp + norm
    if letter == "*":
        first, second = (a.heads + 2 * max(a.groups, tp)) * a.head_dim, a.heads * a.head_dim
    else:
        first, second = a.ffn * (2 if a.gated else 1), a.ffn
    biases = (first / tp + h) if a.bias else 0
    return h * (first + second) / tp + biases + norm


def stages_of(a: Architecture, pp: int) -> list[str]:
    """The letters of each pipeline stage. Raises ValueError where the layers do not divide."""
    units = len(a.pattern) // a.unit
    if units % pp:
        raise ValueError(f"{units} layers do not divide over {pp} pipeline stages")
    size = units // pp * a.unit
    return [a.pattern[i * size : (i + 1) * size] for i in range(pp)]


def rank_parameters(a: Architecture, tp: int, pp: int, stage: int) -> float:
    """Parameters on a rank of a stage; a tied matrix is held by the first and the last stage alike."""
    count = sum(layer_parameters(a, letter, tp) for letter in stages_of(a, pp)[stage])
    matrix = a.padded_vocab * a.hidden / tp
    if stage == 0:
        count += matrix + a.positions * a.hidden
    if stage == pp - 1:
        count += a.hidden * (2 if a.layernorm else 1)
        count += 0 if a.tied and pp == 1 else matrix
    return count


# ------------------------------------------------------------------------------------------------------- activations


def layer_activations(
    a: Architecture,
    letter: str,
    tp: int = 1,
    *,
    sp: bool = False,
    recompute_mlp: bool = False,
    square: int = 0,
    width: int = 2,
) -> float:
    """Bytes a token that one layer keeps from forward to backward on one rank, with fused kernels.

    `square` is the sequence's length where attention is not fused and keeps its scores, 0 otherwise; `width` the bytes
    of an activation: 2 in bf16, 4 in fp32.
    """
    replicated = 2 * width * a.hidden + (a.hidden if a.dropout else 0)
    if letter == "*":
        columns = (a.heads + 2 * max(a.groups, tp)) * a.head_dim + a.heads * a.head_dim
        split = width * columns + 4 * a.heads + (2 * width + 1) * a.heads * square
    elif letter == "-":
        split = 0 if recompute_mlp else width * (3 if a.gated else 2) * a.ffn
    else:
        split = width * (5 * a.mamba_inner + 2 * a.mamba_groups * a.mamba_state + a.mamba_heads) + 4 * a.mamba_groups
    return replicated / (tp if sp else 1) + split / tp


# -------------------------------------------------------------------------------------------------------------- FLOPs


def layer_flops(a: Architecture, letter: str, seq_length: float) -> float:
    """FLOPs a token of one layer's forward pass; causal attention counts half of its square."""
    h = a.hidden
    if letter == "-":
        return 2 * (3 if a.gated else 2) * h * a.ffn
    if letter == "*":
        width = a.heads * a.head_dim
        context = seq_length / 2
        if a.window and a.window < seq_length:
            context = a.window * (1 - a.window / (2 * seq_length))
        return 2 * h * (a.heads + 2 * a.groups) * a.head_dim + 2 * width * h + 4 * width * context
    inner, state = a.mamba_inner, a.mamba_groups * a.mamba_state
    projections = 2 * h * (2 * inner + 2 * state + a.mamba_heads) + 2 * inner * h
    convolution = 2 * a.mamba_conv * (inner + 2 * state)
    scan = 2 * a.mamba_chunk * (state + inner) + 4 * a.mamba_state * inner
    return projections + convolution + scan


def flops_per_token(a: Architecture, seq_length: float, trainable: Literal["all", "attention"] = "all") -> float:
    """FLOPs a token of a training step: forward and twice that for backward; the output matrix counts.

    For sequences of several documents that do not see each other, `seq_length` is the documents' mean length weighted
    by tokens, sum of squares over sum: exact, but for windows that some are shorter than. Where attention alone is
    trained, backward ends at the first attention layer, and of what is frozen above it no gradients of weights are
    made.
    """
    forward = sum(layer_flops(a, letter, seq_length) for letter in a.pattern) + 2 * a.hidden * a.vocab
    if trainable == "all":
        return 3 * forward
    reached = a.pattern[a.pattern.index("*") :]
    through = sum(2 * layer_flops(a, letter, seq_length) - _frozen_flops(a, letter) for letter in reached)
    return forward + through + 2 * a.hidden * a.vocab


def _frozen_flops(a: Architecture, letter: str) -> float:
    """What the gradients of a layer's matrices would take, where they are not trained: an MLP's, or Mamba-2's."""
    if letter == "M":
        return 2 * a.hidden * (3 * a.mamba_inner + 2 * a.mamba_groups * a.mamba_state + a.mamba_heads)
    return 0.0 if letter == "*" else 2 * (3 if a.gated else 2) * a.hidden * a.ffn
