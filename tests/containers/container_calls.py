"""What tests of containers share: programs called, images built, skips with their reason."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]


def lacking(reason: str) -> NoReturn:
    """Skip, saying why; in continuous integration nothing may be lacking."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def call(*argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)
    if check and done.returncode:
        pytest.fail(f"{argv}: exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done


def build(*options: str) -> None:
    call(sys.executable, str(CHECKOUT / "containers" / "build_here.py"), *options)
