"""What a task sees of its node."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.site import probe

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    variables = {"PRISM_ATTEMPT_DIR": str(tmp_path), "PRISM_STEP": "nodes", "PRISM_ROOT": str(tmp_path)}
    for name, value in {**variables, "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURMD_NODENAME": "n1"}.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def smi(folder: Path, text: str, code: int = 0) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'E'\n{text}\nE\nexit {code}\n")
    program.chmod(0o755)


def look(folder: Path, paths: list[str]) -> dict[str, Any]:
    (folder / "stage.json").write_text(json.dumps({"config": {"paths": paths}}))
    assert probe.look_at_node(str(folder / "stage.json")) == 0
    report: dict[str, Any] = json.loads((folder / "nodes.0.json").read_text())
    return report


def test_the_report_of_a_node(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(task, "NVIDIA H100 80GB HBM3, 580.1\nNVIDIA H100 80GB HBM3, 580.1")
    monkeypatch.setenv("PATH", str(task), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    report = look(task, [f"+{task}", "/no/such", "/proc/version"])
    assert report["gpus"] == {"shown": 2, "real": ["NVIDIA H100 80GB HBM3"] * 2, "driver": "580.1", "error": ""}
    assert report["paths"] == {f"+{task}": "", "/no/such": "absent", "/proc/version": ""}
    assert report["node"] == "n1" and report["python"][0] == sys.executable and report["pair"] == {}
    assert all(i["name"] != "lo" and i["address"] for i in report["interfaces"])


def test_a_driver_that_fails_is_told(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(task, "NVIDIA-SMI has failed", 9)
    monkeypatch.setenv("PATH", str(task), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpus = look(task, [])["gpus"]
    assert gpus["real"] == [] and gpus["shown"] is None and "has failed" in gpus["error"]


def test_imports_one_of_which_ends_the_interpreter(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {
        "good": "__version__ = '1.2'\nprint('noise')\nprint('[1, 2]x')",
        "crashes": "import os; os.abort()",
        "broken": "raise ImportError('undefined symbol: _ZN3c10')",
        "lacking": "import not_there_at_all",
        "last": "__version__ = '3'",
    }.items():
        (task / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(task))
    monkeypatch.setattr(probe, "KERNELS", ("good", "absent.sub", "crashes", "broken", "lacking", "last"))
    assert probe.try_imports("-") == 0
    found = json.loads((task / "nodes.0.json").read_text())["kernels"]
    assert list(found) == sorted(probe.KERNELS)
    assert found["good"] == {"version": "1.2"} and found["last"] == {"version": "3"}
    assert found["absent.sub"] == {"absent": True}
    assert "ended the interpreter" in found["crashes"]["error"]
    assert "undefined symbol" in found["broken"]["error"] and "not_there_at_all" in found["lacking"]["error"]


@pytest.mark.parametrize(
    ("path", "kind"), [("/scratch/me/x", "lustre"), ("/scratch", "lustre"), ("/scratchy", "ext4"), ("/", "ext4")]
)
def test_the_file_system_of_a_path(path: str, kind: str) -> None:
    mounts = "/dev/vda / ext4 rw 0 0\nmds@tcp:/fs /scratch lustre rw,flock 0 0\ntmpfs /dev/shm tmpfs rw 0 0\n"
    assert probe.filesystem(path, mounts) == kind


def test_the_programs_of_a_job_run_with_the_standard_library_alone() -> None:
    code = (
        "import sys, launcher.site.job, launcher.site.probe, launcher.site.pairs;"
        "sys.exit(bool({'yaml', 'rich', 'submitit', 'torch', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(CHECKOUT)})
    assert done.returncode == 0
