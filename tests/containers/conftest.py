"""A Docker that answers: the one that is there, or one of our own, ended after the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from container_calls import build, call, lacking

BARE, CPU = "prism-launch-bare:test", "prism-launch-cpu:test"


def answers() -> bool:
    return call("docker", "version", "--format={{.Server.Version}}", check=False).returncode == 0


@pytest.fixture(scope="session")
def docker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[bool]:
    """`docker` reaches a daemon; whether that ends with the tests. Skips where none can be had."""
    if shutil.which("docker") is None:
        lacking("docker is not installed; Debian's package docker.io has it")
    if answers():
        yield False
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
            yield True
        finally:
            daemon.terminate()
            daemon.wait(timeout=60)
            call("umount", str(folder / "exec" / "netns" / "default"), check=False)  # which it leaves behind
            call("rm", "-rf", str(folder), check=False)


def _wait(daemon: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 60
    while not answers():
        if daemon.poll() is not None or time.monotonic() > end:
            lacking(f"dockerd does not start here: {log.read_text()[-1000:]}")
        time.sleep(0.2)


@pytest.fixture(scope="session")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A podman that keeps its images and containers in a folder of the tests'."""
    if shutil.which("podman") is None or shutil.which("catatonit") is None:
        lacking("podman or catatonit is not installed; Debian's packages of these names have them")
    folder = tmp_path_factory.mktemp("podman")
    # Limits that need no further rights; runc, because crun refuses control groups of both versions at once.
    runtime = 'runtime = "runc"\n' if shutil.which("runc") else ""
    limits = 'default_ulimits = ["nofile=1024:4096", "nproc=4096:4096"]\n'
    (folder / "containers.conf").write_text(f"[containers]\n{limits}[engine]\n{runtime}")
    (folder / "storage.conf").write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/g"\nrunroot = "{folder}/r"\n'
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTAINERS_CONF", str(folder / "containers.conf"))
        patch.setenv("CONTAINERS_STORAGE_CONF", str(folder / "storage.conf"))
        yield
        call("podman", "system", "reset", "--force", check=False)


@pytest.fixture(scope="session", params=["docker", "podman"])
def engine(request: pytest.FixtureRequest) -> str:
    """The program that runs containers."""
    request.getfixturevalue(request.param)
    return str(request.param)


@pytest.fixture(scope="session")
def bare_image(engine: str) -> Iterator[str]:
    """An image with Python alone."""
    build("--bare", f"--{engine}", BARE)
    yield f"localhost/{BARE}" if engine == "podman" else BARE
    call(engine, "image", "rm", "--force", BARE, check=False)


@pytest.fixture(scope="session")
def small_torch() -> None:
    """Skips where the packages would make an image of several GB: it takes minutes to build."""
    if "+cpu" not in version("torch"):
        pytest.skip(f"torch {version('torch')} is not the small build for CPUs")


@pytest.fixture(scope="session")
def cpu_image(small_torch: None, docker: bool) -> Iterator[str]:
    """The `cpu` image, of this interpreter's packages."""
    build("--docker", CPU)
    yield CPU
    if not docker:
        call("docker", "image", "rm", "--force", CPU)
