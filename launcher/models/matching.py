"""The tensors that a checkpoint holds against those of its model: what is missing, what only lies beside the model and
does no harm, what must not be there. Standard library only: by headers, so that `check` says what the jobs would.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import UserError, bounded, listed
from launcher.models.formats import Format, output_copy, tensors_of
from launcher.models.headers import COVERED, Held
from launcher.models.shape import ModelShape
from launcher.models.tensors import Shape

#: Computed anew by every program, or counted: in no file need they be.
_BUFFERS = re.compile(
    r"(.*\.)?((rotary_emb|rotary_pos_emb)\..*|inv_freq|rope\.freqs|freqs_cis|cos_cached|sin_cached|position_ids"
    r"|masked_bias|num_batches_tracked|_extra_state(/.*)?)"
)
#: A causal mask, under the name that a bias has too.
_MASKS = re.compile(r".*\.(attn|attention|self_attn|self_attention|mixer)\.bias")
#: Modules that a training puts beside a language model.
_HEADS = re.compile(
    r"((model|backbone|decoder|pretrained_model)\.)?(mtp(_layers|_block)?|v_head|value_head|score|reward_head|rm_head"
    r"|critic_head|q_head|classifier|classification_head|regression_head|medusa_heads?)\..+"
)
#: The projection that begins a layer for multi-token prediction, which files number behind the model's own layers.
_PREDICTS = re.compile(r"(.*layers\.\d+\.)eh_proj\.weight")
_LAYER = re.compile(r".*layers\.\d+\.")
#: Names that come with weights of few bits.
_SCALES = re.compile(
    r".*[._](weight_scale(_inv|_2)?|input_scale|output_scale|scale_inv|weight_zero_point|weight_packed|weight_shape"
    r"|weight_g_idx|qweight|qzeros|scales|g_idx|absmax|quant_map|quant_state.*|nested_absmax|blocks)"
)
_OF_WEIGHTS = re.compile(rf".*weight|{_SCALES.pattern}")
_ADAPTERS = re.compile(r".*\.(lora_(A|B|embedding_A|embedding_B|magnitude_vector)|base_layer)\b.*")
#: Parts of names that wrappers put in.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
#: How weights of a kind of quantisation are turned into plain ones, by config.json's word for it.
_PLAIN = {
    "compressed-tensors": "quantization_config=CompressedTensorsConfig(run_compressed=False)",
    "fp8": "quantization_config=FineGrainedFP8Config(dequantize=True)",
    "mxfp4": "quantization_config=Mxfp4Config(dequantize=True)",
}


@dataclass(frozen=True)
class Match:
    """`names`: the model's name of each tensor to the file's. `copy`: a second output weight in the file and what it
    must equal, both as the file names them. `notes`: what is left out, one line a kind."""

    names: Mapping[str, str]
    copy: tuple[str, str] | None
    notes: tuple[str, ...]


def match(
    there: Mapping[str, Held], shape: ModelShape, form: Format, where: Path, config: Mapping[str, Any] | None = None
) -> Match:
    """What of a file's tensors is the model's. `config`: its config.json, for advice.

    Raises UserError, with all problems, unless every tensor of the model is there with a shape that fits, and nothing
    else that could change the model.
    """
    wanted = tensors_of(shape, form)
    names = {name: name for name in wanted if name in there}
    copy = output_copy(shape, form)
    if copy and copy[0] in there and copy[1] not in there:
        names[copy[1]], copy = copy[0], None
    taken = set(names.values())
    rest = {name: held for name, held in there.items() if name not in taken}
    if alike := _as_a_whole(there, rest, set(wanted) - set(names), where, config or {}):
        raise UserError(alike)
    second = (copy[0], names[copy[1]]) if copy and copy[0] in rest and copy[1] in names else None
    kinds = harmless({n: h for n, h in rest.items() if second is None or n != second[0]})
    dropped = {name for found in kinds.values() for name in found} | ({second[0]} if second else set())
    shapes = {names[n]: fit for n, fit in wanted.items() if n in names}
    if second and copy:
        shapes[second[0]] = wanted[copy[1]]
    problems = [
        *_missing(wanted, names, copy, where),
        *(
            f"{where}: {name} {held} is no tensor of this model; is config.json that of this checkpoint?"
            for name, held in rest.items()
            if name not in dropped
        ),
        *(
            f"{where}: {name} is {list(there[name].shape)}, config.json makes it {list(fit[0])}"
            for name, fit in shapes.items()
            if there[name].shape not in fit
        ),
    ]
    if problems:
        raise UserError(bounded(problems, where))
    if (config or {}).get("quantization_config"):
        raise UserError(
            f"{where}: its tensors are plain, and config.json has a quantization_config, by which programs would take "
            "them for others; take that key out"
        )
    return Match(names, second, tuple(_notes(kinds, second, names)))


def _missing(
    wanted: Mapping[str, tuple[Shape, ...]], names: Mapping[str, str], copy: tuple[str, str] | None, where: Path
) -> Iterator[str]:
    for name, fit in wanted.items():
        if name in names:
            continue
        if copy and name == copy[1]:
            mend = f"nor is {copy[0]}, which it is tied to"
        elif name in ("lm_head.weight", "output_layer.weight"):
            mend = (
                "config.json does not tie it to the embedding: set tie_word_embeddings to true if the model does; a "
                "checkpoint of a classifier or of embeddings has none, and is no language model"
            )
        else:
            mend = "is config.json that of this checkpoint?"
        yield f"{where}: {name} {list(fit[0])} is missing; {mend}"


# ------------------------------------------------------------------------------------------- what lies beside the model


def harmless(rest: Mapping[str, Held]) -> dict[str, list[str]]:
    """Of tensors that are not the model's, those that do no harm: the names of each kind."""
    predicts = {m[1] for name in rest if (m := _PREDICTS.fullmatch(name))}
    kinds: dict[str, list[str]] = {"buffers": [], "heads": []}
    for name, held in rest.items():
        if _BUFFERS.fullmatch(name) or (_MASKS.fullmatch(name) and _is_mask(held)):
            kinds["buffers"].append(name)
        elif _HEADS.fullmatch(name) or ((m := _LAYER.match(name)) and m[0] in predicts):
            kinds["heads"].append(name)
    return kinds


