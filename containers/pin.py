#!/usr/bin/env python3
"""Writes the versions of `versions.lock` into the ARG lines of the Dockerfiles.

    pin.py            write
    pin.py --check    write nothing; exit 1 with what differs

Needs PyYAML.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parent
#: ARGs that are no versions: how a build is done.
FREE = ("MAX_JOBS", "NVTE_CUDA_ARCHS")
_ARG = re.compile(r"^ARG ([A-Z0-9_]+)=(.*)$", re.MULTILINE)


def read_lock(folder: Path = FOLDER) -> dict[str, Mapping[str, Any]]:
    """The lock: image to its `args` and the `extra` of pyproject.toml that it serves."""
    lock: dict[str, Mapping[str, Any]] = yaml.safe_load((folder / "versions.lock").read_text())
    return lock


def pinned(text: str, args: Mapping[str, str]) -> str:
    """A Dockerfile's text with the lock's values in its ARG lines."""
    return _ARG.sub(lambda found: f"ARG {found[1]}={args.get(found[1], found[2])}", text)


def problems(folder: Path = FOLDER) -> list[str]:
    """What differs between the lock and the Dockerfiles, both ways."""
    lock = read_lock(folder)
    found = []
    defined = {path.parent.name for path in folder.glob("*/Dockerfile")}
    found += [f"{image}: in the lock, but there is no {image}/Dockerfile" for image in sorted(set(lock) - defined)]
    found += [f"{image}/Dockerfile: not in versions.lock" for image in sorted(defined - set(lock))]
    for image in sorted(defined & set(lock)):
        text = (folder / image / "Dockerfile").read_text()
        args, stated = lock[image]["args"], dict(_ARG.findall(text))
        found += [f"{image}: {name} is in the lock, but is no ARG" for name in args if name not in stated]
        found += [f"versions.lock: {image}.{name}: quote {v}" for name, v in args.items() if not isinstance(v, str)]
        for name, value in stated.items():
            if name not in args and name not in FREE:
                found.append(f"{image}/Dockerfile: ARG {name} is not in versions.lock")
            elif name in args and value != args[name]:
                found.append(f"{image}/Dockerfile: ARG {name}={value}, but versions.lock has {args[name]}")
            if not re.search(rf"\$\{{?{name}\b", text) and name not in FREE:
                found.append(f"{image}/Dockerfile: ARG {name} is not used")
    return found


def main(argv: list[str]) -> int:
    """Write or check; returns the exit code."""
    if argv not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    if not argv:
        for image, entry in read_lock().items():
            path = FOLDER / image / "Dockerfile"
            if path.exists():
                path.write_text(pinned(path.read_text(), entry["args"]))
    found = problems()
    for problem in found:
        print(f"containers/{problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
