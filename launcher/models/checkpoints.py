"""Whether a checkpoint in a folder can be used, by what its files say of themselves: in milliseconds, before a job.

The sentences are those of the jobs, which look with the same functions. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.models import torch_dist
from launcher.models.families import FAMILIES
from launcher.models.formats import NEMO_CONFIG, NEMO_PREFIX, NEMO_WEIGHTS, Format, nemo_problems
from launcher.models.headers import (
    INDEX,
    MOST_CONFIG,
    adapter_problem,
    parse_config,
    read_config,
    read_headers,
    shape_in,
)
from launcher.models.matching import match
from launcher.models.shape import ModelShape
from launcher.models.side_files import TEMPLATES, side_files
from launcher.models.spans import Files, directly_in, in_tar

#: Where the formats `megatron` and `nemo` keep config.json and the tokenizer.
CARRIED = "hf"


def look_at(path: Path) -> tuple[Format, Files]:
    """The format of a checkpoint, a folder or an archive, and its files. Raises UserError where it is none."""
    if path.is_file():
        return "nemo", in_tar(path)
    if not path.is_dir():
        raise UserError(f"{path}: {'neither a folder nor a file' if path.exists() else 'no such folder'}")
    try:
        files = directly_in(path, CARRIED, NEMO_WEIGHTS, TEMPLATES, f"{CARRIED}/{TEMPLATES}")
    except OSError as error:
        raise UserError(_unreadable(error, path)) from None
    if ".metadata" in files and re.fullmatch(rf"{torch_dist.RELEASE}|iter_\d+", path.resolve().name):
        raise UserError(
            f"{path}: an iteration of a checkpoint of format megatron; name the folder with its {torch_dist.TRACKER}"
        )
    for folder in (path, path / CARRIED):
        if folder.is_dir():
            side_files(folder)  # raises for what is named like a file that travels and is none
    if torch_dist.TRACKER in files:
        return "megatron", files
    if NEMO_CONFIG in files or f"{NEMO_WEIGHTS}/.metadata" in files or ".metadata" in files:
        return "nemo", files
    if "config.json" not in files and (problem := adapter_problem(path)):
        raise UserError(problem)
    if "config.json" in files or INDEX in files or any(name.endswith(".safetensors") for name in files):
        return "hf", files
    raise UserError(
        f"{path}: no checkpoint: neither config.json (hf), {torch_dist.TRACKER} (megatron) nor {NEMO_CONFIG} (nemo) "
        "is there"
    )


def format_of(path: Path) -> Format:
    """The format of what holds a checkpoint; hf where it holds none."""
    try:
        return look_at(path)[0]
    except UserError:
        return "nemo" if path.is_file() else "hf"


def carried_in(folder: Path) -> Path:
    """Where a checkpoint has config.json and the tokenizer."""
    return folder if format_of(folder) == "hf" else folder / CARRIED


def weights_in(path: Path, files: Files) -> tuple[Path, Files]:
    """Where a checkpoint of format nemo has its weights, and the files of them."""
    inside = f"{NEMO_WEIGHTS}/"
    weights = {n.removeprefix(inside): s for n, s in files.items() if n.startswith(inside)}
    return (path / NEMO_WEIGHTS, weights) if weights else (path, {n: s for n, s in files.items() if "/" not in n})


def carried_config(path: Path) -> dict[str, Any] | None:
    """The config.json of a checkpoint; None where there is none. Raises UserError."""
    form, files = look_at(path)
    name = "config.json" if form == "hf" else f"{CARRIED}/config.json"
    return parse_config(files[name].read(MOST_CONFIG + 1), path / name) if name in files else None


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
    form, files = look_at(folder)
    carried = folder if form == "hf" else folder / CARRIED
    config = carried_config(folder) if form != "hf" else read_config(folder)
    if config is None:
        by_hand = f", or convert it first: prism-launch convert {folder} NEW --to hf --config FOLDER_WITH_CONFIG"
        yield f"{folder}: no {CARRIED}/config.json in it; put the model's there{by_hand if form == 'nemo' else ''}"
        return
    shape = shape_in(config, carried / "config.json")
    if to == "nemo":
        yield from (f"{folder}: {problem}" for problem in nemo_problems(shape, fold=False))
    if wanted is not None:
        yield from differences(shape, wanted, carried / "config.json")
    where, held = folder, read_headers(folder) if form == "hf" else {}
    if form == "megatron":
        where = torch_dist.checkpoint_dir(folder)
        held = torch_dist.read_held(where)
    if form == "nemo":
        where, weights = weights_in(folder, files)
        torch_dist.check_backend(where, weights)
        held = torch_dist.read_held(where, weights, NEMO_PREFIX)
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
