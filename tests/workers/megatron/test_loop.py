"""Stopped, killed and continued runs against an unbroken one; divergence; schedules."""

from __future__ import annotations

import json
import math
import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import train_stages as ts

from launcher.configs import TrainConfig
from launcher.spec import decode
from launcher.workers.megatron.optimizer import build_scheduler
from launcher.workers.megatron.parallel import process_groups

Reference = Callable[..., ts.TrainStage]
TIMES = ("seconds", "tokens_per_s", "tflops_per_rank", "memory_gib")


def same_run(stage: ts.TrainStage, reference: ts.TrainStage) -> None:
    """Assert that two finished stages are bit by bit the same, times apart."""
    rows, wanted = (
        [{k: v for k, v in row.items() if k not in TIMES and not k.startswith("seconds_")} for row in s.metrics()]
        for s in (stage, reference)
    )
    assert rows == wanted
    assert [row["iteration"] for row in rows] == list(range(1, len(rows) + 1))
    with process_groups():
        mine, theirs = ts.weights(stage.checkpoint), ts.weights(reference.checkpoint)
    assert mine.keys() == theirs.keys()
    differ = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert not differ


@pytest.mark.parametrize("name", ["llama-tiny", "granite-tiny", "nemotron-h-tiny"])
def test_a_stopped_run_goes_on_as_if_unbroken(root: Path, reference: Reference, name: str) -> None:
    stage = ts.make_stage(root, f"stopped-{name}", model=ts.model(name), save_interval=100)
    assert ts.run(stage, ts.signal_at(3, signal.SIGUSR2, times=2)) == [0]
    assert stage.ending()["class"] == "time-limit"
    assert "step 4 of 8" in stage.ending()["message"]
    assert stage.saved() == ["iter_0000004"]  # the signal came after step 3, so step 4 saw it
    assert not stage.checkpoint.exists()
    assert len(stage.metrics()) == 4

    assert ts.run(stage, attempt=1) == [0], ts.log(stage, 1)
    assert stage.ending(1)["class"] == "finished"
    assert "after step 4" in ts.log(stage, 1)
    same_run(stage, reference(name))


def test_a_full_disk_leaves_the_last_checkpoint_and_with_room_the_run_goes_on(root: Path, reference: Reference) -> None:
    """The second checkpoint does not fit."""
    stage = ts.make_stage(root, "full-disk", model=ts.model("llama-tiny"), save_interval=2)
    stage.progress.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(stage.progress)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    try:
        assert ts.run(stage) == [1]
        ending = stage.ending()
        assert ending["class"] == "storage" and "No space left" in ending["message"], ending
        assert stage.saved() == ["iter_0000002"]
        subprocess.run(["mount", "-o", "remount,size=64m", str(stage.progress)], check=True)
        assert ts.run(stage, attempt=1) == [0], ts.log(stage, 1)
        assert "after step 2" in ts.log(stage, 1)
    finally:
        subprocess.run(["umount", "--lazy", str(stage.progress)], check=True)
    same_run(stage, reference("llama-tiny"))


@pytest.mark.parametrize("name", ["llama-tiny", "nemotron-h-tiny"])
def test_a_killed_run_goes_on_as_if_unbroken(root: Path, reference: Reference, name: str) -> None:
    """Killed between checkpoints, then while one is written, then again; with another save_interval."""
    stage = ts.make_stage(root, f"killed-{name}", model=ts.model(name), save_interval=2)
    assert ts.run(stage, ts.signal_at(4, signal.SIGKILL)) == [-9]
    assert stage.saved() == ["iter_0000002"]
    assert len(stage.metrics()) == 3
    with (stage.workdir / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "lo')

    assert ts.run(stage, ts.kill_in_save(1), attempt=1) == [-9]
    assert stage.saved() == ["iter_0000002", "iter_0000004.partial"]
    assert any((stage.progress / "iter_0000004.partial").iterdir())
    assert not stage.checkpoint.exists()

    assert ts.run(stage, ts.kill_in_save(3), attempt=2) == [-9]  # the third is the finished checkpoint
    assert "after step 2" in ts.log(stage, 2)
    assert stage.saved() == ["iter_0000004", "iter_0000006"]
    assert stage.checkpoint.exists()
    assert not (stage.checkpoint / "latest_checkpointed_iteration.txt").exists()

    assert ts.run(stage, attempt=3) == [0], ts.log(stage, 3)
    same_run(stage, reference(name))


def survive(root: Path, kills: int, seed: int) -> None:
    """Kill a run at random moments, then let it end; what survives is the unbroken run."""
    changes: dict[str, Any] = {"model": ts.model("llama-tiny"), "train_iters": 40, "global_batch_size": 4}
    unbroken = ts.make_stage(root, f"unbroken-{seed}", save_interval=100, **changes)
    assert ts.run(unbroken) == [0], ts.log(unbroken)
    stage = ts.make_stage(root, f"hunted-{seed}", save_interval=2, **changes)
    choose, ended = random.Random(seed), []
    for attempt in range(kills):
        ended += ts.run(stage, ts.kill_after(choose.uniform(0.05, 2.0)), attempt=attempt)
        if ended[-1] == 0:
            # Faster than its killers: begin anew, so that there is something to kill.
            same_run(stage, unbroken)
            shutil.rmtree(stage.workdir)
    assert ts.run(stage, attempt=kills) == [0], ts.log(stage, kills)
    same_run(stage, unbroken)
    assert ended.count(-9) >= kills // 2, ended


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_random_moments_it_is_the_unbroken_run(root: Path, seed: int) -> None:
    survive(root, kills=4, seed=seed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10, 16))
