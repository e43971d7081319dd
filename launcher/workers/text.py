"""Training text by document: the running interpreter's library, files, or problems with traces."""

from __future__ import annotations

import hashlib
import json
import platform
import random
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.configs import SourceConfig
from launcher.errors import UserError
from launcher.workers.problems import problem_text

#: Parts of the library that are no prose of programs: tests, generated and vendored code.
_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "turtledemo"}
_SUFFIXES = {".txt", ".md", ".py", ".jsonl"}


@dataclass(frozen=True)
class Source:
    """The documents of a source and what they came from."""

    documents: tuple[str, ...]
    origin: Mapping[str, Any]


def read_source(name: str, config: SourceConfig, problems: Mapping[str, Sequence[Any]], seed: int) -> Source:
    """The documents of `config`, shuffled by the seed and cut by `share` and `max_bytes`.

    Sources of one kind and path with disjoint shares have no document in common. Raises UserError.
    """
    if config.kind == "problems":
        # The order of the recipe's sources must not matter, so every source has its own generator.
        pick = random.Random(f"{seed}/{name}")
        rows = problems[config.problems or ""]
        documents = [problem_text(row, pick.random() < config.terse_share) for row in rows]
        origin: dict[str, Any] = {"problems": config.problems, "terse_share": config.terse_share}
    elif config.kind == "python-stdlib":
        documents, origin = _python_stdlib()
    else:
        documents = _read_files(Path(config.path or ""))
        origin = {"path": config.path}
    kept = _cut(documents, config, seed)
    if not kept:
        raise UserError(f"sources.{name}: no text is left; widen `share` or `max_bytes`")
    return Source(tuple(kept), {**origin, "share": list(config.share), "documents_before_share": len(documents)})


def _cut(documents: list[str], config: SourceConfig, seed: int) -> list[str]:
    order = sorted(documents)
    random.Random(seed).shuffle(order)
    low, high = (round(part * len(order)) for part in config.share)
    kept, size = [], 0
    for document in order[low:high]:
        size += len(document.encode())
        kept.append(document)
        if config.max_bytes is not None and size >= config.max_bytes:
            break
    return kept


def _python_stdlib() -> tuple[list[str], dict[str, Any]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [p for p in sorted(root.rglob("*.py")) if not _LEFT_OUT & set(p.relative_to(root).parts)]
    documents, digest = [], hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root)}\0{len(content)}\0".encode() + content)
        text = content.decode(errors="ignore")
        if text.strip():
            documents.append(text)
    interpreter = f"{platform.python_implementation()} {platform.python_version()}"
    return documents, {"interpreter": interpreter, "files": len(paths), "sha256": digest.hexdigest()}


def _read_files(path: Path) -> list[str]:
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    wanted = [p for p in files if p.suffix in _SUFFIXES]
    if not wanted:
        raise UserError(f"{path}: holds no {', '.join(sorted(_SUFFIXES))} file")
    problems: list[str] = []
    documents = [document for file in wanted for document in _read_file(file, problems)]
    if problems:
        raise UserError(problems)
    return documents


def _read_file(path: Path, problems: list[str]) -> list[str]:
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
    documents = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
            if not isinstance(document, str) or not document.strip():
                raise TypeError("`text` is no text")
            documents.append(document)
        except (ValueError, KeyError, TypeError) as error:
            problems.append(f"{path}:{number}: expected a JSON object with key `text`: {error}")
    return documents
