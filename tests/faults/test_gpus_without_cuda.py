"""A stage that has GPUs is not trained on the CPU, and every worker takes its GPU by one rule."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher import spec, steps, store
from launcher.errors import WorldError
from launcher.supervisor.faults import gpu_fault
from launcher.workers import devices

REPOSITORY = Path(__file__).resolve().parents[2]
STAGE = REPOSITORY / "tests" / "data" / "stage.json"


@pytest.mark.parametrize("module", ["train", "train_script"])
def test_a_worker_with_gpus_and_no_cuda_ends_with_node_and_reason(tmp_path: Path, module: str) -> None:
    said = ending(tmp_path, module, PRISM_GPUS="8", SLURMD_NODENAME="n7")
    assert said["class"] == "crashed"
    assert "node n7 cannot use CUDA, though the stage has 8 GPUs a node: " in said["message"]
    assert "Torch not compiled with CUDA" in said["message"] or "driver" in said["message"].lower()
    fault = gpu_fault(said["message"])
    assert fault is not None and fault.blame == "node", "the supervisor leaves this node out, and tries again"


def ending(root: Path, module: str, **environment: str) -> dict[str, Any]:
    """How a worker of a train stage ends, before it looks at any of its inputs."""
    config = json.loads(STAGE.read_text())
    if module == "train_script":
        config["config"]["entrypoint"] = "pretrain_gpt.py"
    path, attempt = root / "stage.json", root / "attempt"
    path.write_text(json.dumps(config))
    attempt.mkdir()
    ours = {"PRISM_ROOT": str(root), "PRISM_ATTEMPT_DIR": str(attempt), "CUDA_VISIBLE_DEVICES": "", **environment}
    command = [sys.executable, "-m", f"launcher.workers.{module}", str(path)]
    done = subprocess.run(command, cwd=REPOSITORY, env={**os.environ, **ours}, capture_output=True, text=True)
    said = store.read_json(attempt / "exit.main.0.json")
    assert done.returncode == 1 and said is not None, done.stderr
    return dict(said)


def test_the_step_is_told_of_its_gpus_under_slurm_and_here_only_where_there_are_any() -> None:
    stage = spec.decode(spec.StageSpec, json.loads(STAGE.read_text()))
    step = spec.Step(name="train", argv=("x",), gpus=8, ntasks=8)
    place = steps.Place("/r", "/s", "/a", "python", {"train": "h"}, {"train": "1"})
    assert steps.environment(step, place)["PRISM_GPUS"] == "8"
    assert any("PRISM_GPUS=8" in word for word in steps.srun_argv(step, place, stage.runtime))
    ((_, here),) = steps.local_commands(stage, spec.Step(name="train", argv=("x",), gpus=8), place, "0:0")
    assert ("PRISM_GPUS" in here) == Path("/dev/nvidiactl").exists()


@pytest.mark.parametrize(
    ("seen", "environment", "number"),
    [
        (8, {"LOCAL_RANK": "5"}, 5),
        (8, {"SLURM_LOCALID": "5"}, 5),
        (8, {"LOCAL_RANK": "2", "SLURM_LOCALID": "5"}, 2),
        (1, {"LOCAL_RANK": "5"}, 0),
        (1, {"SLURM_LOCALID": "7"}, 0),
        (4, {}, 0),
    ],
)
def test_a_rank_takes_the_gpu_of_its_number_or_the_one_that_it_is_bound_to(
    seen: int, environment: dict[str, str], number: int
) -> None:
    assert devices.ordinal(seen, environment) == number


def test_two_ranks_never_share_a_gpu() -> None:
    with pytest.raises(WorldError, match=r"node n3 cannot use CUDA: 6 GPUs are seen, .* local rank 6"):
        devices.ordinal(6, {"LOCAL_RANK": "6", "SLURMD_NODENAME": "n3"})


def test_where_no_gpu_was_given_a_cpu_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(devices.GPUS, raising=False)
    assert devices.require_cuda() in (True, False)
    assert devices.given({devices.GPUS: ""}) == devices.given({}) == 0