def _is_mask(held: Held) -> bool:
    return len(held.shape) == 4 and held.shape[:2] == (1, 1) and held.shape[2] == held.shape[3]


def notes_on(kinds: Mapping[str, list[str]]) -> list[str]:
    """A line for each kind of what is left out."""
    said = {
        "buffers": "buffers, which programs compute anew, were left out",
        "heads": "tensors of heads for training were left out",
    }
    return [f"{len(names)} {said[kind]}: {listed(names, 3)}" for kind, names in kinds.items() if names]


def _notes(kinds: Mapping[str, list[str]], second: tuple[str, str] | None, names: Mapping[str, str]) -> Iterator[str]:
    yield from (f"{held} was taken for {name}, to which it is tied" for name, held in names.items() if name != held)
    if second:
        yield f"{second[0]} is a copy of {second[1]}, to which it is tied: it was left out"
    yield from notes_on(kinds)


# ------------------------------------------------------------------------------------------------ another kind of files


def _as_a_whole(
    there: Mapping[str, Held], rest: Mapping[str, Held], missing: set[str], where: Path, config: Mapping[str, Any]
) -> list[str]:
    """What is said of all tensors at once, in place of a line for each: quantised, an adapter, wrapped."""
    used = {name: held for name, held in there.items() if name not in rest}
    if problems := quantised(used, rest, where, config):
        return problems
    if adapters := [name for name in rest if _ADAPTERS.fullmatch(name)]:
        return [
            f"{where}: {adapters[0]} and {len(adapters)} tensors in all are an adapter's; merge it into its base first "
            "(PeftModel.merge_and_unload) and save the whole model"
        ]
    return _wrapped(rest, missing, where)


def quantised(used: Mapping[str, Held], rest: Mapping[str, Held], where: Path, config: Mapping[str, Any]) -> list[str]:
    """Problems of weights of few bits, the mend with the first. `used` are the model's tensors, `rest` the others."""
    beside = {name for names in harmless(rest).values() for name in names}
    plain = set(COVERED.values())
    found = {n: h for n, h in used.items() if h.dtype not in plain}
    found |= {n: h for n, h in rest.items() if h.dtype not in plain and n not in beside and _OF_WEIGHTS.fullmatch(n)}
    found = found or {n: h for n, h in rest.items() if _SCALES.fullmatch(n)}
    if not found:
        return []
    lines = [f"{where / held.file}: {name} is of type {held.dtype}" for name, held in found.items()]
    lines[0] += f"; only {', '.join(COVERED)} are covered: use the checkpoint that is not quantised{_to_plain(config)}"
    return bounded(lines, where)


def _to_plain(config: Mapping[str, Any]) -> str:
    how = config.get("quantization_config") or config.get("compression_config")
    method = how.get("quant_method") if isinstance(how, Mapping) else None
    if not isinstance(method, str):
        return ""
    if method not in _PLAIN:
        return f" (config.json says {method[:40]})"
    return (
        f", or make it plain: in Python, AutoModelForCausalLM.from_pretrained(FOLDER, {_PLAIN[method]}, "
        "dtype=torch.bfloat16).save_pretrained(NEW)"
    )


def _wrapped(rest: Mapping[str, Held], missing: set[str], where: Path) -> list[str]:
    """Names that a wrapper or a larger model has put something into: what, and how to save the model alone."""
    if not missing:
        return []
    inside = {name: bare for name in rest if (bare := _bare(name)) != name and bare in missing}
    if inside:
        extra = Counter(part for name in inside for part in name.split(".") if part in _WRAPPERS)
        example, words = next(iter(inside)), " and ".join(f"{part}." for part in extra)
        return [
            f"{where}: {example} and {len(inside)} names in all carry {words}, put in by torch.compile or a "
            "parallel wrapper; save the model inside it (model._orig_mod or model.module), or rename the tensors"
        ]
    prefixes = Counter(
        name[: -len(end) - 1] for name in rest for end in _ends(name) if end in missing and _bare(end) == end
    )
    short = sorted(name for name in missing if name.partition(".")[2] in rest)
    if 2 * len(short) > len(missing):
        return [
            f"{where}: {short[-1].partition('.')[2]} and {len(short)} names in all lack {short[-1].partition('.')[0]}. "
            "before them, as of a model without its language head; save the whole one (AutoModelForCausalLM)"
        ]
    if not prefixes:
        return []
    prefix, count = prefixes.most_common(1)[0]
    if 2 * count < len(missing):
        return []
    return [
        f"{where}: {count} of the model's tensors lie under {prefix}., in another model; save that part alone with its "
        "own config.json"
    ]


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _ends(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[i:]) for i in range(1, min(len(parts), 6)))
