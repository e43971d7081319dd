"""Whether a checkpoint in a folder can be used, by what its files say of themselves: in milliseconds, before a job.

The sentences are those of the jobs, which look with the same functions. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from launcher.errors import UserError
from launcher.models import torch_dist
from launcher.models.families import FAMILIES
from launcher.models.formats import Format, nemo_problems
from launcher.models.headers import read_config, read_headers, shape_in
from launcher.models.matching import match
from launcher.models.shape import ModelShape

#: Where the formats `megatron` and `nemo` keep config.json and the tokenizer.
CARRIED = "hf"


def format_of(folder: Path) -> Format:
    """The format of a folder that holds a checkpoint of format hf or megatron."""
    return "megatron" if (folder / torch_dist.TRACKER).exists() else "hf"


def carried_in(folder: Path) -> Path:
    """Where such a folder has config.json and the tokenizer."""
    return folder if format_of(folder) == "hf" else folder / CARRIED


def obstacles(folder: Path, to: str | None = None, wanted: ModelShape | None = None) -> list[str]:
    """Why a checkpoint cannot be converted to another format (`to`), trained or merged.

    `wanted`: the model that it must be of.
    """
    found: list[str] = []
    try:
        for problem in _obstacles(folder, to, wanted):
            found.append(problem)
    except UserError as error:
        found += error.problems
    except OSError as error:
        found.append(_unreadable(error, folder))
    return found


def _unreadable(error: OSError, folder: Path) -> str:
    return f"{error.filename or folder}: {error.strerror}; make it readable, or copy it"


def _obstacles(folder: Path, to: str | None, wanted: ModelShape | None) -> Iterator[str]:
    form = format_of(folder)
    carried = carried_in(folder)
    if form == "megatron" and not (carried / "config.json").is_file():
        yield f"{folder}: no {CARRIED}/config.json in it; put the model's there"
        return
    config = read_config(carried)
    shape = shape_in(config, carried / "config.json")
    if to == "nemo":
        yield from (f"{folder}: {problem}" for problem in nemo_problems(shape, fold=False))
    if wanted is not None:
        yield from differences(shape, wanted, carried / "config.json")
    where = folder if form == "hf" else torch_dist.checkpoint_dir(folder)
    held = read_headers(folder) if form == "hf" else torch_dist.read_held(where)
    if held:
        match(held, shape, form, where, config)


def differences(found: ModelShape, wanted: ModelShape, where: Path) -> Iterator[str]:
    """What a config.json says of the model and a stage otherwise."""
    for name in (field.name for field in fields(ModelShape)):
        if getattr(found, name) != getattr(wanted, name):
            yield f"{where}: {name} is {getattr(found, name)}, the stage's model has {getattr(wanted, name)}"


def unreadable(folder: Path, to_train: bool) -> list[str]:
    """Why transformers cannot load a folder, or not `to_train` it: files that are cut short, tensors that are missing.

    It knows more families than this project; of those no more than the files is looked at.
    """
    try:
        read_headers(folder)
        config = read_config(folder)
    except UserError as error:
        return list(error.problems)
    except OSError as error:
        return [_unreadable(error, folder)]
    if config.get("model_type") not in FAMILIES or ("quantization_config" in config and not to_train):
        return []
    try:
        shape_in(config, folder)
    except UserError:  # transformers may know how
        return []
    return obstacles(folder)
