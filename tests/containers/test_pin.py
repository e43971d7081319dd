"""One lock for every version in every image: what differs is found, both ways, and pyproject.toml agrees with it."""

from __future__ import annotations

import importlib.util
import re
import shutil
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import tomllib
from packaging.requirements import Requirement

CHECKOUT = Path(__file__).resolve().parents[2]
CONTAINERS = CHECKOUT / "containers"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pin", CONTAINERS / "pin.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PIN = load()
LOCK = PIN.read_lock()
EXTRAS = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_every_dockerfile_has_the_locks_versions() -> None:
    assert set(LOCK) == {"cpu", "eval", "rl-nemo-aligner", "rl-nemo-rl", "rl-open-instruct", "train"}
    assert PIN.problems() == []


@pytest.mark.parametrize("image", [name for name, entry in LOCK.items() if "extra" in entry])
def test_versions_lie_in_the_ranges_of_the_extra(image: str) -> None:
    locked = {name.lower().replace("_", "-"): value for name, value in LOCK[image]["args"].items()}
    wanted = {r.name: r.specifier for r in map(Requirement, EXTRAS[LOCK[image]["extra"]])}
    absent = set(wanted) - set(locked)
    assert absent == set(), f"{image}: the extra names {absent}, the image has none of it"
    assert {name: locked[name] for name in wanted if not wanted[name].contains(locked[name])} == {}


def test_the_cpu_image_has_what_the_tests_run_with() -> None:
    locked = {name.lower().replace("_", "-"): value for name, value in LOCK["cpu"]["args"].items() if name != "BASE"}
    here = {name: metadata.version(name).partition("+")[0] for name in locked}
    patch = re.compile(r"^\d+\.\d+")
    assert {n: patch.findall(v) for n, v in here.items()} == {n: patch.findall(v) for n, v in locked.items()}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CONTAINERS, tmp_path / "containers"))


def test_writing_changes_the_version_alone(copy: Path) -> None:
    dockerfile = copy / "cpu" / "Dockerfile"
    before = dockerfile.read_text()
    after = PIN.pinned(before, {**LOCK["cpu"]["args"], "TORCH": "9.9"})
    assert [line for line in after.splitlines() if line not in before.splitlines()] == ["ARG TORCH=9.9"]


@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        ("cpu/Dockerfile", "ARG TRL=1.16.0", "ARG TRL=1.15.0", "ARG TRL=1.15.0, but versions.lock has 1.16.0"),
        ("cpu/Dockerfile", "ARG TRL=1.16.0\n", "", "TRL is in the lock, but is no ARG"),
        ("eval/Dockerfile", "ARG TORCH", "ARG NEW=1\nARG TORCH", "ARG NEW is not in versions.lock"),
        ("eval/Dockerfile", '"reasoning-gym==${REASONING_GYM}"', "reasoning-gym", "ARG REASONING_GYM is not used"),
        ("versions.lock", "\ntrain:\n", "\ntrains:\n", "trains: in the lock, but there is no trains/Dockerfile"),
        ("versions.lock", "UV: 0.8.6", "UV: 0.8", "versions.lock: rl-open-instruct.UV: quote 0.8"),
    ],
)
def test_what_differs_is_found(copy: Path, file: str, old: str, new: str, problem: str) -> None:
    text = (copy / file).read_text()
    assert old in text
    (copy / file).write_text(text.replace(old, new, 1))
    assert [p for p in PIN.problems(copy) if problem in p]
