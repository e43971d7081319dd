"""What tests on the dev cluster share: submitting, asking and waiting."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from launcher.devcluster.cluster import DevCluster

CHECKOUT = Path(__file__).resolve().parents[2]

#: `prism-launch ARGS…` as a process of its own; keywords are variables of its environment.
Prism = Callable[..., "subprocess.CompletedProcess[str]"]


def lacking(reason: str) -> NoReturn:
    """Skip, saying why; in continuous integration nothing may be lacking."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def until(ready: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait for something that Slurm does in its own time."""
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.2)


def submit(on: DevCluster, *options: str, script: str) -> str:
    """Submit a script; returns the job id."""
    return on.call("sbatch", "--parsable", "--output=/dev/null", *options, f"--wrap={script}").strip()


def state(on: DevCluster, job: str) -> str:
    return on.call("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}").strip()


def shown(on: DevCluster, job: str) -> dict[str, str]:
    """What `scontrol show job` says."""
    words = on.call("scontrol", "--oneliner", "show", "job", job).split()
    return dict(word.split("=", 1) for word in words if "=" in word)
