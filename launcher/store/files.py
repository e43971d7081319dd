"""Files that are written whole or not at all, and read back."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from launcher import corpus
from launcher.store.paths import PROGRESS, RECEIPT
from launcher.store.sharing import share


def write_atomic(path: Path, text: str, mode: int = 0o600) -> None:
    """Write a file whole or not at all: beside its place, synced, then renamed. In a shared root its group may too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, mode)
        share(Path(name))
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> Any | None:
    """The file's value; None where it is absent or not whole JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
        return None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, whose damaged lines, and a half-written last one, count for nothing."""
    rows = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def sync_tree(folder: Path) -> None:
    """Push every file and folder under `folder` to disk, so that a rename after it cannot outrun its content."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in [*names, "."]:
            sync(Path(parent, name))


def sha256_of(path: Path) -> str:
    """The file's SHA-256, read in pieces of 8 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(8 << 20):
            digest.update(piece)
    return digest.hexdigest()


def tree_fingerprint(path: Path) -> str:
    """A digest of the names, sizes and modification times of a file or of all files in a folder, links followed."""
    digest = hashlib.sha256()
    for file in corpus.walk(path).files:
        stat = file.stat()
        line = f"{file.relative_to(path)}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
        digest.update(line.encode(errors="surrogateescape"))  # a name need not be UTF-8
    return digest.hexdigest()[:20]


def list_files(folder: Path) -> dict[str, tuple[int, str]]:
    """Every regular file under `folder` but the receipt and what is in progress: path inside it to (bytes, sha256)."""
    left_out = {RECEIPT, PROGRESS}
    found = sorted(p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).parts[0] not in left_out)
    return {str(p.relative_to(folder)): (p.stat().st_size, sha256_of(p)) for p in found}


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
