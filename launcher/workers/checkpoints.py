"""Hugging Face checkpoints as the workers load them: from a folder, never from a network, with clear refusals."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import MOST_SHOWN, UserError
from launcher.models.side_files import copy_tokenizer
from launcher.store import write_json
from launcher.user_json import read_object
from launcher.workers.devices import require_cuda

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

#: What a config.json may say of how a model is run, and how a stage runs it. Dropout is none.
_RUN = {"use_cache": True, "output_attentions": False, "output_hidden_states": False, "return_dict": True}
#: Keys of a generation_config.json that say nothing of how words are chosen.
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config")


@dataclass(frozen=True)
class Loaded:
    """A model and its tokenizer. `set_aside` says which settings of the files count for nothing here.

    `config` and `generation` are what the files say in their place, for a checkpoint that is made of this one.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    set_aside: tuple[str, ...]
    config: Mapping[str, Any]
    generation: Mapping[str, Any]


def load_model(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder, as `load_checkpoint` loads them."""
    found = load_checkpoint(folder)
    return found.model, found.tokenizer


def load_checkpoint(folder: Path, described_in: Path | None = None) -> Loaded:
    """Model (fp32, evaluation mode, on the GPU where there is one) and tokenizer of a folder.

    Completions end at the tokenizer's end token, and words are chosen as the caller says, whatever its
    generation_config.json says. Config and tokenizer are those of `described_in`, if given. Raises UserError where the
    folder is no whole checkpoint.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    side = described_in or folder
    raw = read_object(side / "config.json")
    if raw is None:
        raise UserError(f"{folder}: no config.json; a Hugging Face checkpoint is wanted")
    generation = read_object(side / "generation_config.json") or {}
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, GenerationConfig

    from launcher.workers.tokenizer import load

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    _tell_beside(folder)
    try:
        tokenizer, set_aside = load(side)
        config, instead = _config(raw)
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            generation_config=GenerationConfig(),
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError, StrictDataclassError) as error:
        raise UserError(f"{folder}: transformers cannot load it: {error}") from None
    # transformers fills what is missing with random numbers and only warns.
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"{folder}: not whole: {missing[0]} and {len(missing)} tensors in all are missing")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(f"{folder}: {len(tokenizer)} tokens in the tokenizer, {model.config.vocab_size} in the model")
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(**ends)
    told = (
        *set_aside,
        *(f"config.json: {key}: {value}" for key, value in instead.items()),
        *_of_generation(generation, tokenizer.eos_token_id),
    )
    place = "cuda" if require_cuda() else "cpu"
    return Loaded(model.eval().to(place), tokenizer, told, instead, {**generation, **ends})


def _config(raw: Mapping[str, Any]) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The model's config as stages run it, and what it says itself in the places that were changed."""
    from transformers import AutoConfig, GenerationConfig

    with tempfile.TemporaryDirectory() as own:  # transformers reads no byte order mark, our reader does
        Path(own, "config.json").write_text(json.dumps(raw), encoding="utf-8")
        config = AutoConfig.from_pretrained(own, local_files_only=True)
    wanted = {key: value for key, value in _RUN.items() if getattr(config, key, value) != value}
    wanted |= {key: 0.0 for key, value in config.to_dict().items() if _is_dropout(key) and value}
    chooses = GenerationConfig().to_dict().keys() - _RUN.keys() - set(_IDS) - {f.name for f in fields(config)}
    wanted |= {key: None for key in chooses if raw.get(key) is not None}
    instead = {key: raw[key] if key in raw else getattr(config, key) for key in sorted(wanted)}
    for key, value in wanted.items():
        if hasattr(config, key):  # transformers leaves some of them out itself
            setattr(config, key, value)
    return config, instead


def _is_dropout(key: str) -> bool:
    return "dropout" in key or key.endswith("pdrop")


def _of_generation(generation: Mapping[str, Any], end: int) -> list[str]:
    """The settings of a generation_config.json that count for nothing."""
    kept = {key: value for key, value in generation.items() if key not in _IDS and value is not None}
    found = [f"generation_config.json: {key}: {value}" for key, value in sorted(kept.items())]
    if generation.get("eos_token_id", end) not in (end, [end]):
        found.insert(0, f"generation_config.json: eos_token_id: {generation['eos_token_id']}; completions end at {end}")
    return found[:MOST_SHOWN]


def save_checkpoint(loaded: Loaded, source: Path, target: Path) -> None:
    """Write a model that was loaded from `source` and trained: config and tokenizer as they are there.

    Its generation_config.json ends completions where training did, and is otherwise that of `source`.
    """
    loaded.model.save_pretrained(target)
    kept = {key: value for key, value in loaded.config.items() if key in _RUN or _is_dropout(key)}
    if kept:
        write_json(target / "config.json", {**(read_object(target / "config.json") or {}), **kept})
    write_json(target / "generation_config.json", dict(loaded.generation))
    copy_tokenizer(source, target)


def _tell_beside(folder: Path) -> None:
    """Print what the folder holds beside the model; transformers drops it without a word. Raises UserError."""
    from launcher.convert.folders import check_beside

    for note in check_beside(folder):
        print(f"{folder}: {note}", flush=True)


def quiet() -> None:
    """Keep progress bars and notes to programmers of the libraries out of the logs."""
    import warnings

    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
