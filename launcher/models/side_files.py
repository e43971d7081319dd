"""Files of a Hugging Face folder that travel with a model's weights. Standard library only."""

from __future__ import annotations

import codecs
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

from launcher.errors import UserError
from launcher.files import link_to_nothing

#: The folder of further chat templates, of which every .jinja file is one.
TEMPLATES = "additional_chat_templates"
#: All that a tokenizer is made of, whatever library wrote it. Paths inside the folder.
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    f"{TEMPLATES}/*.jinja",
    "vocab*.json",
    "vocab.txt",
    "vocab.bpe",
    "encoder.json",
    "merges.txt",
    "tekken.json",
    "*.model",
    "*.model.v?",
    "*.tiktoken",
    "*.spm",
)
_CONFIGS = ("config.json", "generation_config.json")
_CODE = (".py", ".pyc")


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of that path inside the folder is part of a tokenizer."""
    inside = f"{TEMPLATES}/" if name.startswith(f"{TEMPLATES}/") else ""
    if "/" in name.removeprefix(inside) or name.endswith(_CODE):
        return False
    return any(fnmatchcase(name, pattern) for pattern in _TOKENIZER)


def is_side_file(name: str) -> bool:
    """Whether a file of that path inside the folder is carried along: neither weights nor code."""
    return name in _CONFIGS or is_tokenizer_file(name)


def side_files(folder: Path) -> dict[str, Path]:
    """The files of a folder that are carried along, by their paths inside it. Raises UserError for one that is none."""
    found = [*folder.iterdir(), *((folder / TEMPLATES).iterdir() if (folder / TEMPLATES).is_dir() else ())]
    names = {path.relative_to(folder).as_posix(): path for path in sorted(found)}
    wanted = {name: path for name, path in names.items() if is_side_file(name) and not path.is_dir()}
    if wrong := [path for path in wanted.values() if not path.is_file()]:
        raise UserError(f"{path}: {link_to_nothing(path) or 'not a regular file; take it away'}" for path in wrong)
    return wanted


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy what a tokenizer is made of, but for what `target` has already; returns the names of what was copied."""
    wanted = [n for n in side_files(source) if is_tokenizer_file(n) and not (target / n).exists()]
    for name in wanted:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".json"):  # with a byte order mark no library would read it
            (target / name).write_bytes((source / name).read_bytes().removeprefix(codecs.BOM_UTF8))
        else:
            shutil.copyfile(source / name, target / name)
    return wanted
