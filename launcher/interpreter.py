"""How a module of ours is started in a Python of its own: never with what lies in the folder of the shell."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

#: For Python 3.10, which has no -P: what -m would put first is taken away before anything is imported.
_WITHOUT_FOLDER = (
    "import sys; sys.path.remove(''); import runpy; runpy.run_module(sys.argv.pop(1), None, '__main__', True)"
)


def module_command(module: str, *words: str, version: tuple[int, int] = sys.version_info[:2]) -> list[str]:
    """The command that runs a module by this interpreter, whatever `yaml.py` or `launcher/` lies where it starts."""
    if version >= (3, 11):
        return [sys.executable, "-P", "-m", module, *words]
    return [sys.executable, "-c", _WITHOUT_FOLDER, module, *words]


def module_environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """The variables for it: this package first, and no empty entry of PYTHONPATH, which is the current folder."""
    ours = str(Path(__file__).resolve().parents[1])
    others = [path for path in inherited.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {**inherited, "PYTHONPATH": os.pathsep.join([ours, *others])}
