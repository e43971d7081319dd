"""One row of a family's table: a tensor in Hugging Face files, its name in Megatron's, and what lies between.

Standard library only: counts, conversion and the grouping of analyses all derive from the same rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from launcher.models.shape import ModelShape

Shape = tuple[int, ...]
#: copy: as it is. vocab: rows padded and cut. qkv: per group of queries. gate_up: one above the other.
#: split: one tensor cut into several along dimension 0 (Mamba's projection and convolution).
Transform = Literal["copy", "vocab", "qkv", "gate_up", "split"]
Module = Literal["embedding", "attention", "mlp", "mamba", "norm", "lm_head"]


@dataclass(frozen=True)
class TensorMap:
    """`hf` names become `megatron` keys by `transform`; shapes are those without padding.

    `layer` is Megatron's layer number, None outside the layers. A Megatron key inside a layer is written without its
    prefix `decoder.layers.N.`, since a homogeneous model stacks its layers into one tensor.
    """

    hf: tuple[str, ...]
    hf_shapes: tuple[Shape, ...]
    megatron: tuple[str, ...]
    megatron_shapes: tuple[Shape, ...]
    transform: Transform
    module: Module
    layer: int | None = None

    @property
    def elements(self) -> int:
        """Elements of the tensors in Hugging Face files."""
        return sum(math.prod(s) for s in self.hf_shapes)


def copy(hf: str, megatron: str, shape: Shape, module: Module, layer: int | None = None) -> TensorMap:
    """A tensor that is the same on both sides."""
    return TensorMap((hf,), (shape,), (megatron,), (shape,), "copy", module, layer)


def vocab(hf: str, megatron: str, shape: ModelShape, module: Module) -> TensorMap:
    """A tensor with one row a word: [vocab_size, hidden], padded in Megatron."""
    rows, padded = (shape.vocab_size, shape.hidden_size), (shape.padded_vocab_size, shape.hidden_size)
    return TensorMap((hf,), (rows,), (megatron,), (padded,), "vocab", module)


def attention(prefix: str, shape: ModelShape, layer: int) -> tuple[TensorMap, ...]:
    """Query, key, value and output projections under `prefix`, such as `model.layers.0.self_attn`."""
    width = shape.hidden_size
    queries = shape.num_attention_heads * shape.kv_channels
    keys = shape.num_query_groups * shape.kv_channels
    qkv = TensorMap(
        tuple(f"{prefix}.{x}_proj.weight" for x in "qkv"),
        ((queries, width), (keys, width), (keys, width)),
        ("self_attention.linear_qkv.weight",),
        ((queries + 2 * keys, width),),
        "qkv",
        "attention",
        layer,
    )
    output = copy(f"{prefix}.o_proj.weight", "self_attention.linear_proj.weight", (width, queries), "attention", layer)
    return qkv, output


def gated_mlp(prefix: str, shape: ModelShape, layer: int) -> tuple[TensorMap, ...]:
    """Gate, up and down projections under `prefix`, such as `model.layers.0.mlp`."""
    inner, width = shape.ffn_hidden_size, shape.hidden_size
    both = TensorMap(
        (f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight"),
        ((inner, width),) * 2,
        ("mlp.linear_fc1.weight",),
        ((2 * inner, width),),
        "gate_up",
        "mlp",
        layer,
    )
    return both, copy(f"{prefix}.down_proj.weight", "mlp.linear_fc2.weight", (width, inner), "mlp", layer)


def mamba(prefix: str, shape: ModelShape, layer: int) -> tuple[TensorMap, ...]:
    """A Mamba-2 mixer under `prefix`. Projection order on both sides: z, x, B, C, dt."""
    inner = shape.mamba_num_heads * shape.mamba_head_dim
    state = shape.mamba_num_groups * shape.mamba_state_dim
    heads, width, kernel = shape.mamba_num_heads, shape.hidden_size, shape.mamba_conv_kernel
    parts = {"z": inner, "x": inner, "B": state, "C": state, "dt": heads}
    mixed = {"x": inner, "B": state, "C": state}

    def split(name: str, sizes: dict[str, int], rest: Shape) -> TensorMap:
        keys = tuple(f"mixer.{name}.{part}" for part in sizes)
        shapes = tuple((size, *rest) for size in sizes.values())
        whole = (sum(sizes.values()), *rest)
        return TensorMap((f"{prefix}.{name}",), (whole,), keys, shapes, "split", "mamba", layer)

    return (
        split("in_proj.weight", parts, (width,)),
        split("conv1d.weight", mixed, (1, kernel)),
        split("conv1d.bias", mixed, ()),
        *(copy(f"{prefix}.{x}", f"mixer.{x}", (heads,), "mamba", layer) for x in ("A_log", "D", "dt_bias")),
        copy(f"{prefix}.norm.weight", "mixer.norm.weight", (inner,), "norm", layer),
        copy(f"{prefix}.out_proj.weight", "mixer.out_proj.weight", (width, inner), "mamba", layer),
    )


def norm(hf: str, megatron: str, shape: ModelShape, layer: int | None = None) -> TensorMap:
    """An RMSNorm's weight of the model's width."""
    return copy(hf, megatron, (shape.hidden_size,), "norm", layer)


#: The norm before each kind of layer, under the names that Transformer Engine's fused layers give it.
NORM_BEFORE = {
    "M": "mixer.in_proj.layer_norm_weight",
    "*": "self_attention.linear_qkv.layer_norm_weight",
    "-": "mlp.linear_fc1.layer_norm_weight",
}
