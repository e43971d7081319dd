"""What a plan tells of its stages before they run: time, GPU-hours, memory, bytes, warnings."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from sparse_checkpoints import sparse_checkpoint
from test_fit_layouts import GRANITE_H, LLAMA
from test_speed import receipt, write

from launcher.cli import main
from launcher.configs import Resources, TrainConfig
from launcher.errors import UserError
from launcher.fit.auto import choose
from launcher.fit.layers import architecture_of, flops_per_token
from launcher.fit.speed import uncounted
from launcher.models.families import parameter_count, shape_of
from launcher.spec import decode
from tests.test_cli import prism

PARAMETERS = 8_030_261_248
RECIPE = """
name: eight-b
model: {name: m, family: %s, config: %s}
stages:
  prepare:
    kind: prepare
    sources: {text: {kind: files, path: text.txt}}
    problems: {rl: {task: chain_sum, count: 16}}
  mid:
    kind: train
    data: {prepare/text: 1.0}
    train_iters: 1000
    save_interval: 100
    parallelism: {tensor_model_parallel_size: %d, sequence_parallel: %s}
    resources: {nodes: %d, ntasks_per_node: 8, gpus_per_node: 8, time: "2:00:00"}
  both:
    kind: merge
    checkpoints: [mid, mid-again]
    weights: [0.5, 0.5]
  mid-again:
    kind: train
    checkpoint: mid
    data: {prepare/text: 1.0}
    train_iters: 10
    trainable: attention
  rl:
    kind: rl
    backend: trl
    checkpoint: mid
    prompts: prepare/rl
    max_steps: 2
  last:
    kind: evaluate
    checkpoints: [mid, rl]
    benchmarks: [prepare/rl]
