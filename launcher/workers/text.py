"""Training text by document: the running interpreter's library, files, or problems with traces."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from launcher.configs import SourceConfig
from launcher.errors import UserError
from launcher.workers.problems import problem_text

#: Parts of the library that are no prose of programs: tests, generated and vendored code.
_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "turtledemo"}
_SUFFIXES = {".txt", ".md", ".py", ".jsonl"}
#: Wrong lines of a file that are named one by one: a corpus may hold millions.
_TOLD = 20


@dataclass(frozen=True)
class Source:
    """The documents of a source and what they came from."""

    documents: tuple[str, ...]
    origin: Mapping[str, Any]


def read_source(name: str, config: SourceConfig, problems: Mapping[str, Sequence[Any]], seed: int) -> Source:
    """The documents of `config`, shuffled by the seed and cut by `share` and `max_bytes`; repeated ones count once.

    Sources of one kind and path (or problem set) with disjoint shares have no document (or problem) in common.
    Raises UserError.
    """
    if config.kind == "problems":
        origin: dict[str, Any] = {"problems": config.problems, "terse_share": config.terse_share}
        rows = {row["prompt"]: row for row in problems[config.problems or ""]}
        chosen = _share(list(rows), config.share, seed)
        # Every source has its own generator, so that the order of the recipe's sources does not matter.
        pick = random.Random(f"{seed}/{name}")
        documents = [problem_text(rows[prompt], pick.random() < config.terse_share) for prompt in chosen]
        different = len(rows)
    else:
        everything = read_documents(config)
        origin = {**everything.origin, "repeated": len(everything.documents) - len(set(everything.documents))}
        documents = _share(everything.documents, config.share, seed)
        different = len(set(everything.documents))
    kept = _up_to(documents, config.max_bytes)
    if not kept:
        raise UserError(f"sources.{name}: no text is left; widen `share` or `max_bytes`")
    return Source(kept, {**origin, "share": list(config.share), "documents_before_share": different})


def _share(documents: Sequence[str], share: tuple[float, float], seed: int) -> list[str]:
    """The part of the different documents between the two bounds, in an order that the seed decides."""
    order = sorted(set(documents))
    random.Random(seed).shuffle(order)
    low, high = (round(bound * len(order)) for bound in share)
    return order[low:high]


def _up_to(documents: Sequence[str], max_bytes: int | None) -> tuple[str, ...]:
    """The first documents, until they have `max_bytes`; the last one whole."""
    if max_bytes is None:
        return tuple(documents)
    kept, size = [], 0
    for document in documents:
        if size >= max_bytes:
            break
        kept.append(document)
        size += len(document.encode())
    return tuple(kept)


def read_documents(config: SourceConfig) -> Source:
    """All documents of a source of kind `python-stdlib` or `files`; read once a process. Raises UserError."""
    return _python_stdlib() if config.kind == "python-stdlib" else _read_files(config.path or "")


@lru_cache
def _python_stdlib() -> Source:
    root = Path(sysconfig.get_paths()["stdlib"])
    documents, digest = [], hashlib.sha256()
    paths = _python_files(root)
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root)}\0{len(content)}\0".encode() + content)
        text = content.decode(errors="ignore")
        if text.strip():
            documents.append(text)
    interpreter = f"{platform.python_implementation()} {platform.python_version()}"
    return Source(tuple(documents), {"interpreter": interpreter, "files": len(paths), "sha256": digest.hexdigest()})


def _python_files(root: Path) -> list[Path]:
    found = []
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name not in _LEFT_OUT]
        found += [Path(folder, file) for file in files if file.endswith(".py")]
    return sorted(found)


@lru_cache
def _read_files(name: str) -> Source:
    path = Path(name)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    wanted = [p for p in files if p.suffix in _SUFFIXES]
    if not wanted:
        raise UserError(f"{path}: {'holds' if path.is_dir() else 'is'} no {', '.join(sorted(_SUFFIXES))} file")
    problems: list[str] = []
    documents = [document for file in wanted for document in _read_file(file, problems)]
    if problems:
        raise UserError(problems)
    return Source(tuple(documents), {"path": name, "files": len(wanted)})


def _read_file(path: Path, problems: list[str]) -> list[str]:
    if not path.is_file():
        problems.append(f"{path}: not a regular file; remove it")
        return []
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        problems.append(f"{path}: not text: byte {error.start} is not UTF-8; remove it or convert it")
        return []
    except OSError as error:
        problems.append(f"{path}: {error.strerror}")
        return []
    if "\0" in text:
        problems.append(f"{path}: not text: it holds null bytes; remove it")
        return []
    if not text.strip():
        problems.append(f"{path}: is empty; remove it")
        return []
    return _read_jsonl(path, text, problems) if path.suffix == ".jsonl" else [text]


def _read_jsonl(path: Path, text: str, problems: list[str]) -> list[str]:
    documents, wrong = [], []
    # Not splitlines(): JSON strings may hold U+2028 and others that it would split at.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            wrong.append(f"{path}:{number}: not JSON: {error}")
            continue
        document = row.get("text") if isinstance(row, dict) else None
        if not isinstance(document, str):
            wrong.append(f"{path}:{number}: expected an object whose key `text` holds text")
        elif not document.strip():
            wrong.append(f"{path}:{number}: its text is blank; remove the line")
        else:
            documents.append(document)
    problems += wrong[:_TOLD]
    if len(wrong) > _TOLD:
        problems.append(f"{path}: {len(wrong) - _TOLD:,} more lines are wrong")
    return documents
