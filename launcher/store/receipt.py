"""The receipt of a whole artifact, and sealing one."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.spec import SpecError, decode, encode
from launcher.store.files import read_json, sha256_of, sync, sync_tree, write_json
from launcher.store.paths import PROGRESS, RECEIPT, partial_dir
from launcher.store.sharing import share_tree

RECEIPT_SCHEMA = 1


@dataclass(frozen=True)
class Receipt:
    """What `artifact.json` says of a whole artifact.

    `files` maps paths inside the artifact to (bytes, sha256). `record` is what the workers wrote about their work
    (verification, versions, figures); `seconds` and `cpu_seconds` sum over attempts.
    """

    kind: str
    kind_version: int
    stage: str
    run: str
    fingerprint: str
    config: Mapping[str, Any]
    seed: int
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]
    files: Mapping[str, tuple[int, str]]
    record: Mapping[str, Any] = field(default_factory=dict)
    created: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_memory_bytes: int = 0
    attempts: int = 1
    made_by: str = ""
    made_on: str = ""
    image: str | None = None
    schema: int = RECEIPT_SCHEMA


def read_receipt(root: Path, artifact: str) -> Receipt | None:
    """The receipt of an artifact that is whole: schema known, every file there with its size. Else None."""
    data = read_json(root / artifact / RECEIPT)
    if not isinstance(data, dict) or data.get("schema") != RECEIPT_SCHEMA:
        return None
    try:
        receipt = decode(Receipt, data)
    except (SpecError, OverflowError):
        return None
    for name, (size, _) in receipt.files.items():
        try:
            if (root / artifact / name).stat().st_size != size:
                return None
        except (OSError, ValueError):  # a name that no file can have
            return None
    return receipt


def receipts(root: Path, kind: str) -> list[Receipt]:
    """What the artifacts of a kind tell of their making, the oldest first; whether their files are still there is not
    looked at."""
    found = []
    for path in (root / "artifacts" / kind).glob(f"*/{RECEIPT}"):
        with contextlib.suppress(SpecError, OSError, OverflowError):
            data = None if "." in path.parent.name else read_json(path)  # .partial, .damaged
            if isinstance(data, dict) and data.get("schema") == RECEIPT_SCHEMA:
                found.append(decode(Receipt, data))
    return sorted(found, key=lambda receipt: receipt.created)


def damaged_files(root: Path, artifact: str, receipt: Receipt) -> list[str]:
    """Files of an artifact whose checksum is no longer the receipt's."""
    return [name for name, (_, digest) in receipt.files.items() if sha256_of(root / artifact / name) != digest]


def read_unsealed(root: Path, artifact: str) -> Receipt | None:
    """The receipt of an artifact that is whole but for its last rename: its maker was killed while sealing."""
    return read_receipt(root, f"{artifact}.partial")


def seal(root: Path, artifact: str, receipt: Receipt) -> None:
    """Make the unfinished artifact whole: receipt, sync, rename. A whole one that is there already is kept.

    The receipt comes first, so that a seal that is cut off anywhere is finished by `seal` alone, without what was in
    progress.
    """
    partial, target = partial_dir(root, artifact), root / artifact
    write_json(partial / RECEIPT, encode(receipt))
    shutil.rmtree(partial / PROGRESS, ignore_errors=True)
    share_tree(partial)
    sync_tree(partial)
    if target.exists() and read_receipt(root, artifact) is not None:
        shutil.rmtree(partial)
    else:
        if target.exists():
            os.replace(target, f"{target}.damaged.{time.time_ns()}")
        os.replace(partial, target)
        sync(target.parent)
