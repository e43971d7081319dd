"""A Docker that answers: the one that is there, or one of our own, ended after the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
BARE, CPU = "prism-launch-bare:test", "prism-launch-cpu:test"


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


def answers() -> bool:
    return call("docker", "version", "--format={{.Server.Version}}", check=False).returncode == 0


@pytest.fixture(scope="session")
def docker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """`docker` reaches a daemon. It skips where there is none and none can be started."""
    if shutil.which("docker") is None:
        lacking("docker is not installed; Debian's package docker.io has it")
    if answers():
        yield
        return
    if os.geteuid() != 0 or shutil.which("dockerd") is None:
        lacking("no Docker daemon answers, and only root can start one (dockerd, of Debian's package docker.io)")
    folder = tmp_path_factory.mktemp("dockerd")
    socket = f"unix://{folder}/socket"
    options = [f"--{name}-root={folder}/{name}" for name in ("data", "exec")]
    # No bridge: the containers use this machine's network, and its firewall stays as it is.
    options += ["--bridge=none", "--iptables=false", "--ip6tables=false", f"--pidfile={folder}/pid", f"--host={socket}"]
    with (folder / "log").open("wb") as log, pytest.MonkeyPatch.context() as patch:
        daemon = subprocess.Popen(["dockerd", *options], stdout=log, stderr=log, start_new_session=True)
        patch.setenv("DOCKER_HOST", socket)
        try:
            _wait(daemon, folder / "log")
            yield
        finally:
            daemon.terminate()
            daemon.wait(timeout=60)
            shutil.rmtree(folder, ignore_errors=True)


def _wait(daemon: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 60
    while not answers():
        if daemon.poll() is not None or time.monotonic() > end:
            lacking(f"dockerd does not start here: {log.read_text()[-1000:]}")
        time.sleep(0.2)


@pytest.fixture(scope="session")
def bare_image(docker: None) -> Iterator[str]:
    """An image with Python alone."""
    build("--bare", "--docker", BARE)
    yield BARE
    call("docker", "image", "rm", "--force", BARE)


@pytest.fixture(scope="session")
def cpu_image(docker: None) -> Iterator[str]:
    """The `cpu` image, of this interpreter's packages."""
    build("--docker", CPU)
    yield CPU
    call("docker", "image", "rm", "--force", CPU)


def build(*options: str) -> None:
    call(sys.executable, str(CHECKOUT / "containers" / "build_here.py"), *options)
