"""One dev cluster for all tests under this folder: a real Slurm of four nodes with eight fake GPUs each."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from on_slurm import CHECKOUT, Prism, lacking

from launcher.devcluster import boot, cluster, config, daemons
from launcher.devcluster.cluster import DevCluster


@pytest.fixture(scope="session")
def slurm_packages() -> None:
    """Skips where the machine has no Slurm."""
    absent = daemons.absent(boot.PROGRAMS)
    if absent:
        lacking(f"{', '.join(absent)} not installed; as root: {config.install_command()}")


@pytest.fixture(scope="session")
def prism(tmp_path_factory: pytest.TempPathFactory) -> Prism:
    """Runs `prism-launch ARGS…` as a user with an empty configuration would."""
    own = tmp_path_factory.mktemp("config")

    def run(*args: str, **variables: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": str(CHECKOUT), "XDG_CONFIG_HOME": str(own), **variables}
        command = [sys.executable, "-m", "launcher.cli", *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=CHECKOUT, env=env, check=False)

    return run


@pytest.fixture(scope="session")
def devcluster(slurm_packages: None, prism: Prism, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevCluster]:
    """The cluster that all tests share; whoever breaks a part of it mends it."""
    folder = tmp_path_factory.mktemp("devcluster")
    done = prism("devcluster", "up", "--dir", str(folder))
    assert done.returncode == 0, done.stderr
    running = cluster.find(folder)
    assert running is not None
    yield running
    done = prism("devcluster", "down", "--dir", str(folder))
    assert done.returncode == 0, done.stderr