"""
SITE = "scheduler: slurm\ngpu: h100-80gb\n"


def plan(
    folder: Path, *words: str, model: dict[str, Any] = LLAMA, tp: int = 2, nodes: int = 4, site: str = SITE
) -> dict[str, Any]:
    """`plan --json` of a recipe that mid-trains and goes on with RL."""
    if not (folder / "text.txt").exists():  # its time is part of the fingerprint
        (folder / "text.txt").write_text("some text\n" * 50)
    split = "true" if tp > 1 else "false"
    (folder / "r.yaml").write_text(RECIPE % (model["model_type"], json.dumps(model), tp, split, nodes))
    (folder / "site.yaml").write_text(site)
    given = ["--cluster", str(folder / "site.yaml"), "--root", str(folder / "root"), "--json", *words]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(["plan", str(folder / "r.yaml"), *given]) == 0
    (told,) = json.loads(said.getvalue())
    return told


def estimate(told: dict[str, Any], stage: str) -> dict[str, Any]:
    found: dict[str, Any] = next(s for s in told["stages"] if s["stage"] == stage)["estimate"]
    return found


def test_a_training_stage_has_time_gpu_hours_memory_and_bytes(tmp_path: Path) -> None:
    """By hand: 1,000 steps of 128 sequences of 8,192 tokens on 32 H100 at 42 % x 0.97 of 989.4 TFLOP/s."""
    told = plan(tmp_path)
    found = estimate(told, "mid")
    seconds = 1000 * 128 * 8192 * 51.4666e9 / (32 * 989.4e12 * 0.42 * 0.97)
    assert found["seconds"] == pytest.approx(seconds, rel=1e-3) and 4100 < seconds < 4300
    assert found["gpu_hours"] == pytest.approx(seconds * 32 / 3600, rel=1e-3)
    assert found["mfu_source"] == "assumed" and found["lives"] == 1
    assert found["fits"] is True and found["memory_gib"] == pytest.approx(49.7, abs=0.1)
    assert found["artifact_bytes"] == 2 * PARAMETERS
    assert found["resume_bytes"] == 3 * 12 * PARAMETERS, "two are kept, while a third is written"
    assert told["warnings"] == []


def test_it_is_what_fit_tells_of_this_layout(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    told = json.loads(prism("fit", str(tmp_path), "--gpus", "32", "--tokens", str(1000 * 128 * 8192), "--json").stdout)[
        "layouts"
    ]
    wanted = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1, "micro_batch_size": 1}
    (fitted,) = [f for f in told if f["recompute"] == "none" and wanted.items() <= f.items()]
    found = estimate(plan(tmp_path), "mid")
    assert found["gpu_hours"] == fitted["gpu_hours"]
    assert found["memory_gib"] == pytest.approx(fitted["memory_gib"], abs=0.06)


def test_conversions_and_merges_write_what_they_read_and_trl_writes_fp32(tmp_path: Path) -> None:
    told = plan(tmp_path)
    assert estimate(told, "both")["artifact_bytes"] == 2 * PARAMETERS
    assert estimate(told, "mid-to-hf")["artifact_bytes"] == 2 * PARAMETERS
    assert estimate(told, "rl")["artifact_bytes"] == 4 * PARAMETERS
    for stage in ("prepare", "last"):
        assert set(estimate(told, stage).values()) == {None}


def test_a_checkpoint_outside_the_store_is_as_large_as_its_files(tmp_path: Path) -> None:
    base = tmp_path / "base"
    size = sparse_checkpoint(base, LLAMA, files=2)
    told = plan(tmp_path, "--set", f"mid.checkpoint={base}")
    (conversion,) = [s for s in told["stages"] if s["inserted"] and s["stage"].startswith("base-")]
    assert conversion["estimate"]["artifact_bytes"] == size
    absent = plan(tmp_path, "--set", "mid.checkpoint=/nowhere/base")
    (conversion,) = [s for s in absent["stages"] if s["inserted"] and s["stage"].startswith("base-")]
    assert conversion["estimate"]["artifact_bytes"] is None


def test_without_a_known_gpu_there_are_bytes_alone(tmp_path: Path) -> None:
    for site in ("scheduler: slurm\n", "scheduler: slurm\ngpu: mi300x\n"):
        found = estimate(plan(tmp_path, site=site), "mid")
        assert found["seconds"] is found["memory_gib"] is found["fits"] is None
        assert found["artifact_bytes"] == 2 * PARAMETERS
    found = estimate(plan(tmp_path, "--set", "mid.resources.gpus_per_node=0"), "mid")
    assert found["seconds"] is None


@pytest.mark.parametrize(
    ("words", "copies"),
    [
        (("save_interval=1000",), 0),  # the last step's is the artifact
        (("save_interval=999",), 1),
        (("save_interval=400",), 2),
        (("save_interval=100", "keep_last=4"), 5),
        (("save_interval=100", "keep_every=300"), 6),  # after 300, 600, 900
        (("save_interval=100", "keep_every=250"), 4),  # after 500 alone: 250 and 750 are never saved
    ],
)
def test_checkpoints_to_resume_from_are_counted_at_their_most(
    words: tuple[str, ...], copies: int, tmp_path: Path
) -> None:
    told = plan(tmp_path, *(word for w in words for word in ("--set", f"mid.{w}")))
    assert estimate(told, "mid")["resume_bytes"] == copies * 12 * PARAMETERS


def test_a_layout_that_does_not_fit_is_warned_of(tmp_path: Path) -> None:
    told = plan(tmp_path, tp=1, nodes=1)
    assert estimate(told, "mid")["fits"] is False
    (warning,) = told["warnings"]
    assert warning.startswith("mid: needs about ") and "prism-launch fit" in warning
    assert "GiB a GPU, and programs get 79 of h100-80gb" in warning
    done = prism(
        "plan", str(tmp_path / "r.yaml"), "--cluster", str(tmp_path / "site.yaml"), "--root", str(tmp_path / "root")
    )
    assert "mid: needs about" in done.stdout.replace("\n", " ")


def test_a_stage_that_outlasts_its_chain_is_warned_of_and_one_that_is_requeued_is_not(tmp_path: Path) -> None:
    chain = SITE + "limits: {continuation: chain, chain_jobs: 2}\n"
    longer = ("--set", "mid.train_iters=4000")  # 4 h 38 min in jobs of 2 h
    told = plan(tmp_path, *longer, site=chain)
    assert estimate(told, "mid")["lives"] == 3
    (warning,) = told["warnings"]
    assert "mid: takes about 4 h" in warning and "2 jobs of 2:00:00" in warning and "chain_jobs" in warning
    assert plan(tmp_path, *longer, site=chain.replace("chain_jobs: 2", "chain_jobs: 3"))["warnings"] == []
    requeued = plan(tmp_path, *longer)
    assert estimate(requeued, "mid")["lives"] == 3 and requeued["warnings"] == []


def test_past_runs_under_the_root_correct_the_time(tmp_path: Path) -> None:
    before = estimate(plan(tmp_path), "mid")
    speed = 0.21 * 0.97 * 32 * 989.4e12 / flops_per_token(architecture_of(shape_of(LLAMA)), 8192)
    layout = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    write(tmp_path / "root", receipt(tokens_per_s=speed, world_size=32, layout=layout))
    after = estimate(plan(tmp_path), "mid")
    assert after["mfu_source"] == "measured: 1 run of this model"
    assert after["seconds"] == pytest.approx(2 * before["seconds"], rel=1e-3)


def test_the_fingerprints_and_layouts_of_auto_do_not_depend_on_past_runs(tmp_path: Path) -> None:
    auto = ("--set", "mid.parallelism=auto")
    before = plan(tmp_path, *auto)
    slow = [
        receipt(fingerprint=str(n) * 20, tokens_per_s=100.0, layout={"tensor_model_parallel_size": n}) for n in (2, 4)
    ]
    write(tmp_path / "root", *slow)
    after = plan(tmp_path, *auto)
    assert [s["fingerprint"] for s in before["stages"]] == [s["fingerprint"] for s in after["stages"]]
    assert estimate(before, "mid")["memory_gib"] == estimate(after, "mid")["memory_gib"]
    assert estimate(before, "mid")["seconds"] != estimate(after, "mid")["seconds"]


def test_hybrids_and_fp32_too(tmp_path: Path) -> None:
    count = parameter_count(shape_of(GRANITE_H))
    found = estimate(plan(tmp_path, model=GRANITE_H, tp=1), "mid")
    assert found["artifact_bytes"] == 2 * count and found["seconds"] > 0
    wide = plan(tmp_path, "--set", "mid.precision=fp32", model=GRANITE_H, tp=1)
    assert estimate(wide, "mid")["artifact_bytes"] == 4 * count
    # In fp32 the masters are the weights; rows that only pad the vocabulary are kept too.
    assert found["resume_bytes"] == estimate(wide, "mid")["resume_bytes"] == 3 * 12 * padded_count(GRANITE_H)
    assert estimate(wide, "mid")["seconds"] is estimate(wide, "mid")["mfu_source"] is None


@pytest.mark.parametrize(("precision", "width"), [("bf16", 2), ("fp32", 4)])
def test_weights_that_are_not_trained_are_kept_as_they_are(precision: str, width: int, tmp_path: Path) -> None:
    """By hand, of 32 layers: queries, outputs and the keys and values of 8 of 32 heads."""
    attention = 32 * (2 * 4096**2 + 2 * 4096 * 1024)
    words = ("mid.trainable=attention", f"mid.precision={precision}")
    told = plan(tmp_path, *(word for w in words for word in ("--set", w)))
    kept = 12 * attention + width * (PARAMETERS - attention)
    assert estimate(told, "mid")["resume_bytes"] == 3 * kept


def padded_count(model: dict[str, Any]) -> int:
    shape = shape_of(model)
    return parameter_count(shape) + (shape.padded_vocab_size - shape.vocab_size) * shape.hidden_size


def test_what_is_not_counted_is_said() -> None:
    """Keys of which the configuration may still refuse some, so they are set past its checks."""
    data = {"model": {"name": "m", "family": "llama", "config": LLAMA}, "data": {"a/b": 1.0}, "train_iters": 10}
    config = decode(TrainConfig, data)
    assert uncounted(config) == []
    changes = {"fp8_format": "hybrid", "document_masking": True, "packing": "best-fit", "trainable": "attention"}
    for name, value in {**changes, "entrypoint": "pretrain_gpt.py"}.items():
        object.__setattr__(config, name, value)
    assert [line.partition(":")[0] for line in uncounted(config)] == [*changes, "entrypoint"]
    with pytest.raises(UserError, match="auto does not count the memory of FP8"):
        choose(config, Resources(nodes=4, ntasks_per_node=8, gpus_per_node=8), "h100-80gb")


def test_where_attention_alone_is_trained_time_is_less_and_memory_is_said_to_be_too_much(tmp_path: Path) -> None:
    whole, part = plan(tmp_path), plan(tmp_path, "--set", "mid.trainable=attention")
    architecture = architecture_of(shape_of(LLAMA))
    ratio = flops_per_token(architecture, 8192, "attention") / flops_per_token(architecture, 8192)
    assert 0.6 < ratio < 0.9
    assert estimate(part, "mid")["seconds"] == pytest.approx(ratio * estimate(whole, "mid")["seconds"], rel=1e-3)
    assert estimate(part, "mid")["memory_gib"] == estimate(whole, "mid")["memory_gib"]
    assert part["warnings"] == ["mid: trainable: the memory of a GPU is counted as if all weights were trained"]