def test_killed_at_many_random_moments_it_is_the_unbroken_run(root: Path, seed: int) -> None:
    survive(root, kills=10, seed=seed)


def test_a_bf16_run_goes_on_as_if_unbroken(root: Path, reference: Reference) -> None:
    unbroken = reference("nemotron-h-tiny", "bf16")
    stage = ts.make_stage(root, "stopped-bf16", model=ts.model("nemotron-h-tiny"), precision="bf16")
    assert ts.run(stage, ts.signal_at(5)) == [0]
    assert ts.run(stage, attempt=1) == [0], ts.log(stage, 1)
    same_run(stage, unbroken)


def test_a_run_on_two_ranks_is_stopped_by_one_and_goes_on_with_another_layout(root: Path, reference: Reference) -> None:
    layout = {"tensor_model_parallel_size": 2}
    stage = ts.make_stage(root, "relayout", model=ts.model("llama-tiny"), ranks=2, parallelism=layout)
    assert ts.run(stage, ts.signal_at(3)) == [0, 0]
    assert {stage.ending(rank=rank)["class"] for rank in (0, 1)} == {"time-limit"}
    wider = ts.make_stage(root, "relayout", model=ts.model("llama-tiny"), ranks=2)  # the same artifact, by DP=2
    assert ts.run(wider, attempt=1) == [0, 0], ts.log(wider, 1)
    assert "after step 4" in ts.log(wider, 1)
    assert wider.losses() == pytest.approx(reference("llama-tiny").losses(), rel=1e-5)


def test_a_signal_to_the_writers_of_a_checkpoint_does_no_harm(root: Path) -> None:
    stage = ts.make_stage(root, "signalled", train_iters=6, save_interval=2)
    assert ts.run(stage, ts.signal_in_save()) == [0], ts.log(stage)
    assert stage.ending()["class"] == "time-limit"
    assert ts.run(stage, attempt=1) == [0], ts.log(stage, 1)
    assert [row["iteration"] for row in stage.metrics()] == list(range(1, 7))


def test_training_goes_on_while_a_checkpoint_is_written_and_the_checkpoint_is_of_its_own_step(
    root: Path, reference: Reference
) -> None:
    """The writer takes longer than the steps between two checkpoints; then the run goes on from the first of them."""
    stage = ts.make_stage(root, "overlapped", model=ts.model("nemotron-h-tiny"), save_interval=3)
    assert ts.run(stage, ts.slow_writer(4.0)) == [0], ts.log(stage)
    rows = stage.metrics()
    assert sum(row.get("seconds_checkpoint", 0.0) for row in rows[:6]) < 4.0, "the last steps alone wait"
    assert stage.saved() == ["iter_0000003", "iter_0000006"]
    shutil.rmtree(stage.progress / "iter_0000006")
    shutil.rmtree(stage.checkpoint)
    assert ts.run(stage, attempt=1) == [0], ts.log(stage, 1)
    assert "after step 3" in ts.log(stage, 1)
    same_run(stage, reference("nemotron-h-tiny"))


def test_a_request_during_the_last_step_lets_the_run_finish(root: Path) -> None:
    stage = ts.make_stage(root, "late", train_iters=2)
    assert ts.run(stage, ts.signal_at(1)) == [0]
    assert stage.ending()["class"] == "finished"
    assert (stage.checkpoint / "latest_checkpointed_iteration.txt").read_text() == "2"


