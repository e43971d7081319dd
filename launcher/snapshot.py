"""The code that a run's jobs use, as it was at submission, uncommitted changes included.

ROOT/runs/NAME/snapshot/DIGEST/launcher/        the package; jobs and steps import it from here
ROOT/runs/NAME/snapshot/DIGEST/recipe.yaml      the recipe's file, as it was written
ROOT/runs/NAME/snapshot/DIGEST/snapshot.json    where all that came from: folders, commits, untracked files, and what
                                                was left out, with the reason
ROOT/runs/NAME/snapshot/DIGEST/code.diff        what had not been committed (`git diff HEAD`)

A snapshot may be read by a group, so it holds no hidden file, link, or file that looks like a secret.

The digest is over the package and the recipe, so a run has one snapshot until one of them changes. A stage keeps the
one that it was submitted with, through every requeue.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import launcher
from launcher import store
from launcher.cluster import Profile
from launcher.errors import UserError, WorldError
from launcher.files import read_bytes
from launcher.git import Repository, repository
from launcher.run_record import RunRecord
from launcher.secret_files import holds_secret, holds_token, is_secret_name, secret_values

_PACKAGE = "launcher"
#: In the package of a wheel: what the login side alone reads.
_LEFT_OUT = {"__pycache__", "_data"}
_CALLED = "called as secrets are"
_HOLDS = "holds what looks like a secret"
#: Bytes of a file above which its changes are named only.
_MOST = 8 << 20


def with_snapshot(root: Path, record: RunRecord, profile: Profile) -> RunRecord:
    """The run with its stages' `snapshot` set to a copy of the code, made where there is none yet.

    The code is the profile's `code` where this machine has that folder, else the package that runs here.
    """
    source = _source(profile)
    values = secret_values(secret for stage in record.stages for secret in stage.spec.secrets)
    files, package_left_out = _package(source / _PACKAGE, values)
    left_out = {"launcher": package_left_out, "recipe": {}}
    with contextlib.suppress(OSError, UserError):  # piped, or gone since it was read
        content = read_bytes(Path(record.recipe))
        if holds_secret(content, values):
            left_out["recipe"]["recipe.yaml"] = _HOLDS
        else:
            files["recipe.yaml"] = content
    relative = f"runs/{record.run}/snapshot/{_digest(files)}"
    if not (root / relative).is_dir():
        _write(root / relative, files | _origin(record, source, values, left_out))
    stages = tuple(replace(s, spec=replace(s.spec, snapshot=relative)) for s in record.stages)
    return replace(record, stages=stages)


def refuse_gone(root: Path, record: RunRecord) -> None:
    """Raises UserError where a snapshot that the run was planned with is no longer there."""
    gone = dict.fromkeys(
        str(root / s) for s in (p.spec.snapshot for p in record.stages) if s and not (root / s).is_dir()
    )
    if gone:
        raise UserError(
            f"{path}: the code that the run was planned with is gone; plan it anew with: "
            f"prism-launch run {record.recipe} --name {record.run}"
            for path in gone
        )


def _source(profile: Profile) -> Path:
    here = Path(launcher.__file__).resolve().parents[1]
    theirs = Path(profile.code) if profile.code else here
    return theirs if (theirs / _PACKAGE / "__init__.py").is_file() else here


def _package(package: Path, values: Sequence[bytes]) -> tuple[dict[str, bytes], dict[str, str]]:
    """The package's files by their place in the snapshot, and why others are left out."""
    files: dict[str, bytes] = {}
    left_out: dict[str, str] = {}
    installed_by_links = (package / "__init__.py").is_symlink()
    for name, path in _package_files(package):
        is_code = name.endswith(".py")
        if path.is_symlink() and not (installed_by_links and is_code):
            left_out[name] = "a link"
        elif any(part.startswith(".") for part in Path(name).parts):
            left_out[name] = "hidden"
        elif is_secret_name(name) or holds_token(os.fsencode(name)):
            left_out[_without_token(name)] = _CALLED
        elif path.is_file():
            content = path.read_bytes()
            if is_code or not holds_secret(content, values):
                files[f"{_PACKAGE}/{name}"] = content
            else:
                left_out[name] = _HOLDS
    return files, left_out


