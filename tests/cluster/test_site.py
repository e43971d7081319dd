"""`cluster init` and `cluster test` on a real Slurm: the dev cluster itself, and faults made on it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from on_slurm import CHECKOUT, Prism, lacking, state, until

from launcher.cluster import load_profile
from launcher.devcluster import nodes
from launcher.devcluster.cluster import DevCluster
from launcher.site.trial import find_trial

#: Without torch, so that imports cost nothing.
BARE = os.path.realpath(sys.executable)


@pytest.fixture
def site(devcluster: DevCluster, prism: Prism, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A profile that `cluster init` wrote."""
    monkeypatch.setenv("SLURM_CONF", str(devcluster.slurm_conf))
    path = tmp_path / "site.yaml"
    done = prism("cluster", "init", "-o", str(path))
    assert done.returncode == 0, done.stderr
    path.write_text(path.read_text() + "poll_s: 0.5\n")
    return path


def changed(path: Path, **keys: str) -> Path:
    """The profile with other values, as a file beside it."""
    lines = [line for line in path.read_text().splitlines() if line.partition(":")[0] not in keys]
    other = path.with_name(f"changed-{'-'.join(keys)}.yaml")
    other.write_text("\n".join([*lines, *(f"{key}: {json.dumps(value)}" for key, value in keys.items())]) + "\n")
    return other


def test_init_writes_what_the_dev_cluster_says_of_itself(devcluster: DevCluster, prism: Prism, site: Path) -> None:
    ours, theirs = load_profile(str(site)), load_profile(str(devcluster.folder / "dev.yaml"))
    assert ours.time == "00:30:00" and theirs.time == "30:00"
    # What cannot be seen: how long a hang is, and how long saving takes.
    not_seen = {"name": "dev", "description": "", "time": "", "limits": theirs.limits, "poll_s": theirs.poll_s}
    more = {key: getattr(theirs, key) for key in ("max_array", "max_submit", "slurm_conf") if hasattr(theirs, key)}
    assert replace(ours, **not_seen, **more) == replace(theirs, **not_seen)
    done = prism("check", "demo", "--cluster", str(site))
    assert done.returncode == 0, done.stderr
    before = site.read_text()
    done = prism("cluster", "init", "-o", str(site))
    assert done.returncode == 2 and "--force" in done.stderr and site.read_text() == before
    assert prism("cluster", "init", "-o", str(site), "--force").returncode == 0 and site.read_text() != before


def test_init_without_slurm(prism: Prism, tmp_path: Path) -> None:
    done = prism("cluster", "init", "x", PATH=str(tmp_path))
    assert done.returncode == 1 and "no scontrol here" in done.stderr and "Traceback" not in done.stderr


