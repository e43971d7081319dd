"""`python -m launcher.convert`, which `prism-launch convert` runs, and the stage's worker."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import spec
from launcher.convert.__main__ import main, progress_text, show_progress
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


@pytest.mark.parametrize("to", ["megatron", "hf"])
def test_parity_takes_config_and_tokenizer_from_the_folder_that_is_named(
    to: str, tmp_path: Path, hf_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(hf_checkpoint("llama"), tmp_path / "hf")
    named = tmp_path / "named"
    if to == "hf":
        assert main([str(source), str(tmp_path / "megatron"), "--to", "megatron"]) == 0
        source = tmp_path / "megatron"
        (source / "hf").rename(named)
    else:
        named.mkdir()
        for path in source.glob("*.json"):
            path.rename(named / path.name)
    assert main([str(source), str(tmp_path / "out"), "--to", to, "--parity", "--config", str(named)]) == 0
    assert "parity: largest difference" in capsys.readouterr().out


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


def test_the_worker_makes_a_nemo_checkpoint_that_knows_its_place(
    tmp_path: Path, hf_checkpoint: Callable[..., Path]
) -> None:
    job = make_job(tmp_path, hf_checkpoint("llama"), target="nemo")
    worker.main(job)
    place = tmp_path / "artifacts" / "convert" / ("c" * 20) / "checkpoint" / "hf"
    assert f"type: {place}\n" in (job.output("checkpoint") / "model_config.yaml").read_text()


def test_the_worker_stops_when_asked(tmp_path: Path, hf_checkpoint: Callable[..., Path]) -> None:
    job = make_job(tmp_path, hf_checkpoint("llama"))
    job._asked.append(0.0)
    with pytest.raises(Stopped):
        worker.main(job)


# --------------------------------------------------------------------------------------------------- `prism-launch`


def prism(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "launcher.cli", *words], capture_output=True, text=True, timeout=120)


def test_flags_that_a_job_does_not_take_are_refused_all_at_once(
    tmp_path: Path, hf_checkpoint: Callable[..., Path]
) -> None:
    source = str(hf_checkpoint("llama"))
    words = ["convert", source, str(tmp_path / "x.nemo"), "--to", "nemo", "--cluster", "example-pyxis", "--parity"]
    done = prism(*words, "--root", str(tmp_path))
    assert done.returncode == 2
    assert "--parity: not with --cluster; convert here" in done.stderr
    assert "x.nemo: archives are not written with --cluster; name a folder" in done.stderr
    local = prism("convert", source, str(tmp_path / "x"), "--to", "hf", "--cluster", "local", "--root", str(tmp_path))
    assert local.stderr.startswith("prism-launch: cluster local has no Slurm")
    same = prism(
        "convert", source, str(tmp_path / "x"), "--to", "hf", "--cluster", "example-pyxis", "--root", str(tmp_path)
    )
    assert same.stderr.endswith(f"{source}: is of format hf; nothing converts that to hf\n")
    assert not list(tmp_path.glob("x*"))


def test_merge_reaches_the_program_with_all_its_flags(tmp_path: Path, hf_checkpoint: Callable[..., Path]) -> None:
    source = str(hf_checkpoint("llama"))
    done = prism("merge", source, source, "--weights=-0.5,1.5", "-o", str(tmp_path / "out"), "--no-verify", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["weights"], record["read_back"]) == ([-0.5, 1.5], "not run")


# --------------------------------------------------------------------------------------------------------- progress


def test_progress_says_bytes_rate_and_time_left() -> None:
    assert progress_text(2_000_000_000, 8_000_000_000, 4.0) == "2.00 of 8.00 GB, 500 MB/s, 12 s left     "
    assert progress_text(0, 8_000_000_000, 0.0).rstrip() == "0.00 of 8.00 GB, 0 MB/s, starting"


def test_progress_is_told_in_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = iter([0.0, 0.0, 1.0, 11.0, 12.0, 30.0])
    monkeypatch.setattr("launcher.convert.__main__.time.monotonic", lambda: next(times))
    show = show_progress()
    for done in (1, 2, 3, 4):
        show(done * 10**9, 4 * 10**9)
    assert [line.rstrip() for line in capsys.readouterr().err.splitlines()] == [
        "2.00 of 4.00 GB, 182 MB/s, 11 s left",
        "4.00 of 4.00 GB, 133 MB/s, 0 s left",
    ]
