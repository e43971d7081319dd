"""`cluster init`: look, draft, see that the draft is a profile, write it."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import launcher
from launcher import store
from launcher.cluster import Profile, load_profile, profile_files
from launcher.data import own_profiles
from launcher.errors import UserError
from launcher.site.ask import look
from launcher.site.draft import draft_profile

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def init_profile(name: str | None, output: str | None, force: bool) -> tuple[Profile, Path]:
    """Write a profile of this site; returns it and its file.

    Raises UserError where the name or place does not do, WorldError where Slurm does not answer.
    """
    if name and output:
        raise UserError("give a NAME or -o FILE: a profile is called as its file")
    wanted = _place(name, output) if name or output else None
    if wanted:
        _refuse(wanted, force)
    facts = look(_checkout())
    path = wanted or _place(facts.config.get("ClusterName") or "cluster", None)
    _refuse(path, force)
    text = draft_profile(facts)
    with tempfile.TemporaryDirectory() as folder:
        tried = Path(folder, path.name)
        tried.write_text(text, encoding="utf-8", errors="surrogateescape")
        profile = load_profile(str(tried))
    store.write_atomic(path, text, 0o644)
    return profile, path


def _place(name: str | None, output: str | None) -> Path:
    if output:
        path = Path(output)
        if path.suffix not in (".yaml", ".yml"):
            raise UserError(f"-o {output}: profiles are .yaml files, called by the name before that")
        return path
    assert name is not None
    if not _NAME.fullmatch(name) or name in {p.stem for p in profile_files()}:
        raise UserError(f"{name}: choose another name, of letters, digits and . _ -, that no shipped profile has")
    return own_profiles() / f"{name}.yaml"


def _refuse(path: Path, force: bool) -> None:
    if path.exists() and not force:
        raise UserError(f"{path}: is there already; --force replaces it, another NAME leaves it")


def _checkout() -> str | None:
    """The folder of this package where it is a checkout; None where it is installed."""
    folder = Path(launcher.__file__).resolve().parents[1]
    return str(folder) if (folder / "pyproject.toml").exists() else None