def result(prism: Prism, profile: Path, root: Path, *more: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code and checks by name of a whole test."""
    done = prism("cluster", "test", str(profile), "--root", str(root), "--json", *more)
    assert "Traceback" not in done.stderr and done.stdout, done.stderr
    said = json.loads(done.stdout)
    assert said["ok"] is (done.returncode == 0)
    return done.returncode, {check["name"]: check for check in said["checks"]}


def failed(checks: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {name: check["mend"] for name, check in checks.items() if check["result"] == "fail"}


def test_the_dev_cluster_passes(devcluster: DevCluster, prism: Prism, site: Path, tmp_path: Path) -> None:
    code, checks = result(prism, site, tmp_path / "root")
    assert (code, failed(checks)) == (0, {}), checks
    assert "8 asked and seen" in checks["GPUs"]["found"]
    assert "torch gloo, 2 ranks" in checks["all-reduce"]["found"]
    assert "torch 2." in checks["imports, the nodes"]["found"]
    assert "second life" in checks["requeue"]["found"] and checks["TERM to a step"]["result"] == "pass"
    if devcluster.site.isolation == "network":
        assert checks["network"]["found"].endswith("over eth0; there: eth0")


@pytest.mark.parametrize(
    ("keys", "name", "mend"),
    [
        ({"host_python": "/no/such/python"}, "interpreter", "host_python"),
        ({"host_python": BARE, "code": "/no/such/folder"}, "launcher importable", "code"),
    ],
)
def test_a_job_that_cannot_begin(
    keys: dict[str, str], name: str, mend: str, prism: Prism, site: Path, tmp_path: Path
) -> None:
    code, checks = result(prism, changed(site, **keys), tmp_path / "root")
    assert code == 1 and list(checks) == [name] and mend in checks[name]["mend"]


def test_workers_that_cannot_begin(prism: Prism, site: Path, tmp_path: Path) -> None:
    profile = changed(site, python="/no/such/python", host_python=BARE)
    code, checks = result(prism, profile, tmp_path / "root", "--nodes", "1")
    assert code == 1 and set(failed(checks)) == {"steps imports-host, nodes"}
    assert "python" in checks["steps imports-host, nodes"]["mend"] and checks["requeue"]["result"] == "pass"


@pytest.fixture
def hidden(devcluster: DevCluster, tmp_path: Path) -> Iterator[Any]:
    """Gives nodes a folder of their own in the place of a shared one."""
    if devcluster.site.isolation == "none":
        lacking("nodes without namespaces share every file system")
    hiding: list[tuple[str, Path]] = []

    def on(node: str, words: list[str]) -> None:
        enter = nodes.entering(devcluster.site, devcluster.processes[f"node.{node}"])
        subprocess.run([*enter, *words], check=True)

    def hide(folder: Path, *names: str) -> None:
        folder.mkdir()
        for name in names:
            on(name, ["mount", "-t", "tmpfs", "none", str(folder)])
            hiding.append((name, folder))

    yield hide
    for name, folder in hiding:
        on(name, ["umount", str(folder)])


def test_a_root_that_no_node_sees(
    hidden: Any, devcluster: DevCluster, prism: Prism, site: Path, tmp_path: Path
) -> None:
    hidden(tmp_path / "root", *devcluster.site.names)
    code, checks = result(prism, site, tmp_path / "root")
    assert code == 1 and list(checks) == ["root"] and "--root" in checks["root"]["mend"]


def test_a_root_that_one_node_does_not_see(hidden: Any, prism: Prism, site: Path, tmp_path: Path) -> None:
    hidden(tmp_path / "root", "n2")
    profile = changed(site, python=BARE)
    code, checks = result(prism, profile, tmp_path / "root")
    assert code == 1 and {"step nodes", "root and mounts"} <= set(failed(checks))
    assert "--root" in checks["step nodes"]["mend"] and "rank 1" in checks["root and mounts"]["found"]


@pytest.mark.parametrize(
    ("keys", "arguments", "message"),
    [
        ({}, ("--partition", "nosuch"), "no partition nosuch; cluster site has batch, low, grace, high"),
        ({"account": "nosuch"}, (), "Slurm refuses the test: Invalid account"),
        ({"constraint": "nosuch"}, (), "Slurm refuses the test: Invalid feature"),
    ],
)
def test_refused_before_anything_is_queued(
    keys: dict[str, str], arguments: tuple[str, ...], message: str, devcluster: DevCluster, prism: Prism, site: Path
) -> None:
    profile = changed(site, **keys) if keys else site

    def jobs() -> set[str]:
        return set(devcluster.call("squeue", "--noheader", "--states=all", "--format=%i").split())

    before = jobs()
    done = prism("cluster", "test", str(profile), "--root", str(site.parent / "root"), *arguments)
    assert done.returncode == 2 and message in done.stderr
    assert jobs() <= before


def test_an_interrupt_takes_the_job_back(devcluster: DevCluster, prism: Prism, site: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    command = [sys.executable, "-m", "launcher.cli", "cluster", "test", str(site), "--root", str(root)]
    env = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    followed = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    assert followed.stderr is not None
    job = followed.stderr.readline().split()[1].rstrip(":")
    followed.send_signal(signal.SIGINT)
    assert followed.wait(60) == 130 and f"cancelled job {job}" in followed.stderr.read()
    followed.stderr.close()
    until(lambda: state(devcluster, job) == "CANCELLED", 30, "the job's end")
    assert find_trial(root, job).job == job


def test_submitted_alone_and_shown_later(devcluster: DevCluster, prism: Prism, site: Path, tmp_path: Path) -> None:
    profile, root = changed(site, host_python="/no/such/python"), ("--root", str(tmp_path / "root"))
    done = prism("cluster", "test", str(profile), *root, "--no-wait")
    assert done.returncode == 0 and "submitted" in done.stdout, done.stderr
    job = done.stdout.split()[1]
    until(lambda: state(devcluster, job) == "FAILED", 30, "the job's end")
    done = prism("cluster", "test", str(profile), *root, "--job", job)
    assert done.returncode == 1 and "interpreter" in done.stdout and "mend: host_python" in done.stdout
