"""A whole `train` stage: the command itself, starting from a checkpoint, and inputs that do not fit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import train_stages as ts

from launcher.progress import StageJob
from launcher.workers.megatron import stage as stage_module
from launcher.workers.megatron.parallel import process_groups

Reference = Callable[..., ts.TrainStage]


def test_the_command_leaves_a_whole_checkpoint_and_says_what_it_did(root: Path) -> None:
    data = {"prepare/one": 0.5, "prepare/two": 0.5}
    stage = ts.make_stage(root, "command", train_iters=3, save_interval=2, data=data)
    stage.attempt().mkdir()
    names = {
        "PRISM_ROOT": root,
        "PRISM_ATTEMPT_DIR": stage.attempt(),
        "PRISM_STEP": "train",
        "PYTHONPATH": ts.REPOSITORY,
    }
    env = {**os.environ, **{k: str(v) for k, v in names.items()}, "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", "launcher.workers.train", str(stage.path)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    assert "cpu_mode: no CUDA here" in done.stdout
    assert "step 3/3  loss" in done.stdout

    assert (stage.checkpoint / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert {".metadata", "metadata.json"} < {p.name for p in (stage.checkpoint / "iter_0000003").iterdir()}
    found = {p.name for p in (stage.checkpoint / "hf").iterdir()}
    assert found == {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert stage.saved() == ["iter_0000002"]
    assert [row["iteration"] for row in stage.metrics()] == [1, 2, 3]
    assert stage.ending()["class"] == "finished"
    beat = json.loads((stage.attempt() / "heartbeat.train.0.json").read_text())
    assert (beat["step"], beat["total"]) == (3, 3)
    record = stage.record()
    assert record["cpu_mode"] is True
    assert record["loss"] == stage.losses()[-1]
    assert record["tokens"] == 3 * 4 * 32 == sum(row["tokens"] for row in record["data"])
    assert record["parameters"] == 2 * 512 * 96 + 3 * (96 * 4 * 24 * 2 + 96 * 2 * 24 * 2 + 3 * 96 * 288 + 2 * 96) + 96
    assert record["versions"].keys() == {"torch", "megatron-core"}
    assert (record["device"], record["world_size"], record["tokens_per_s"]) == (None, 1, None)


def test_the_speed_is_the_median_of_this_lifes_steps_without_the_first_ten(root: Path) -> None:
    stage = ts.make_stage(root, "speed")
    job = StageJob(stage.spec, root, stage.attempt(), "train")
    for iteration in range(1, 41):
        job.metric(iteration=iteration, tokens_per_s=float(iteration if iteration <= 20 else 1000 + iteration))
    assert stage_module._speed(job, None) == (1025 + 1026) / 2  # steps 11 to 40
    assert stage_module._speed(job, Path("checkpoints/iter_0000020")) == (1035 + 1036) / 2
    assert stage_module._speed(job, Path("checkpoints/iter_0000030")) is None


@pytest.mark.parametrize("name", ["llama-tiny", "nemotron-h-tiny"])
def test_a_start_from_a_checkpoint_has_its_weights_and_a_fresh_optimizer(
    root: Path, reference: Reference, name: str
) -> None:
    """A rate of next to nothing leaves the weights: the loss of each batch is that of the finished first stage."""
    base = reference(name)
    still = ts.make_stage(root, f"still-{name}", start=base, model=ts.model(name), lr=1e-12, train_iters=3)
    again = ts.make_stage(root, f"again-{name}", start=still, model=ts.model(name), train_iters=3)
    assert (ts.run(still), ts.run(again)) == ([0], [0]), ts.log(still) + ts.log(again)
    with process_groups():
        before, after = ts.weights(base.checkpoint), ts.weights(still.checkpoint)
    for key, weight in before.items():
        torch.testing.assert_close(after[key], weight, rtol=0, atol=1e-9)
    assert np.mean(still.losses()) < np.mean(base.losses()[:3])  # of the same samples: training went on, not anew
    assert again.losses()[0] == pytest.approx(still.losses()[0], rel=1e-6)
    assert again.metrics()[0]["lr"] == 0.0  # the schedule begins anew
    assert again.metrics()[1]["lr"] > 5e-3
    norm = sum((after[k] - w).square().sum() for k, w in ts_weights(again).items() if k in after) ** 0.5
    assert norm > 0.1


def ts_weights(stage: ts.TrainStage) -> dict[str, torch.Tensor]:
    with process_groups():
        return ts.weights(stage.checkpoint)


def refused(stage: ts.TrainStage) -> str:
    """The message of a stage that refuses its input: exit code 2, and the message is all that it says."""
    assert ts.run(stage) == [2], ts.log(stage)
    ending = stage.ending()
    assert ending["class"] == "user-error"
    said = [
        line
        for line in ts.log(stage).splitlines()
        if not line.startswith(("cpu_mode:", "Building a Blended", "blend:"))
    ]
    assert said == ending["message"].splitlines()
    assert not stage.checkpoint.exists() or not any(stage.checkpoint.iterdir())
    return ending["message"]


def test_token_files_that_are_damaged_are_refused(tmp_path: Path) -> None:
    tokens = ts.tokens_dir(tmp_path)
    ts.write_tokens(tokens, {"one": 2000, "two": 900, "three": 900})
    ts.write_tokenizer(ts.tokenizer_dir(tmp_path))
    (tokens / "one.bin").write_bytes(b"")
    (tokens / "two.idx").write_bytes(np.random.default_rng(0).bytes(1000))
    data = {"prepare/one": 1.0, "prepare/two": 1.0, "prepare/three": 1.0, "prepare/four": 1.0}
    lines = refused(ts.make_stage(tmp_path, data=data)).splitlines()
    wanted = ["four.idx: no such file", "one.bin: 0 bytes", "two.idx: not an index"]
    assert len(lines) == len(wanted)
    assert all(line.startswith(f"{tokens}/{start}") for line, start in zip(sorted(lines), wanted, strict=True))


def test_tokens_and_tokenizers_beyond_the_vocabulary_are_refused(root: Path) -> None:
    model = ts.model("llama-tiny", vocab_size=300)
    assert "ids up to 511, the model's vocab_size is 300" in refused(ts.make_stage(root, "small", model=model))
    tokenizer = ts.tokenizer_dir(root)
    hidden = tokenizer.rename(tokenizer.with_name("hidden"))
    try:
        message = refused(ts.make_stage(root, "smaller", model=model))
    finally:
        hidden.rename(tokenizer)
    assert "is outside the model's vocabulary of 300" in message
    assert "prepare/one" in message


def test_a_start_that_does_not_fit_is_refused(root: Path, reference: Reference, tmp_path: Path) -> None:
    base = reference("llama-tiny")
    wide = ts.make_stage(root, "wide", start=base, model=ts.model("llama-tiny", hidden_size=192))
    assert "hidden_size is 96, the stage's model has 192" in refused(wide)
    family = ts.make_stage(root, "family", start=base, model=ts.model("nemotron-h-tiny"))
    assert "family is llama, the stage's model has nemotron_h" in refused(family)

    copy = ts.make_stage(root, "copy", model=ts.model("llama-tiny"))
    shutil.copytree(base.checkpoint, copy.checkpoint)
    tracker = copy.checkpoint / "latest_checkpointed_iteration.txt"
    for number, (text, message) in enumerate(
        [("7", "no torch_dist checkpoint is there"), ("rubbish", "says 'rubbish'"), (None, f"no {tracker.name}")]
    ):
        tracker.write_text(text) if text else tracker.unlink()
        assert message in refused(ts.make_stage(root, f"tracker-{number}", start=copy, model=ts.model("llama-tiny")))

    tracker.write_text("8")
    config = copy.checkpoint / "hf" / "config.json"  # which says less of the model than the tensors do
    config.write_text(json.dumps(ts.model("llama-tiny", intermediate_size=576)["config"]))
    lying = ts.make_stage(root, "lying", start=copy, model=ts.model("llama-tiny", intermediate_size=576))
    message = refused(lying)
    assert "mlp.linear_fc1.weight is [3, 576, 96], the model wants [3, 1152, 96]" in message
    assert "mlp.linear_fc2.weight" in message


def test_a_start_in_another_precision_has_the_weights_as_near_as_it_can(root: Path, reference: Reference) -> None:
    model, first = ts.model("nemotron-h-tiny"), {}
    for source in ("fp32", "bf16"):
        for target in ("fp32", "bf16"):
            name = f"from-{source}-to-{target}"
            start = reference("nemotron-h-tiny", source)
            stage = ts.make_stage(root, name, start=start, model=model, precision=target, train_iters=1)
            assert ts.run(stage) == [0], ts.log(stage)
            first[source, target] = stage.losses()[0]
            dtype = {"fp32": "float32", "bf16": "bfloat16"}[target]
            assert json.loads((stage.checkpoint / "hf" / "config.json").read_text())["dtype"] == dtype
    assert list(first.values()) == pytest.approx([first["fp32", "fp32"]] * 4, rel=2e-3)
    assert first["fp32", "bf16"] != first["fp32", "fp32"]
