"""Runtimes of this machine that have no daemon: Charliecloud, and, by a program that stands in for it, Apptainer."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from container_calls import CHECKOUT, build, lacking

from launcher import store
from launcher.runtimes import check_containers
from launcher.spec import Runtime, StageSpec
from tests.supervisor.counting import Store, counting_stage, counting_step

SLOW = {"until": 1000, "sleep": 0.05, "save": 1000}
#: Starts the command as a child, as Apptainer does, and nothing more: what a stand-in cannot show is the container.
STAND_IN = """#!/bin/sh
[ "$1" = exec ] || exit 9
while shift; do case "$1" in -*) ;; *) break ;; esac; done
shift
"$@" &
trap 'kill -USR2 $!' USR2
wait; wait
"""


@pytest.fixture
def at(tmp_path: Path) -> Store:
    return Store(tmp_path)


def contained(at: Store, runtime: str, image: Path, python: str, **options: object) -> StageSpec:
    step = counting_step(**options)
    step = replace(
        step,
        argv=tuple(word.replace("{python}", python) for word in step.argv),
        env={"PYTHONPATH": str(CHECKOUT)},
        image=str(image),
        mounts=(str(at.root), f"{CHECKOUT}:{CHECKOUT}:ro"),
    )
    return counting_stage(step, runtime=Runtime(container=runtime))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("ch-run") is None:
        lacking("ch-run is not installed; Debian's package charliecloud-runtime has it")
    folder = tmp_path_factory.mktemp("images") / "bare"
    build(
        "--bare", f"--folder={folder}", f"--mount-point={CHECKOUT}", f"--mount-point={tmp_path_factory.getbasetemp()}"
    )
    return folder


def saved(at: Store, spec: StageSpec) -> int:
    return int((store.partial_dir(at.root, spec.artifact) / "progress" / "count").read_text())


def test_charliecloud_saves_when_asked_and_goes_on(at: Store, image: Path) -> None:
    spec = contained(at, "charliecloud", image, "/opt/prism/bin/python3", **SLOW)
    check_containers("charliecloud", list(spec.steps))
    supervisor = at.start(spec, USER="")
    at.wait_for(lambda: at.step_reached(spec, 3))
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(timeout=60) == 1 and at.end(spec)["message"] == "stopped as asked"
    step = saved(at, spec)
    again = contained(at, "charliecloud", image, "/opt/prism/bin/python3", until=step + 2)
    assert at.run(again) == 0
    assert f"from step {step}" in (at.attempt_dir(spec, 2) / "count.0.log").read_text()
    assert at.events(spec)[1]["argv"][0] == "ch-run" and not at.processes()


def test_charliecloud_dies_with_the_supervisor(at: Store, image: Path) -> None:
    spec = contained(at, "charliecloud", image, "/opt/prism/bin/python3", **SLOW)
    supervisor = at.start(spec)
    at.wait_for(lambda: at.step_reached(spec, 2))
    supervisor.kill()
    supervisor.wait()
    at.wait_for(lambda: not at.processes())


@pytest.fixture
def apptainer(tmp_path: Path) -> dict[str, str]:
    """A PATH with the stand-in on it."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "apptainer").write_text(STAND_IN)
    (tmp_path / "bin" / "apptainer").chmod(0o755)
    (tmp_path / "cpu.sif").write_text("")
    return {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}


def test_apptainers_child_saves_when_asked(at: Store, apptainer: dict[str, str], tmp_path: Path) -> None:
    spec = contained(at, "apptainer", tmp_path / "cpu.sif", "python3", **SLOW)
    supervisor = at.start(spec, **apptainer)
    at.wait_for(lambda: at.step_reached(spec, 3))
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(timeout=60) == 1
    assert at.end(spec)["class"] == "cancelled" and saved(at, spec) >= 3 and not at.processes()


def test_apptainers_child_dies_with_the_supervisor(at: Store, apptainer: dict[str, str], tmp_path: Path) -> None:
    spec = contained(at, "apptainer", tmp_path / "cpu.sif", "python3", **SLOW)
    supervisor = at.start(spec, **apptainer)
    at.wait_for(lambda: at.step_reached(spec, 2))
    supervisor.kill()
    supervisor.wait()
    at.wait_for(lambda: not at.processes())
