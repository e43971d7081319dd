"""The folder `hf/` of a checkpoint in format `megatron`: config.json, generation_config.json and tokenizer files.

They ride along so that a conversion back to Hugging Face's format has them. Standard library only.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.models.families import shape_of
from launcher.models.shape import ModelShape
from launcher.models.side_files import copy_tokenizer
from launcher.models.tokenizer_files import named_tokens, vocabulary
from launcher.user_json import read_object

_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def special_ids(folder: Path) -> dict[str, int]:
    """`bos_token_id`, `eos_token_id` and `pad_token_id`, as far as the tokenizer names them."""
    ids, named = vocabulary(folder), named_tokens(folder)
    wanted = ("bos_token", "eos_token", "pad_token")
    return {f"{role}_id": ids[named[role]] for role in wanted if named.get(role) in ids}


def check_tokenizers(folders: Mapping[str, Path], vocab_size: int) -> None:
    """Refuse tokenizers that differ from each other or do not fit the model. `folders` maps what each is to its folder.

    Raises UserError.
    """
    problems = []
    vocabularies = {name: ids for name, folder in folders.items() if (ids := vocabulary(folder))}
    first = next(iter(vocabularies), "")
    for name, ids in vocabularies.items():
        if ids != vocabularies[first]:
            problems.append(f"{folders[name]}: the tokenizer of {name} is not that of {first} ({folders[first]})")
        if max(ids.values()) >= vocab_size:
            problems.append(
                f"{folders[name]}: the tokenizer of {name} has ids up to {max(ids.values())}, "
                f"the model's vocab_size is {vocab_size}"
            )
    if problems:
        raise UserError(problems)


def check_start(folder: Path, wanted: ModelShape) -> None:
    """Refuse a checkpoint whose config.json describes another model. Raises UserError naming every difference."""
    config = read_object(folder / "config.json")
    if config is None:
        raise UserError(f"{folder / 'config.json'}: not there; is it a checkpoint of format megatron?")
    try:
        found = shape_of(config)
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {problem}" for problem in error.problems) from None
    names = [f.name for f in fields(ModelShape) if getattr(found, f.name) != getattr(wanted, f.name)]
    if names:
        raise UserError(
            f"{folder / 'config.json'}: {name} is {getattr(found, name)}, the stage's model has {getattr(wanted, name)}"
            for name in names
        )


def write(target: Path, source: Path | None, tokenizer: Path | None, config: Mapping[str, Any], precision: str) -> None:
    """Fill `target`: copied from the initial checkpoint's folder `source`, or from the model's config and tokenizer."""
    shutil.rmtree(target, ignore_errors=True)  # an attempt killed here may have left half a file
    target.mkdir(parents=True)
    if source is not None:
        for path in source.iterdir():
            if path.is_file():
                shutil.copyfile(path, target / path.name)
        copy_tokenizer(source, target)
    if tokenizer is not None:
        copy_tokenizer(tokenizer, target)
    ids = special_ids(target)
    known = read_object(target / "config.json") or {**config}
    known = {**ids, **{k: v for k, v in known.items() if k != "torch_dtype"}, "dtype": _DTYPES[precision]}
    _write(target / "config.json", known)
    if ids and not (target / "generation_config.json").exists():
        _write(target / "generation_config.json", ids)


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
