"""`entrypoint`: a script of the user's own between the same artifacts as our loop."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import train_stages as ts

from launcher.configs import Resources, TrainConfig
from launcher.convert.conversion import convert
from launcher.errors import UserError
from launcher.models.families import shape_of
from launcher.spec import SpecError, decode
from launcher.stages import kinds
from launcher.workers.megatron_arguments import Paths, script_arguments
from launcher.workers.train_script import read_line

SCRIPT = Path(__file__).with_name("pretrain_small.py")


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start(stage: ts.TrainStage, attempt: int = 0, **variables: str) -> subprocess.Popen[str]:
    """The worker as a supervisor on this machine starts it."""
    folder = stage.attempt(attempt)
    folder.mkdir(parents=True)
    env = {
        **os.environ, "PRISM_ROOT": str(stage.root), "PRISM_ATTEMPT_DIR": str(folder), "PRISM_STEP": "train",
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(),
        "PYTHONPATH": str(ts.REPOSITORY), "PRISM_PARENT": str(os.getpid()), **variables,
    }  # fmt: skip
    command = [sys.executable, "-m", "launcher.workers.train_script", str(stage.path)]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, _ = process.communicate(timeout=120)
    return process.returncode, out


def script_stage(root: Path, name: str, **changes: Any) -> ts.TrainStage:
    args = ["--my-own-flag"]
    return ts.make_stage(
        root, name, model=ts.model("llama-tiny"), entrypoint=str(SCRIPT), entrypoint_args=args, **changes
    )


def test_a_script_trains_between_our_artifacts_and_goes_on_after_a_stop(root: Path, tmp_path: Path) -> None:
    base = ts.make_stage(root, "base-of-script", model=ts.model("llama-tiny"), train_iters=2)
    assert ts.run(base) == [0]
    stage = script_stage(root, "scripted", start=base, train_iters=6, save_interval=100)
    process = start(stage, SLEEP="0.5")
    deadline = time.monotonic() + 60
    while not list(stage.attempt().glob("heartbeat*")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR2)
    code, out = finish(process)
    assert code == 0 and stage.ending()["class"] == "time-limit", out
    assert "mine: True tokenizer: True" in out and "--finetune" in out and "connections: 1" in out
    done = len(stage.metrics())
    assert 0 < done < 6 and not stage.checkpoint.exists()
    code, out = finish(start(stage, 1, CUDA_DEVICE_MAX_CONNECTIONS="32"))
    assert code == 0 and stage.ending(1)["class"] == "finished" and "connections: 32" in out, out
    assert [row["tokens"] for row in stage.metrics()] == [i * 4 * 32 for i in range(1, 7)], "sequences x seq_length"
    assert [row["iteration"] for row in stage.metrics()] == list(range(1, 7)) and "--finetune" not in out.split(
        "others"
    )[0]
    assert stage.losses()[0] == pytest.approx(base.losses()[-1], rel=0.2), "it starts from the weights of base"
    shutil.rmtree(stage.checkpoint)  # as after an attempt that was cut off before its artifact was whole
    code, out = finish(start(stage, 2))
    assert code == 0 and stage.ending(2)["class"] == "finished", out
    (tmp_path / "hf").mkdir()
    convert(stage.checkpoint, tmp_path / "hf", "hf")
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [("exit", 1, "ended with exit code 1"), ("kill", -9, None), ("early", 1, "must save at its last iteration")],
)
def test_a_scripts_failures_are_told(root: Path, fault: str, code: int, message: str | None) -> None:
    stage = script_stage(root, f"fault-{fault}", train_iters=3, save_interval=2)
    got, out = finish(start(stage, FAULT=fault))
    assert got == code, out
    assert message is None or message in stage.ending()["message"]
    assert not stage.checkpoint.exists()


def test_a_script_that_is_gone_is_the_users_to_mend(root: Path) -> None:
    stage = ts.make_stage(root, "gone", entrypoint="/nowhere/pretrain_gpt.py")
    code, out = finish(start(stage))
    assert code == 2 and "/nowhere/pretrain_gpt.py: no such file" in stage.ending()["message"], out


def config(name: str, **changes: Any) -> TrainConfig:
    model = ts.model(name)
    return decode(
        TrainConfig, {"model": model, "data": {"p/a": 1.0}, "train_iters": 100, "entrypoint": "x.py", **changes}
    )


def words(name: str, **changes: Any) -> list[str]:
    c = config(name, **changes)
    paths = Paths({"/d/a": 0.25, "/d/b": 0.75}, Path("/tok"), Path("/save"), None, is_start=True)
    return list(script_arguments(c, shape_of(c.model.config), 7, paths))


def test_arguments_are_megatrons() -> None:
    got = words("llama-tiny", parallelism={"tensor_model_parallel_size": 2, "sequence_parallel": True})
    assert got[got.index("--tensor-model-parallel-size") + 1] == "2" and "--sequence-parallel" in got
    blend = got.index("--data-path")
    assert got[blend + 1 : blend + 5] == ["0.25", "/d/a", "0.75", "/d/b"]
    assert "--load" not in got and "--finetune" not in got and "--swiglu" in got
    assert not any(word in ("None", "True", "False") for word in got)


def test_hybrids_get_their_pattern_and_granites_multipliers_are_refused() -> None:
    got = words("nemotron-h-tiny")
    assert got[got.index("--hybrid-override-pattern") + 1] == "M-M*M-" and "--squared-relu" in got
    with pytest.raises(UserError, match="no arguments for granite's multipliers"):
        words("granite-tiny")


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_a_rope_scaling_that_the_scripts_would_not_take_is_refused(factor: float) -> None:
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    model = ts.model("llama-tiny", rope_parameters=scaling)
    if factor == 8.0:
        assert "--use-rope-scaling" in words("llama-tiny", model=model)
    else:
        with pytest.raises(UserError, match="no rope scaling factor but 8, and this model has 32"):
            words("llama-tiny", model=model)


def test_fp8_and_determinism_are_megatrons_words_and_full_recomputation_of_hybrids_is_refused() -> None:
    got = words("llama-tiny", fp8_format="hybrid", fp8_recipe="blockwise", deterministic_mode=True)
    at = got.index("--fp8-format")
    assert got[at : at + 5] == ["--fp8-format", "hybrid", "--fp8-recipe", "blockwise", "--deterministic-mode"]
    assert "--recompute-method" in words("llama-tiny", parallelism={"recompute": "full"})
    with pytest.raises(UserError, match="ignored full for hybrid models"):
        words("nemotron-h-tiny", parallelism={"recompute": "full"})


def test_what_only_our_loop_does_is_refused() -> None:
    with pytest.raises(SpecError) as caught:
        config("llama-tiny", validation=["p/b"], keep_every=10, wandb_project="x")
    assert [key for key, _ in caught.value.problems] == ["validation", "keep_every", "wandb_project"]


def test_a_line_of_the_log() -> None:
    line = " iteration       10/     100 | learning rate: 1.5E-05 | lm loss: 2.5E+00 | grad norm: 0.731 |"
    assert read_line(line) == {"iteration": 10, "total": 100, "loss": 2.5, "lr": 1.5e-5, "grad_norm": 0.731}
    assert read_line("saving checkpoint at iteration 10 to x") is None


def test_the_stage_starts_the_script_worker() -> None:
    (step,) = kinds()["train"].steps(config("llama-tiny"), Resources())
    assert "launcher.workers.train_script" in step.argv


def test_libraries_find_deterministic_mode_in_the_environment_when_they_start() -> None:
    (plain,) = kinds()["train"].steps(config("llama-tiny"), Resources())
    (step,) = kinds()["train"].steps(config("llama-tiny", deterministic_mode=True), Resources())
    assert plain.env == {} and step.env["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"
    assert step.env["NCCL_ALGO"] == "Ring" and step.env["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