@pytest.mark.parametrize(
    ("changes", "fault", "at"), [({"lr": 1e30, "clip_grad": 0.0}, None, None), ({}, ts.poison_at(4), 4)]
)
def test_divergence_is_said_with_its_samples_and_nothing_passes_for_whole(
    root: Path, changes: dict[str, Any], fault: ts.Fault | None, at: int | None
) -> None:
    data = {"prepare/one": 0.7, "prepare/two": 0.3}
    stage = ts.make_stage(root, f"diverged-{at}", data=data, save_interval=2, **changes)
    assert ts.run(stage, fault) == [1]
    ending, record = stage.ending(), stage.record()["diverged"]
    assert ending["class"] == "diverged"
    assert f"step {record['iteration']}: loss {record['loss']}" in ending["message"]
    assert at is None or record["loss"] == "nan"
    assert len(record["samples"]) == 4
    assert {sample["source"] for sample in record["samples"]} <= data.keys()
    assert at is None or (record["iteration"], stage.saved()) == (4, ["iter_0000002"])
    assert not stage.checkpoint.exists()
    assert all(math.isfinite(row["loss"]) for row in stage.metrics())
    assert len(stage.metrics()) == record["iteration"] - 1
    assert "Traceback" not in ts.log(stage)


def test_bf16_trains_and_keeps_mamba_exponents_in_fp32(root: Path, reference: Reference) -> None:
    stage, exact = reference("nemotron-h-tiny", "bf16"), reference("nemotron-h-tiny")
    assert stage.losses()[-1] < stage.losses()[0] - 0.1
    assert stage.losses() == pytest.approx(exact.losses(), rel=5e-3)
    assert stage.losses() != exact.losses()
    with process_groups():
        tensors = ts.weights(stage.checkpoint)
    wide = {name for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert wide == {name for name in tensors if name.endswith(("A_log", ".D"))} != set()
    assert {tensors[name].dtype for name in tensors.keys() - wide} == {torch.bfloat16}


def rates(**changes: Any) -> list[float]:
    """The learning rate of each of 10 steps of 2 samples, peak 1.0, final 0.1."""
    config = decode(
        TrainConfig,
        {"model": ts.model("llama-tiny"), "data": {"prepare/one": 1.0}, "lr": 1.0, "global_batch_size": 2}
        | {"train_iters": 10, "lr_warmup_fraction": 0.2, **changes},
    )
    group = {"lr": 0.0, "weight_decay": 0.1}
    scheduler = build_scheduler(config, SimpleNamespace(param_groups=[group]))
    found = []
    for _ in range(config.train_iters):
        found.append(group["lr"])
        scheduler.step(config.global_batch_size)
    return found


def test_learning_rates_warm_up_and_decay_as_asked() -> None:
    warmup, after = [0.0, 0.5], [i / 8 for i in range(8)]
    wanted = {
        "cosine": [0.1 + 0.9 * (1 + math.cos(math.pi * x)) / 2 for x in after],
        "linear": [1.0 - 0.9 * x for x in after],
        "constant": [1.0] * 8,
        "exponential": [0.1 + 0.9 * (2 * 0.5**x - 1) for x in after],
    }
    for style, decay in wanted.items():
        assert rates(lr_decay_style=style) == pytest.approx(warmup + decay), style
    assert rates(lr_warmup_fraction=0.0)[0] == 1.0


def test_long_context_recovery_ends_at_a_rate_of_0() -> None:
    """PRISM, Table 17: 1,000 steps, 100 of warm-up, exponential decay to 0."""
    found = rates(lr_decay_style="exponential", min_lr_ratio=0.0, train_iters=1001, lr_warmup_fraction=100 / 1001)
    assert max(found) == found[100] == 1.0 and found[50] == 0.5
    # Megatron's base is 2, that of lm-engine, whose names the paper's tables use, is e.
    after = [(i - 100) / 901 for i in range(100, 1001)]
    assert found[100:] == pytest.approx([2 ** (1 - x) - 1 for x in after])
    theirs = [(math.exp(1 - x) - 1) / (math.e - 1) for x in after]
    assert max(abs(a - b) for a, b in zip(found[100:], theirs, strict=True)) < 0.04
    assert 0.0 < found[-1] < 2e-3 and found[100:] == sorted(found[100:], reverse=True)


def test_the_rank_of_a_run_reports_speed_and_norms(reference: Reference) -> None:
    stage = reference("llama-tiny")
    rows = stage.metrics()
    assert [row["tokens"] for row in rows] == [i * 4 * 32 for i in range(1, 9)]
    assert all(row["grad_norm"] > 0 and row["seconds"] > 0 for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]
    beat = json.loads((stage.attempt() / "heartbeat.train.0.json").read_text())
    assert (beat["step"], beat["total"], beat["figures"]["loss"]) == (8, 8, rows[-1]["loss"])
