"""Finds `recipes/`, `slurm/` and `containers/`, in a checkout or in an installed wheel; and the user's own files."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def data_dir(name: str) -> Path:
    """The folder `recipes`, `slurm` or `containers` that came with this package."""
    checkout = _PACKAGE.parent / name
    return checkout if (_PACKAGE.parent / "pyproject.toml").exists() else _PACKAGE / "_data" / name


def package_dir() -> Path:
    """The folder of the package `launcher` itself."""
    return _PACKAGE


def own_profiles() -> Path:
    """The folder of the user's own cluster profiles."""
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(config, "prism-launch", "clusters")