def _package_files(package: Path) -> Iterator[tuple[str, Path]]:
    """Files, links, and hidden folders, which are not looked into."""
    for folder, names, files in os.walk(package):
        here = Path(folder)
        unopened = [name for name in names if name.startswith(".") or (here / name).is_symlink()]
        names[:] = sorted({*names} - _LEFT_OUT - {*unopened})
        for name in sorted([*files, *unopened]):
            if not name.endswith((".pyc", ".pyo")):
                yield (here / name).relative_to(package).as_posix(), here / name


def _digest(files: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name}\0{len(content)}\0".encode(errors="surrogateescape") + content)
    return digest.hexdigest()[:16]


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a snapshot, whole or not at all. Another process may be making the same one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, content in files.items():
            path = fresh / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        store.share_tree(fresh)
        store.sync_tree(fresh)
        try:
            os.rename(fresh, folder)
        except OSError as error:
            if not folder.is_dir():
                raise WorldError(f"{folder}: the code snapshot cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------- origin


def _origin(
    record: RunRecord, source: Path, values: Sequence[bytes], left_out: dict[str, dict[str, str]]
) -> dict[str, bytes]:
    """`snapshot.json`, `code.diff`, and copies of the scripts that stages name as their own `entrypoint`."""
    scripts = dict.fromkeys(Path(e) for s in record.stages if isinstance(e := s.spec.config.get("entrypoint"), str))
    folders = {"launcher": source, "recipe": Path(record.recipe).parent}
    folders |= {f"entrypoint {path}": path.parent for path in scripts}
    facts: dict[str, dict[str, Any]] = {}
    diffs: dict[Path, bytes] = {}
    for name, folder in folders.items():
        with repository(folder) as found:
            told, diff = _told(found, values) if found else ({}, b"")
        facts[name] = {"folder": os.path.abspath(folder), **told}
        if found:
            diffs.setdefault(found.top, diff)
    copies = {}
    for i, path in enumerate(scripts):
        content = path.read_bytes() if path.is_file() else None
        if content is not None and holds_secret(content, values):
            left_out[f"entrypoint {path}"] = {path.name: _HOLDS}
        elif content is not None:
            copies[f"entrypoint/{i}/{path.name}"] = content
    for name, reasons in left_out.items():
        facts[name]["left_out"] = reasons
    return {
        "snapshot.json": (json.dumps(facts, indent=2, sort_keys=True) + "\n").encode(),
        "code.diff": b"".join(diffs.values()),
        **copies,
    }


def _told(found: Repository, values: Sequence[bytes]) -> tuple[dict[str, Any], bytes]:
    """What is recorded of a repository, and its uncommitted changes, without those that may hold a secret."""
    changed = found.changed() or []
    filtered = found.filtered(changed)
    reasons = {path: _why_undiffed(found.top / path, path, values, path in filtered) for path in changed}
    diff = found.diff([path for path, why in reasons.items() if why is None])
    if holds_secret(diff, values):  # what is removed is shown too, and no longer in the file
        pieces = {path: found.diff([path]) for path, why in reasons.items() if why is None}
        reasons |= dict.fromkeys((p for p, piece in pieces.items() if holds_secret(piece, values)), _HOLDS)
        diff = b"".join(piece for path, piece in pieces.items() if reasons[path] is None)
    facts = {
        "repository": str(found.top),
        "commit": found.commit,
        "untracked": [_without_token(path) for path in found.untracked()],
        "left_out_of_diff": {_without_token(path): why for path, why in reasons.items() if why is not None},
    }
    return facts, diff


def _without_token(path: str) -> str:
    """The path, with what looks like a secret itself in it unnamed."""
    parts = ("(a name that looks like a secret)" if holds_token(os.fsencode(p)) else p for p in path.split("/"))
    return "/".join(parts)


def _why_undiffed(file: Path, path: str, values: Sequence[bytes], is_filtered: bool) -> str | None:
    """Why the changes of a file are named only; None where they may be shown."""
    if is_secret_name(path) or holds_token(os.fsencode(path)):
        return _CALLED
    if is_filtered:
        return "a filter stands between this file and its repository"
    if file.is_symlink() or not file.is_file():  # of a link, git shows where it leads
        return None
    if file.stat().st_size > _MOST:
        return f"larger than {_MOST >> 20} MiB"
    return _HOLDS if holds_secret(file.read_bytes(), values) else None
