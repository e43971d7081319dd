"""Training text by document: the running interpreter's library, files, or problems with traces."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import platform
import random
import sysconfig
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from launcher.configs import AnySource, DatasetSource, FilesSource, ProblemsSource, StdlibSource
from launcher.corpus import form, look, shown, told
from launcher.errors import MOST_SHOWN, UserError
from launcher.files import pointer
from launcher.user_json import bounded, decode, parse, rows
from launcher.workers.problems import Problem, problem_text

#: Parts of the library that are no prose of programs: tests, generated and vendored code.
_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "turtledemo"}
#: Problems of a whole corpus that are told.
_MOST = 3 * MOST_SHOWN


@dataclass(frozen=True)
class Source:
    """The documents of a source and what they came from."""

    documents: tuple[str, ...]
    origin: Mapping[str, Any]


def read_source(name: str, config: AnySource, problems: Mapping[str, Sequence[Problem]], seed: int) -> Source:
    """The documents of `config`, shuffled by the seed and cut by `share` and `max_bytes`; repeated ones count once.

    Sources of one kind and path (or problem set) with disjoint shares have no document (or problem) in common.
    Raises UserError.
    """
    if isinstance(config, ProblemsSource):
        origin: dict[str, Any] = {"problems": config.problems, "terse_share": config.terse_share}
        rows = {row["prompt"]: row for row in problems[config.problems]}
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


def read_documents(config: StdlibSource | FilesSource | DatasetSource) -> Source:
    """All documents of a source of kind `python-stdlib` or `files`; read once a process. Raises UserError."""
    return _python_stdlib() if isinstance(config, StdlibSource) else _read_files(config.path)


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
    corpus = look(path)
    problems = list(corpus.problems)
    documents = [document for file in corpus.read for document in _read_file(file, problems)]
    if len(problems) > _MOST:
        problems[_MOST:] = [f"{path}: {len(problems) - _MOST:,} more files or lines are wrong"]
    if problems:
        raise UserError(problems)
    if corpus.passed:
        print(told(corpus.passed, path))
    origin = {
        "path": name,
        "files": len(corpus.read),
        "bytes": sum(file.stat().st_size for file in corpus.read),
        "documents": len(documents),
        "not_read": {
            "files": len(corpus.passed),
            "bytes": sum(p.stat().st_size for p in corpus.passed if p.is_file()),
            "names": {shown(p, path): why for p, why in list(corpus.passed.items())[:MOST_SHOWN]},
        },
    }
    return Source(tuple(documents), origin)


def _read_file(path: Path, problems: list[str]) -> list[str]:
    reader, packed = form(path)
    if not path.is_file():
        problems.append(f"{path}: not a regular file; remove it")
        return []
    try:
        content = path.read_bytes()
        whole = content if pointer(content) or not packed else gzip.decompress(content)
        text = decode(whole, str(path))
    except UserError as error:
        problems += error.problems
        return []
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        problems.append(f"{path}: not whole in gzip's form ({error}); get it again")
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
    if reader == "text":
        return [text]
    wrong: list[str] = []
    found = rows(text, str(path), wrong) if reader == "rows" else _json_rows(path, text, wrong)
    documents = [document for place, row in found for document in _document(place, row, wrong)]
    problems += bounded(wrong, str(path))
    return documents


def _json_rows(path: Path, text: str, wrong: list[str]) -> Iterable[tuple[str, Any]]:
    """The rows of a .json file: an array of objects, one object, or, as some data sets have it, one a line."""
    first = text.strip().partition("\n")[0]
    try:
        value = parse(text, str(path), strict=True)
    except UserError as error:
        with contextlib.suppress(UserError):
            if isinstance(parse(first, ""), dict):
                return rows(text, str(path), wrong)
        wrong += error.problems
        return ()
    if not isinstance(value, list):
        return [(str(path), value)]
    return ((f"{path}: item {number}", row) for number, row in enumerate(value, 1))


def _document(place: str, row: object, wrong: list[str]) -> list[str]:
    document = row.get("text") if isinstance(row, dict) else None
    if not isinstance(document, str):
        wrong.append(f"{place}: expected an object whose key `text` holds text")
    elif not document.strip():
        wrong.append(f"{place}: its text is blank; remove the line")
    else:
        return [document]
    return []
