"""Names and shapes of a model's tensors in each format of a checkpoint, and what a format cannot hold. Standard library
only."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from launcher.models.families import tensor_map
from launcher.models.shape import ModelShape
from launcher.models.tensors import Shape, TensorMap

Format = Literal["hf", "megatron", "nemo"]
#: Tensor-parallel sizes of runs, by which NeMo and Megatron-LM pad the vocabularies of what they save.
_TP = (1, 2, 4, 8, 16)
#: Of a checkpoint of format nemo: what NeMo builds the model from, the weights, what their keys begin with.
NEMO_CONFIG, NEMO_WEIGHTS, NEMO_PREFIX = "model_config.yaml", "model_weights", "model."
#: NeMo has llama3 scaling built in for this factor alone.
_NEMO_FACTOR = 8.0


def slot(row: TensorMap, key: str) -> str:
    """A tensor's name in a hybrid model's checkpoint, which homogeneous models' readers and writers use too."""
    return key if row.layer is None else f"decoder.layers.{row.layer}.{key}"


def row_in(row: TensorMap, form: Format) -> TensorMap:
    """The row as a format has it: NeMo's vocabularies are written without padding."""
    return replace(row, megatron_shapes=row.hf_shapes) if form == "nemo" and row.transform == "vocab" else row


def names_of(row: TensorMap, form: Format) -> tuple[str, ...]:
    """The names of a row's tensors in a format."""
    return row.hf if form == "hf" else tuple(slot(row, key) for key in row.megatron)


def shapes_of(row: TensorMap, shape: ModelShape, form: Format) -> tuple[tuple[Shape, ...], ...]:
    """For each of a row's tensors the shapes that fit, the first being what is written: a vocabulary comes with and
    without padding rows."""
    if form == "hf":
        return tuple((size,) for size in row.hf_shapes)
    row = row_in(row, form)
    return tuple(_fitting(row, shape, size, form) for size in row.megatron_shapes)


def _fitting(row: TensorMap, shape: ModelShape, size: Shape, form: Format) -> tuple[Shape, ...]:
    if row.transform != "vocab":
        return (size,)
    unit = vocabulary_unit(shape.vocab_size) if form == "nemo" else shape.make_vocab_size_divisible_by
    padded = (-(-size[0] // (unit * tp)) * unit * tp for tp in _TP)
    return tuple(dict.fromkeys((rows, *size[1:]) for rows in (size[0], row.hf_shapes[0][0], *padded)))


def vocabulary_unit(vocab_size: int) -> int:
    """`make_vocab_size_divisible_by` as NeMo's converters choose it: 128, halved until it divides the vocabulary."""
    unit = 128
    while vocab_size % unit:
        unit //= 2
    return unit


def tensors_of(shape: ModelShape, form: Format) -> dict[str, tuple[Shape, ...]]:
    """Every tensor of a model in a format, with the shapes that fit."""
    rows = tensor_map(shape)
    return {n: fit for r in rows for n, fit in zip(names_of(r, form), shapes_of(r, shape, form), strict=True)}


def output_copy(shape: ModelShape, form: Format) -> tuple[str, str] | None:
    """Of a model whose output weights are the embedding's: their name, should a file have them, and the embedding's."""
    if not shape.share_embeddings_and_output_weights:
        return None
    return ("lm_head.weight" if form == "hf" else "output_layer.weight"), names_of(tensor_map(shape)[0], form)[0]


def folded_epsilon(shape: ModelShape) -> float:
    """The norms' epsilon beside weights that Granite's multipliers are folded into."""
    return shape.norm_epsilon / shape.residual_multiplier**2


def nemo_problems(shape: ModelShape, fold: bool) -> list[str]:
    """Why NeMo cannot have the model, or not as it is. `fold`: Granite's multipliers go into the weights."""
    problems = []
    if shape.hybrid_override_pattern is not None:
        problems.append(f"model type {shape.family} does not go into format nemo; llama, mistral and granite 3 do")
    if shape.family == "granite" and not fold:
        problems.append(
            "model type granite: NeMo has no setting for its multipliers. --fold-multipliers puts them into the "
            "weights, in fp32: for inference only, since training then goes another way"
        )
    if fold and shape.family != "granite":
        problems.append(f"--fold-multipliers: model type {shape.family} has no multipliers")
    rope = shape.rope_scaling or {}
    if rope and rope.get("factor") != _NEMO_FACTOR:
        problems.append(f"RoPE's factor is {rope.get('factor')}; NeMo has {_NEMO_FACTOR:g} built in")
    return problems
