"""What surrounds the tensors of a checkpoint: its config, the files carried along, room on the disk, the new folder."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from launcher.convert.links import Target
from launcher.convert.torch_dist import TRACKER
from launcher.errors import UserError, WorldError
from launcher.models.families import shape_of
from launcher.models.shape import ModelShape
from launcher.store import sync_tree

#: Where a checkpoint of format `megatron` keeps config.json and the tokenizer.
CARRIED = "hf"
#: Files of a Hugging Face folder that are neither weights nor code.
_SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


def side_folder(folder: Path, to: Target) -> Path:
    """The folder with config.json of a checkpoint that becomes `to`. Raises UserError where it is none of the kind."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if to == "megatron" and (folder / TRACKER).is_file():
        raise UserError(f"{folder}: is in format megatron already; convert it to hf")
    if to == "hf" and not (folder / TRACKER).is_file():
        raise UserError(f"{folder}: not of format megatron; no {TRACKER} is there")
    return folder if to == "megatron" else folder / CARRIED


def read_shape(folder: Path) -> ModelShape:
    """The model that a folder's config.json describes. Raises UserError."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; put the model's config.json there") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); get the file again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a config.json of a model; get the file again")
    try:
        return shape_of(config)
    except UserError as error:
        raise UserError(f"{path}: {problem}" for problem in error.problems) from None


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy config, generation config and tokenizer; returns their names."""
    target.mkdir(exist_ok=True)
    names = sorted({path.name for pattern in _SIDE_FILES for path in source.glob(pattern) if path.is_file()})
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def check_room(folder: Path, needed: int) -> None:
    """Raises WorldError where the disk of `folder` has no room for so many bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise WorldError(
            f"{folder}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; "
            "free some room, or write to another disk"
        )


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder `target` that is there whole or not at all: filled as `TARGET.partial`, synced, renamed.

    Raises UserError where the target has content or cannot be written.
    """
    target = Path(os.path.abspath(target))
    if not target.name:
        raise UserError(f"{target}: is there already; name a new folder")
    partial = target.with_name(f"{target.name}.partial")
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"{target}: is there already; name a new folder")
        partial.mkdir(parents=True)
    except FileExistsError:
        raise UserError(
            f"{partial}: another conversion is writing it, or was cut off; remove the folder if none is running"
        ) from None
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror}; name another folder") from None
    try:
        yield partial
        sync_tree(partial)
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
