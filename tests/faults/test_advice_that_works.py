"""A mend that a message advises mends."""

from __future__ import annotations

import json
import re
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from launcher import data
from launcher.cluster import Profile
from launcher.containers import image_problems, image_warning
from launcher.spec import Runtime

CHECKOUT = Path(__file__).resolve().parents[2]


class Installed:
    """What pip noted of an installation."""

    requires = ("pyyaml>=6", 'torch<3,>=2; extra == "local"', "trl==1; extra == 'local'", "x; extra == 'localised'")

    def __init__(self, url: str | None):
        self.url = url

    def read_text(self, name: str) -> str | None:
        return None if self.url is None else json.dumps({"url": self.url})


def command(monkeypatch: pytest.MonkeyPatch, package: Path, url: str | None) -> list[str]:
    monkeypatch.setattr(data, "_PACKAGE", package)
    monkeypatch.setattr(metadata, "distribution", lambda name: Installed(url))
    python, *pip = shlex.split(data.install_command("local"))
    assert python == sys.executable and pip[:3] == ["-m", "pip", "install"]
    return pip[3:]


def test_an_extra_is_installed_from_where_the_package_came(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The package is in no index: its bare name would find nothing, or somebody else's."""
    wheel = tmp_path / "my wheels" / "prism_launch-1.whl"
    wheel.parent.mkdir()
    wheel.touch()
    away = tmp_path / "site-packages" / "launcher"
    assert command(monkeypatch, CHECKOUT / "launcher", None) == ["-e", f"{CHECKOUT}[local]"]
    assert command(monkeypatch, away, f"file://{tmp_path}/my%20wheels/prism_launch-1.whl") == [f"{wheel}[local]"]
    for gone in ("file:///not/there", "https://host/x.git", None):
        assert command(monkeypatch, away, gone) == ["torch<3,>=2", "trl==1"]


def test_nothing_else_advises_the_bare_name() -> None:
    pages = [*CHECKOUT.glob("docs/*.md"), CHECKOUT / "README.md", *CHECKOUT.glob("launcher/**/*.py")]
    bare = re.compile(r"pip install '?\"?prism-launch")
    assert [str(page) for page in pages if bare.search(page.read_text())] == []


@pytest.mark.parametrize(
    ("image", "meant"),
    [
        ("nvcr.io/nvidia/pytorch:25.03-py3", "nvcr.io#nvidia/pytorch:25.03-py3"),
        ("docker://nvcr.io/nvidia/pytorch:25.03-py3", "nvcr.io#nvidia/pytorch:25.03-py3"),
        ("ghcr.io/me/x", "ghcr.io#me/x"),
        ("$oauthtoken@nvcr.io/nvidia/x:1", "$oauthtoken@nvcr.io#nvidia/x:1"),
        ("registry:5000/me/x:1", "registry:5000#me/x:1"),
        ("localhost/x", "localhost#x"),
        ("nvcr.io#nvidia/pytorch:25.03-py3", None),
        ("nvidia/cuda:12.4-base", None),
        ("ubuntu:24.04", None),
        ("ubuntu@sha256:0123", None),
        ("/images/nvcr.io/x.sqsh", None),
    ],
)
def test_a_registry_before_a_slash_is_none_for_pyxis(image: str, meant: str | None) -> None:
    pyxis = Runtime(container="pyxis")
    warning = image_warning(image, pyxis)
    assert (warning is None) if meant is None else (warning or "").endswith(f"write {meant}")
    assert image_warning(meant, pyxis) is None and image_problems(image, pyxis) == []
    assert image_warning(image, Runtime(container="docker")) is None


@pytest.mark.parametrize("container", ["docker", "podman", "apptainer"])
def test_pyxis_way_to_name_a_registry_is_pyxis_alone(container: Any) -> None:
    scheme = "docker://" if container == "apptainer" else ""
    (said,) = image_problems(f"{scheme}nvcr.io#nvidia/x:1", Runtime(container=container))
    assert said.endswith(f"{container} takes {scheme}nvcr.io/nvidia/x:1")
    assert image_problems(f"{scheme}nvcr.io/nvidia/x:1", Runtime(container=container)) == []


def test_every_image_of_a_run_is_looked_at() -> None:
    from dataclasses import replace

    from launcher.check import warnings_of
    from tests.supervisor.counting import counting_run

    stages = counting_run(("a", (), {}), ("b", (), {})).stages
    site = Profile(name="x", scheduler="slurm", runtime=Runtime(container="pyxis"), images={"train": "r.io/x"})
    assert warnings_of(stages, site) == [
        "stages.a: image r.io/x: pyxis looks for this on Docker Hub; if r.io is the registry, write r.io#x"
    ]
    own = replace(stages[1], resources=replace(stages[1].resources, image="own.io/y"))
    assert [w.partition(":")[0] for w in warnings_of((stages[0], own), site)] == ["stages.a", "stages.b"]
