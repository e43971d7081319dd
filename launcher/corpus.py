"""The files of a folder of text: one walk for who reads them, who checks them and who takes their fingerprint.

Links are followed, to files and to folders. Standard library only.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from launcher.errors import bounded, listed
from launcher.files import pointer_at

#: How a file is read, by the end of its name in small letters; each may be compressed by gzip (.gz).
FORMS = {".json": "json", ".jsonl": "rows", ".ndjson": "rows", ".md": "text", ".py": "text", ".txt": "text"}
_UNPACK = "unpack it, or compress it with gzip"
_REWRITE = "write it as .jsonl with the key `text`"
#: Text in a form that is not read: to leave it out would be to lose it.
_REFUSED = {
    **dict.fromkeys((".zst", ".zstd", ".bz2", ".xz", ".lzma", ".lz4", ".zip", ".tar", ".tgz", ".7z", ".rar"), _UNPACK),
    **dict.fromkeys((".parquet", ".arrow", ".feather", ".orc", ".avro", ".csv", ".tsv"), _REWRITE),
}


@dataclass(frozen=True)
class Walk:
    """Regular files in the order of their names; what is `passed` over and what is `wrong`, each with the reason."""

    files: tuple[Path, ...]
    passed: Mapping[Path, str] = field(default_factory=dict)
    wrong: Mapping[Path, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Corpus:
    """The files that are read, those that are not, with the reason, and what must be mended first."""

    read: tuple[Path, ...]
    passed: Mapping[Path, str]
    problems: tuple[str, ...]


def walk(root: Path) -> Walk:
    """All files of a folder, or the one that `root` is.

    Each folder is looked into once, under its own name before a link's, so links that lead in circles add nothing.
    """
    if not root.is_dir():
        return Walk((root,))
    files: list[Path] = []
    passed: dict[Path, str] = {}
    wrong: dict[Path, str] = {}
    above = {_identity(os.stat(folder)) for folder in root.resolve().parents}
    seen: set[tuple[int, int]] = set()
    folders, links = deque([root]), deque[Path]()
    while folders or links:
        folder = (folders or links).popleft()
        try:
            own, entries = _identity(os.stat(folder)), sorted(os.scandir(folder), key=lambda e: e.name)
        except OSError as error:
            wrong[folder] = f"{error.strerror}; make it readable, or move it elsewhere"
            continue
        if own in above:
            passed[folder] = "a link to a folder that this one lies in"
        if own in above | seen:
            continue
        seen.add(own)
        for entry in entries:
            path = folder / entry.name
            try:
                mode = entry.stat().st_mode
            except OSError as error:
                wrong[path] = f"a link to nothing ({error.strerror}); get what it names, or remove it"
                continue
            if stat.S_ISREG(mode):
                files.append(path)
            elif stat.S_ISDIR(mode):
                (links if entry.is_symlink() else folders).append(path)
            else:
                passed[path] = "not a regular file"
    return Walk(tuple(sorted(files, key=lambda p: p.parts)), passed, wrong)


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def form(path: Path) -> tuple[str | None, bool]:
    """How a file is read, None for not at all; and whether it is compressed."""
    name = path.name.lower()
    packed = name.endswith(".gz")
    return FORMS.get(os.path.splitext(name.removesuffix(".gz"))[1]), packed


def look(path: Path) -> Corpus:
    """What there is to read at a path, by names alone."""
    if not path.exists():
        return Corpus((), {}, (f"{path}: no such file or folder",))
    found = walk(path)
    read, passed, wrong = [], dict(found.passed), dict(found.wrong)
    for file in found.files:
        ending = os.path.splitext(file.name.lower())[1]
        if form(file)[0]:
            if instead := _instead(file):
                wrong[file] = instead
            else:
                read.append(file)
        elif ending in _REFUSED:
            wrong[file] = f"{ending} is not read; {_REFUSED[ending]}, or move it elsewhere"
        elif ending == ".gz" and (inner := os.path.splitext(file.name.lower().removesuffix(".gz"))[1]) in _REFUSED:
            wrong[file] = f"{inner}.gz is not read; {_REFUSED[inner]}, or move it elsewhere"
        elif ending == ".gz":
            wrong[file] = "what is in it cannot be told by its name; name it .jsonl.gz or .txt.gz, or move it elsewhere"
        else:
            passed[file] = f"no {', '.join(FORMS)}"
    problems = [f"{file}: {why}" for file, why in sorted(wrong.items())]
    problems = bounded(problems, path, "more files cannot be read")
    if not read and not problems:
        problems = [f"{path}: {'holds' if path.is_dir() else 'is'} no {', '.join(sorted(FORMS))} file"]
    return Corpus(tuple(read), dict(sorted(passed.items())), tuple(problems))


def _instead(file: Path) -> str | None:
    """Why a file is none that can be read, as far as can be seen without reading all of it."""
    if not file.is_file():
        return "not a regular file; name a file or a folder"
    if not file.stat().st_size:
        return "is empty; remove it"
    try:
        return pointer_at(file)
    except OSError as error:
        return f"{error.strerror}; make it readable, or move it elsewhere"


def told(passed: Mapping[Path, str], root: Path, most: int = 5) -> str:
    """The files that are passed over, in words: how many, and the first of them."""
    names = [shown(path, root) for path in passed]
    return f"{root}: {len(names):,} file{'s' if len(names) != 1 else ''} not read: {listed(names, most)}"


def shown(path: Path, root: Path) -> str:
    """A file's name below `root` as text that can be printed: a name need not be UTF-8."""
    return os.fsencode(path.relative_to(root)).decode(errors="replace")
