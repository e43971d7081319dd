"""What the doctor sees, against what is really there."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import pytest

from launcher.data import install_command
from launcher.doctor import examine


def by_name(root: Path) -> dict[str, object]:
    return {f.name: f for f in examine(root)}


def test_packages_are_reported_with_their_version(tmp_path: Path) -> None:
    torch = by_name(tmp_path)["torch"]
    assert torch.ok and importlib.metadata.version("torch") in torch.found


def test_an_absent_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "trl":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr("launcher.doctor.version", version)
    trl = by_name(tmp_path)["trl"]
    assert not trl.ok and trl.mend == install_command("local")


def test_programs_are_found_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not by_name(tmp_path)["slurm"].ok and by_name(tmp_path)["containers"].found == "none here"
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho slurm 99.9\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    assert by_name(tmp_path)["slurm"].found == "slurm 99.9"


def test_a_root_that_does_not_exist_yet_is_judged_by_its_parent(tmp_path: Path) -> None:
    found = by_name(tmp_path / "new" / "root")
    assert found["root"].ok and str(tmp_path) in found["root"].found
    assert not (tmp_path / "new").exists()
