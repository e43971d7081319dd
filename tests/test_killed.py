"""A whole run whose processes are killed again and again ends with what an unbroken run makes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launcher import store

CHECKOUT = Path(__file__).resolve().parent.parent
SHORT = {
    "prepare.problems.reasoning.count": "800",
    "prepare.problems.held-out.count": "40",
    "prepare.problems.rl.count": "60",
    "base.train_iters": "15",
    "base.save_interval": "4",
    "midtrain.train_iters": "40",
    "midtrain.save_interval": "6",
    "rl-from-base.max_steps": "3",
    "rl-from-base.prompts_per_step": "4",
    "rl-from-base.save_interval": "1",
    "rl-from-midtrain.max_steps": "3",
    "rl-from-midtrain.prompts_per_step": "4",
    "rl-from-midtrain.save_interval": "1",
}

pytestmark = pytest.mark.slow


class Run:
    """The shortened demo in a root of its own."""

    def __init__(self, root: Path):
        self.root = root

    def start(self) -> subprocess.Popen[str]:
        changes = [x for k, v in SHORT.items() for x in ("--set", f"{k}={v}")]
        command = [sys.executable, "-m", "launcher.cli", "run", "demo", "--name", "short", "--root", str(self.root)]
        environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
        output = (self.root / "output").open("a")
        with output:
            return subprocess.Popen([*command, *changes], env=environment, text=True, stdout=output, stderr=output)

    def processes(self) -> dict[str, list[int]]:
        """Living supervisors and workers of this root."""
        found: dict[str, list[int]] = {"supervisor": [], "worker": []}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                variables = (path / "environ").read_bytes().split(b"\0")
                words = (path / "cmdline").read_bytes()
            except OSError:
                continue
            if f"PRISM_ROOT={self.root}".encode() in variables and store.process_start(int(path.name)):
                kind = "supervisor" if b"launcher.supervisor" in words else "worker"
                found[kind].append(int(path.name))
        return found

    def receipts(self) -> dict[str, Any]:
        record = json.loads((self.root / "runs" / "short" / "run.json").read_text())
        specs = [s["spec"] for s in record["stages"]]
        folders = {s["stage"]: self.root / "artifacts" / s["kind"] / s["fingerprint"] for s in specs}
        return {stage: json.loads((folder / "artifact.json").read_text()) for stage, folder in folders.items()}

    def losses(self, stage: str) -> list[float]:
        receipt = self.receipts()[stage]
        path = self.root / "artifacts" / receipt["kind"] / receipt["fingerprint"] / "metrics.jsonl"
        return [json.loads(line)["loss"] for line in path.read_text().splitlines()]


def kill(run: Run, launcher: subprocess.Popen[str], what: str) -> None:
    """kill -9 the launcher, or every process of a kind, or all of them."""
    found = run.processes()
    victims = {"launcher": [launcher.pid], **found, "everything": [launcher.pid, *sum(found.values(), [])]}
    for pid in victims[what]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def test_killed_again_and_again_it_ends_as_an_unbroken_run(tmp_path: Path) -> None:
    whole, broken = Run(tmp_path / "whole"), Run(tmp_path / "broken")
    for run in (whole, broken):
        run.root.mkdir()
    assert whole.start().wait(timeout=600) == 0, (whole.root / "output").read_text()[-3000:]
    choose = random.Random(7)
    launcher, killed = broken.start(), []
    for what in ["everything", "worker", "launcher", "supervisor", "everything", "worker", "everything"]:
        time.sleep(choose.uniform(3.0, 12.0))
        if launcher.poll() is not None and launcher.returncode == 0:
            break
        kill(broken, launcher, what)
        killed.append(what)
        if what in ("launcher", "everything"):
            launcher.wait()
            launcher = broken.start()
    assert launcher.wait(timeout=600) in (0, 1)
    if launcher.returncode:  # a stage may have been killed too often in a row: run again goes on
        assert broken.start().wait(timeout=600) == 0, (broken.root / "output").read_text()[-3000:]
    assert len(killed) >= 3, killed
    for stage in ("base", "midtrain"):
        assert broken.losses(stage) == whole.losses(stage)
    ours, theirs = broken.receipts(), whole.receipts()
    made = ("prepare", "base", "midtrain", "base-to-hf", "midtrain-to-hf", "rl-from-base")
    for stage in made:
        tensors = [{k: v for k, v in r[stage]["files"].items() if is_content(k)} for r in (ours, theirs)]
        assert tensors[0] and tensors[0] == tensors[1], stage
    assert sum(r["attempts"] for r in ours.values()) > len(ours)
    left = [p.name for p in (broken.root / "artifacts").glob("*/*") if "." in p.name]
    assert not left, left


def is_content(name: str) -> bool:
    """Files that depend on what was computed alone, not on times."""
    return name.endswith((".distcp", ".safetensors", ".bin", ".idx", "tokenizer.json")) or name.startswith("prompts/")
