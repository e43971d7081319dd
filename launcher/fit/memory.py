"""Bytes on a GPU for a model under a parallel layout: weights, gradients, optimizer, activations, workspace. Pure.

What the formulas give is torch's peak of allocated bytes; `needed_bytes` adds what the device needs beside. A save
needs nothing more of it: each rank copies its own share to the host (`launcher.fit.host`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from launcher.fit.layers import Architecture, layer_activations, rank_parameters, stages_of

Recompute = Literal["none", "mlp", "full"]
Precision = Literal["bf16", "fp32"]

#: Allocated bytes that belong to no formula: the same in every published case.
_FLOOR = 0.1e9
#: CUDA context, kernels and cuBLAS workspace; NCCL's buffers for each communicator. Bytes.
_CONTEXT, _COMMUNICATOR = 1.0e9, 0.65e9
#: Reserved over allocated bytes with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True.
_FRAGMENTATION = 0.05
#: What neither this nor `launcher.fit.host` counts.
NOT_COUNTED = (
    "FP8",
    "CUDA graphs and NCCL's user buffers",
    "the kernels that Triton compiles",
    "the cache of files, and what else runs on the node",
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a training step lies on the GPUs; sizes by Megatron's names, shortened.

    `gathers_keys`: every context-parallel rank keeps the keys and values of whole sequences, as masked documents want.
    """

    gpus: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    vpp: int = 1
    micro_batch_size: int = 1
    global_batch_size: int = 1
    seq_length: int = 8192
    sp: bool | None = None
    recompute: Recompute = "none"
    distributed_optimizer: bool = True
    gradient_bytes: int = 4
    precision: Precision = "bf16"
    gathers_keys: bool = False

    @property
    def width(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.precision == "bf16" else 4

    @property
    def dp(self) -> int:
        """Data-parallel replicas."""
        return self.gpus // (self.tp * self.pp * self.cp)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a replica in a step."""
        return max(1, self.global_batch_size // (self.dp * self.micro_batch_size))

    @property
    def sequence_parallel(self) -> bool:
        """Whether norms are split over the tensor-parallel ranks: with tensor parallelism unless said otherwise."""
        return self.tp > 1 if self.sp is None else self.sp


@dataclass(frozen=True)
class Memory:
    """Bytes on a rank of the pipeline stage that needs most."""

    stage: int
    parameters: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    workspace: float

    @property
    def allocated(self) -> float:
        """What stays from step to step."""
        return self.weights + self.gradients + self.optimizer + _FLOOR

    @property
    def peak(self) -> float:
        """torch's peak of allocated bytes, from the second step on: Adam's moments come with the first."""
        return self.allocated + self.activations + self.workspace


def memory_of(a: Architecture, layout: Layout, *, fused_attention: bool = True) -> Memory:
    """The stage that needs most. Raises ValueError where the layers do not divide over the stages."""
    found = (stage_memory(a, layout, stage, fused_attention=fused_attention) for stage in range(layout.pp))
    return max(found, key=lambda memory: memory.peak)


def stage_memory(a: Architecture, layout: Layout, stage: int, *, fused_attention: bool = True) -> Memory:
    """Bytes on a rank of one pipeline stage: fp32 gradients and Adam's moments; in bf16, fp32 master weights too."""
    parameters = rank_parameters(a, layout.tp, layout.pp, stage)
    shards = layout.dp * layout.cp if layout.distributed_optimizer else 1
    tokens = layout.micro_batch_size * layout.seq_length // layout.cp
    square = 0 if fused_attention else layout.seq_length // layout.cp
    letters = stages_of(a, layout.pp)[stage]
    kept, live = _kept(a, layout, letters, square)
    logits = _logits(a, layout) if stage == layout.pp - 1 else 0.0
    return Memory(
        stage=stage,
        parameters=int(parameters),
        weights=layout.width * parameters,
        gradients=layout.gradient_bytes * parameters,
        optimizer=(12 if layout.precision == "bf16" else 8) * parameters / shards,
        activations=kept * tokens * _in_flight(layout, stage),
        workspace=max(logits * tokens, live * tokens, _chunk_states(a, letters, layout, tokens)),
    )


def _kept(a: Architecture, layout: Layout, letters: Sequence[str], square: int) -> tuple[float, float]:
    """Bytes a token that the stage's layers keep, and the most that one holds while it is computed again."""
    mlp = layout.recompute == "mlp"
    sp, width = layout.sequence_parallel, layout.width
    whole = [layer_activations(a, x, layout.tp, sp=sp, square=square, width=width) for x in letters]
    if layout.recompute == "full":
        again = max(whole) + _gathered(a, layout, letters) / max(1, letters.count("*"))
        return width * a.hidden / (layout.tp if sp else 1) * len(letters), again
    kept = [layer_activations(a, x, layout.tp, sp=sp, square=square, recompute_mlp=mlp, width=width) for x in letters]
    return sum(kept) + _gathered(a, layout, letters), (
        max(w - k for w, k in zip(whole, kept, strict=True)) if mlp else 0.0
    )


def _logits(a: Architecture, layout: Layout) -> float:
    """Bytes a token: in bf16 the loss makes a copy of the logits in fp32; scaled and padded ones are copies too."""
    width = (6 if layout.precision == "bf16" else 4) + layout.width * a.logits_copies
    return width * a.padded_vocab / layout.tp


def _gathered(a: Architecture, layout: Layout, letters: Sequence[str]) -> float:
    """Bytes a token of this rank that it keeps of the keys and values of the others."""
    if not layout.gathers_keys:
        return 0.0
    each = 2 * layout.width * max(a.groups, layout.tp) * a.head_dim / layout.tp
    return each * (layout.cp - 1) * sum(letter == "*" for letter in letters)


def _in_flight(layout: Layout, stage: int) -> float:
    """Micro-batches whose activations a stage holds at once: 1F1B, interleaved where vpp is above 1."""
    if layout.pp == 1:
        return 1.0
    if layout.vpp == 1:
        return float(min(layout.pp - stage, layout.micro_batches))
    chunks = 2 * (layout.pp - stage - 1) + (layout.vpp - 1) * layout.pp + 1
    return min(chunks, layout.micro_batches * layout.vpp) / layout.vpp


def _chunk_states(a: Architecture, letters: Sequence[str], layout: Layout, tokens: int) -> float:
    """A Mamba-2 layer's states between chunks and their gradients, in fp32, while its backward runs."""
    if "M" not in letters:
        return 0.0
    return 8 * tokens / a.mamba_chunk * a.mamba_inner / layout.tp * a.mamba_state


def needed_bytes(memory: Memory, layout: Layout) -> float:
    """What the device must have: the peak, fragmentation, CUDA's context and NCCL's buffers."""
    communicators = 1 + sum(size > 1 for size in (layout.tp, layout.pp, layout.cp))
    return memory.peak * (1 + _FRAGMENTATION) + _CONTEXT + _COMMUNICATOR * communicators
