"""`pip install .` alone: the login side works without torch and without numpy."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import venv
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def login(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment with prism-launch and nothing but what it declares."""
    folder = tmp_path_factory.mktemp("login") / "venv"
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, str(CHECKOUT)], check=True)
    return folder / "bin"


def run(login: Path, cwd: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run([str(login / "prism-launch"), *args], capture_output=True, text=True, cwd=cwd, env=env)


def test_login_side_without_torch(login: Path, tmp_path: Path) -> None:
    absent = "import importlib.util as u, sys; sys.exit(any(map(u.find_spec, ['torch', 'numpy'])))"
    assert subprocess.run([str(login / "python"), "-c", absent]).returncode == 0
    listed = run(login, tmp_path, "recipes", "--json")
    assert "demo" in [r["name"] for r in json.loads(listed.stdout)], listed.stderr
    for args in (("check", "demo"), ("plan", "demo"), ("schema",), ("cluster", "list")):
        done = run(login, tmp_path, *args)
        assert done.returncode == 0, done.stderr
    for cluster in ("example-pyxis", "example-apptainer"):
        done = run(login, tmp_path, "render", "demo", "--cluster", cluster, "-o", cluster)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / cluster / "submit.sh").exists()
        done = run(login, tmp_path, "run", "demo", "--cluster", cluster, "--dry-run")
        assert done.returncode == 0 and "#SBATCH" in done.stdout, done.stderr


def test_run_without_the_local_extra_says_what_to_install(login: Path, tmp_path: Path) -> None:
    done = run(login, tmp_path, "run", "demo", "--cluster", "local")
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert " -m pip install " in said and "[local]" in said and "Traceback" not in said
    # What is advised works as it stands; torch is too large to install here.
    command = shlex.split(said[said.index("; ") + 2 :].splitlines()[0])
    subprocess.run([*command, "--quiet", "--dry-run", "--no-deps"], check=True)
