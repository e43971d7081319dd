"""A node that looks at itself, with an nvidia-smi that says what the test wants."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.progress import PREFLIGHT_LEFT, PREFLIGHT_SEEN
from launcher.workers import devices, preflight
from launcher.workers.preflight import gpu_problems, store_problems

CHECKOUT = Path(__file__).resolve().parents[2]
FINE = "[N/A], No, No, [N/A]"


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a program of that name, whose body is given, in the place of all others."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def put(body: str) -> None:
        (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{body}\n")
        (folder / "nvidia-smi").chmod(0o755)

    return put


def rows(*lines: str) -> str:
    return "\n".join(f"echo '{i}, GPU-{i}{i}, {line}'" for i, line in enumerate(lines))


@pytest.fixture(autouse=True)
def four_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")


def test_as_many_as_asked_for() -> None:
    assert gpu_problems(4) == []
    assert gpu_problems(8) == ["sees 4 GPUs of 8 (0,1,2,3)"]


def test_none_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_problems(1) == ["sees 0 GPUs of 1 (none)"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "no CUDA_VISIBLE_DEVICES and no nvidia-smi" in gpu_problems(1)[0]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (FINE, None),
        ("0, No, No, No", None),
        ("3, No, No, [N/A]", "GPU 1: uncorrected memory errors since the last reset"),
        ("0, Yes, No, [N/A]", "GPU 1: memory rows wait to be remapped: the GPU needs a reset"),
        ("0, No, Yes, [N/A]", "GPU 1: memory rows could not be remapped"),
        ("[N/A], [N/A], [N/A], Yes", "GPU 1: memory pages wait to be retired: the GPU needs a reset"),
    ],
)
def test_what_nvidia_smi_says_of_a_gpu(nvidia_smi: Callable[[str], None], line: str, problem: str | None) -> None:
    nvidia_smi(rows(FINE, line, FINE, FINE))
    assert gpu_problems(4) == ([problem] if problem else [])


def test_only_the_jobs_own_gpus_count(nvidia_smi: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(rows(FINE, "7, No, No, No", FINE))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    assert gpu_problems(2) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-11,GPU-22")
    assert gpu_problems(2) == ["GPU 1: uncorrected memory errors since the last reset"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    assert gpu_problems(2) == ["nvidia-smi knows 1 GPUs of 2"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert gpu_problems(4) == ["nvidia-smi knows 3 GPUs of 4"]


def test_an_older_nvidia_smi_is_asked_for_less(nvidia_smi: Callable[[str], None]) -> None:
    said = 'case "$*" in *remapped*) echo "Field \\"remapped_rows.pending\\" is not a valid field"; exit 2;; esac'
    counted = "\n".join(f"echo '{i}, GPU-{i}{i}'" for i in range(4))
    nvidia_smi(f"{said}\n{counted}")
    assert gpu_problems(4) == []


def test_a_driver_that_fails_or_hangs_is_a_problem(
    nvidia_smi: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi("echo 'Unable to determine the device handle for GPU 0000:41:00.0: Unknown Error'; exit 15")
    assert gpu_problems(4) == [
        "nvidia-smi fails: Unable to determine the device handle for GPU 0000:41:00.0: Unknown Error"
    ]
    monkeypatch.setattr(preflight, "_NVIDIA_SMI_S", 0.2)
    nvidia_smi("exec sleep 60")
    assert gpu_problems(4) == ["nvidia-smi does not answer in 0 s"]


class Torch:
    """A torch built for some CUDA, and what its CUDA does."""

    def __init__(self, built: str | None, count: int = 4, fails: str = "", bad: int = -1):
        self.__version__ = "2.10"
        self.version = SimpleNamespace(cuda=built, hip=None)
        self.bad = bad
        self.cuda = SimpleNamespace(
            is_available=lambda: not fails and count > 0,
            device_count=lambda: count,
            synchronize=lambda index: None,
            init=lambda: self._raise(fails or "No CUDA GPUs are available"),
        )

    def _raise(self, why: str) -> None:
        raise RuntimeError(f"{why}\nand more lines")

    def zeros(self, size: int, device: str) -> None:
        if device == f"cuda:{self.bad}":
            self._raise("CUDA error: CUDA-capable device(s) is/are busy or unavailable")


DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Tue Mar  4 22:00:00 UTC 2025\nGCC version:  gcc 12\n"
OLD = "The NVIDIA driver on your system is too old (found version 12040)."


@pytest.mark.parametrize(
    ("torch", "driver", "found"),
    [
        (Torch("13.0"), "580.65.06", []),
        (Torch("13.0"), "550.54.15", []),  # forward compatibility
        (Torch("13.0", count=3), "580.65.06", ["CUDA sees 3 GPUs of 4 in the stage's image"]),
        (
            Torch("13.1", fails=OLD),
            "550.54.15",
            [
                f"CUDA does not start in the stage's image: {OLD[:-1]}; its torch is built for CUDA 13.1, which wants "
                "driver R580 or newer, and this is 550.54.15"
            ],
        ),
        (
            Torch("12.4", fails="CUDA unknown error"),
            "550.54.15",
            ["CUDA does not start in the stage's image: CUDA unknown error; driver 550.54.15"],
        ),
        (
            Torch("13.0", fails="Found no NVIDIA driver on your system."),
            None,
            [
                "CUDA does not start in the stage's image: Found no NVIDIA driver on your system; the container sees "
                "no driver: is it given the node's GPUs?"
            ],
        ),
        (
            Torch("13.0", bad=2),
            "580.65.06",
            ["GPU 2: CUDA error: CUDA-capable device(s) is/are busy or unavailable"],
        ),
        (Torch(None), None, []),  # stand-ins for GPUs
        (Torch(None), "580.65.06", ["the image's torch 2.10 is one for CPUs"]),
        (None, "580.65.06", []),
    ],
)
def test_cuda_is_started_as_the_stage_will(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch: Torch | None, driver: str | None, found: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(preflight, "_DRIVER_FILE", tmp_path / "version")
    if driver:
        (tmp_path / "version").write_text(DRIVER.format(driver))
    assert preflight.cuda_problems(4) == found


def test_the_ordinal_of_an_all_reduce_is_the_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Slurm shows a task one GPU alone, that is number 0 whatever the task's own number is."""
    for module in ("workers/preflight.py", "site/all_reduce.py"):
        text = (CHECKOUT / "launcher" / module).read_text()
        assert "SLURM_LOCALID" not in text and "devices.ordinal(" in text
    monkeypatch.setenv("SLURM_LOCALID", "5")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert (devices.ordinal(1), devices.ordinal(8)) == (0, 5)


def test_the_store_is_there_writable_and_has_room(tmp_path: Path) -> None:
    (tmp_path / PREFLIGHT_SEEN).write_text("")
    assert store_problems(tmp_path, tmp_path, "n1", 0.0) == []
    assert (tmp_path / PREFLIGHT_LEFT.format(node="n1")).exists()
    assert "less than 1e+09" in store_problems(tmp_path, tmp_path, "n1", 1e9)[0]
    assert "is its file system mounted?" in store_problems(tmp_path, tmp_path / "other", "n1", 0.0)[0]


def test_it_says_so_on_one_line(tmp_path: Path) -> None:
    (tmp_path / PREFLIGHT_SEEN).write_text("")
    ours = {"PRISM_ROOT": str(tmp_path), "PRISM_ATTEMPT_DIR": str(tmp_path), "SLURMD_NODENAME": "n7"}
    command = [sys.executable, "-m", "launcher.workers.preflight", "nodes", "--gpus", "5", "--min-free-gb", "0"]
    env = {**os.environ, **ours, "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"node": "n7", "problems": ["sees 4 GPUs of 5 (0,1,2,3)"]}
