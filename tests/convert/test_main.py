"""`python -m launcher.convert`, which `prism-launch convert` runs, and the stage's worker."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import spec
from launcher.convert.__main__ import main
from launcher.progress import StageJob, Stopped
from launcher.workers import convert as worker

EXAMPLE = Path(__file__).resolve().parents[1] / "data" / "stage.json"


def test_the_command_converts_and_says_what_it_verified(tmp_path: Path, hf_checkpoint: Callable[..., Path]) -> None:
    command = [sys.executable, "-m", "launcher.convert", str(hf_checkpoint("llama")), str(tmp_path / "out")]
    done = subprocess.run([*command, "--to", "megatron", "--json"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["from"], record["to"], record["round_trip"]) == ("hf", "megatron", "bit-exact")
    assert record["versions"]["torch"]
    assert (tmp_path / "out" / "hf" / "config.json").is_file()
    again = subprocess.run([*command, "--to", "megatron"], capture_output=True, text=True, timeout=120)
    assert again.returncode == 2
    assert again.stderr == f"prism-launch: {tmp_path / 'out'}: is there already; name a new folder\n"


def test_without_verification_the_output_says_so(
    tmp_path: Path, hf_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(hf_checkpoint("llama"))
    assert main([source, str(tmp_path / "a"), "--to", "megatron", "--no-verify"]) == 0
    assert "round trip: not run (--no-verify)" in capsys.readouterr().out
    assert main([source, str(tmp_path / "b"), "--to", "megatron"]) == 0
    assert "21 tensors read, 15 written" in (text := capsys.readouterr().out)
    assert "round trip: bit-exact" in text


def test_a_users_mistake_is_text_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "absent"), str(tmp_path / "out"), "--to", "hf"]) == 2
    assert capsys.readouterr().err == f"prism-launch: {tmp_path / 'absent'}: no such folder\n"


# ------------------------------------------------------------------------------------------------------------- worker


def make_job(root: Path, source: Path, **config: Any) -> StageJob:
    example = json.loads(EXAMPLE.read_text())
    fingerprint = "c" * 20
    data = example | {
        "stage": "convert",
        "kind": "convert",
        "fingerprint": fingerprint,
        "config": {"checkpoint": "base", "source": "hf", "target": "megatron", "verify": True, **config},
        "inputs": {"checkpoint": {"path": str(source), "format": "hf", "fingerprint": "x"}},
        "outputs": {"checkpoint": {"path": f"artifacts/convert/{fingerprint}/checkpoint", "format": "megatron"}},
    }
    attempt = root / "attempt"
    attempt.mkdir(exist_ok=True)
    return StageJob(spec.decode(spec.StageSpec, data), root, attempt, "main")


def test_the_worker_fills_its_port_and_records_the_verification(
    tmp_path: Path, hf_checkpoint: Callable[..., Path]
) -> None:
    job = make_job(tmp_path, hf_checkpoint("llama"))
    left = job.output("checkpoint") / "half written"
    left.write_text("by an attempt that was killed")
    worker.main(job)
    assert not left.exists()
    assert (job.output("checkpoint") / "latest_checkpointed_iteration.txt").is_file()
    record = json.loads((job.workdir / "record.json").read_text())
    assert record["verification"]["round_trip"] == "bit-exact"
    beat = json.loads((job.attempt_dir / "heartbeat.main.0.json").read_text())
    assert beat["step"] == beat["total"] > 100_000
    assert beat["figures"]["bytes_per_s"] > 0


def test_the_worker_stops_when_asked(tmp_path: Path, hf_checkpoint: Callable[..., Path]) -> None:
    job = make_job(tmp_path, hf_checkpoint("llama"))
    job._asked.append(0.0)
    with pytest.raises(Stopped):
        worker.main(job)
