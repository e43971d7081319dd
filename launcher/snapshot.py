"""The code that a run's jobs use, as it was at submission, uncommitted changes included.

ROOT/runs/NAME/snapshot/DIGEST/launcher/        the package; jobs and steps import it from here
ROOT/runs/NAME/snapshot/DIGEST/recipe.yaml      the recipe's file, as it was written
ROOT/runs/NAME/snapshot/DIGEST/snapshot.json    where all that came from: folders, commits, untracked files
ROOT/runs/NAME/snapshot/DIGEST/code.diff        what had not been committed (`git diff HEAD`)

The digest is over the package and the recipe, so a run has one snapshot until one of them changes. A stage keeps the
one that it was submitted with, through every requeue.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import launcher
from launcher import store
from launcher.cluster import Profile
from launcher.errors import UserError, WorldError
from launcher.run_record import RunRecord

_PACKAGE = "launcher"
#: In the package of a wheel: what the login side alone reads.
_LEFT_OUT = {"__pycache__", "_data"}
#: A patch that `git apply` takes, whatever the user's git is set to show.
_DIFF = (
    *("-c", "diff.noprefix=false", "-c", "diff.mnemonicPrefix=false"),
    *("diff", "HEAD", "--binary", "--no-ext-diff", "--no-textconv", "--no-color"),
)


def with_snapshot(root: Path, record: RunRecord, profile: Profile) -> RunRecord:
    """The run with its stages' `snapshot` set to a copy of the code, made where there is none yet.

    The code is the profile's `code` where this machine has that folder, else the package that runs here.
    """
    source = _source(profile)
    files = {f"{_PACKAGE}/{name}": path.read_bytes() for name, path in _package_files(source / _PACKAGE)}
    with contextlib.suppress(OSError):  # piped, or gone since it was read
        files["recipe.yaml"] = Path(record.recipe).read_bytes()
    relative = f"runs/{record.run}/snapshot/{_digest(files)}"
    if not (root / relative).is_dir():
        _write(root / relative, files | _origin(record, source))
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


def _package_files(package: Path) -> Iterator[tuple[str, Path]]:
    for folder, names, files in os.walk(package):
        names[:] = sorted(set(names) - _LEFT_OUT)
        for name in sorted(files):
            path = Path(folder, name)
            if not name.endswith((".pyc", ".pyo")) and path.is_file():
                yield path.relative_to(package).as_posix(), path


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


def _origin(record: RunRecord, source: Path) -> dict[str, bytes]:
    """`snapshot.json`, `code.diff`, and copies of the scripts that stages name as their own `entrypoint`."""
    scripts = dict.fromkeys(Path(e) for s in record.stages if isinstance(e := s.spec.config.get("entrypoint"), str))
    folders = {"launcher": source, "recipe": Path(record.recipe).parent}
    folders |= {f"entrypoint {path}": path.parent for path in scripts}
    repositories = {name: _repository(folder) for name, folder in folders.items()}
    facts = {
        name: {"folder": os.path.abspath(folders[name]), **(_git(top) if top else {})}
        for name, top in repositories.items()
    }
    diffs = [_ask(top, *_DIFF) for top in dict.fromkeys(repositories.values()) if top]
    copies = {f"entrypoint/{i}/{path.name}": path.read_bytes() for i, path in enumerate(scripts) if path.is_file()}
    return {
        "snapshot.json": (json.dumps(facts, indent=2, sort_keys=True) + "\n").encode(),
        "code.diff": "".join(diffs).encode(errors="surrogateescape"),
        **copies,
    }


def _repository(folder: Path) -> Path | None:
    """The top of the git repository that holds a folder."""
    top = _ask(folder, "rev-parse", "--show-toplevel").strip()
    return Path(top) if top else None


def _git(top: Path) -> dict[str, Any]:
    untracked = _ask(top, "ls-files", "--others", "--exclude-standard", "-z").split("\0")
    return {
        "repository": str(top),
        "commit": _ask(top, "rev-parse", "HEAD").strip() or None,
        "untracked": sorted(filter(None, untracked)),
    }


def _ask(folder: Path, *words: str) -> str:
    """What git says; nothing where it is absent, fails or takes long."""
    command = ["git", "-C", str(folder), "-c", "core.fsmonitor=false", *words]
    try:
        done = subprocess.run(command, capture_output=True, timeout=20, stdin=subprocess.DEVNULL, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="surrogateescape") if done.returncode == 0 else ""
