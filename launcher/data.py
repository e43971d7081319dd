"""Finds `recipes/`, `slurm/` and `containers/`, in a checkout or in an installed wheel; and the user's own files."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from pathlib import Path
from urllib.parse import unquote

_PACKAGE = Path(__file__).resolve().parent


def data_dir(name: str) -> Path:
    """The folder `recipes`, `slurm` or `containers` that came with this package."""
    checkout = _PACKAGE.parent / name
    return checkout if (_PACKAGE.parent / "pyproject.toml").exists() else _PACKAGE / "_data" / name


def package_dir() -> Path:
    """The folder of the package `launcher` itself."""
    return _PACKAGE


def install_command(extra: str) -> str:
    """What installs an extra's packages into this interpreter. This package is in no index, so its place is named.

    Where that is gone, the packages themselves are.
    """
    pip = f"{shlex.quote(sys.executable)} -m pip install"
    if (_PACKAGE.parent / "pyproject.toml").exists():
        return f"{pip} -e {shlex.quote(f'{_PACKAGE.parent}[{extra}]')}"
    from importlib import metadata

    try:
        installed = metadata.distribution("prism-launch")
    except metadata.PackageNotFoundError:
        return f"{pip} '.[{extra}]' in a checkout of prism-launch"
    url = str(json.loads(installed.read_text("direct_url.json") or "{}").get("url", ""))
    source = unquote(url.removeprefix("file://"))
    if url.startswith("file://") and os.path.exists(source):
        return f"{pip} {shlex.quote(f'{source}[{extra}]')}"
    wanted = (line.partition(";") for line in installed.requires or ())
    names = [name.strip() for name, _, when in wanted if re.search(rf"extra *== *['\"]{re.escape(extra)}['\"]", when)]
    return f"{pip} {' '.join(map(shlex.quote, names))}"


def own_profiles() -> Path:
    """The folder of the user's own cluster profiles."""
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(config, "prism-launch", "clusters")
