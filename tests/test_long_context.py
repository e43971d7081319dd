"""Long-context recovery in miniature, as `run` does it: a merge, then attention trained on longer sequences."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).resolve().parent.parent
RECIPE = """
name: recovery
model: llama-tiny
stages:
  prepare:
    kind: prepare
    tokenizer: {vocab_size: 512}
    sources:
      general: {kind: python-stdlib, share: [0.0, 0.5], max_bytes: 60000}
      long: {kind: python-stdlib, share: [0.5, 1.0], max_bytes: 60000}
  base: &train
    kind: train
    data: {prepare/general: 1.0}
    seq_length: 64
    global_batch_size: 4
    train_iters: 3
    lr: 5.0e-3
    adam_eps: 1.0e-8
    precision: fp32
  midtrain:
    <<: *train
    checkpoint: base
    train_iters: 4
  merge:
    kind: merge
    checkpoints: [base, midtrain]
    weights: [0.15, 0.85]
  long-context:
    <<: *train
    checkpoint: merge
    trainable: attention
    data: {prepare/long: 1.0}
    seq_length: 256
    global_batch_size: 2
    train_iters: 5
    lr_decay_style: exponential
    lr_warmup_fraction: 0.2
    min_lr_ratio: 0.0
    parallelism: {context_parallel_size: 2}
    resources: {ntasks_per_node: 2}
"""


def prism(*words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "launcher.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def tensors(checkpoint: Path) -> dict[str, np.ndarray]:
    from launcher.convert.folders import open_checkpoint

    reader = open_checkpoint(checkpoint).reader
    return {name: reader.read(name).numpy() for name in reader.entries}


def test_merge_then_attention_over_two_ranks_to_a_rate_of_0(tmp_path: Path) -> None:
    (tmp_path / "recovery.yaml").write_text(RECIPE)
    root = tmp_path / "root"
    prism("run", str(tmp_path / "recovery.yaml"), "--cluster", "local", "--root", str(root))
    record = json.loads((root / "runs" / "recovery" / "run.json").read_text())
    folders = {
        s["spec"]["stage"]: root / "artifacts" / s["spec"]["kind"] / s["spec"]["fingerprint"] for s in record["stages"]
    }
    assert list(folders) == ["prepare", "base", "midtrain", "merge", "long-context"]
    receipts = {name: json.loads((path / "artifact.json").read_text()) for name, path in folders.items()}
    base, midtrain, merged, final = (
        tensors(folders[name] / "checkpoint") for name in ("base", "midtrain", "merge", "long-context")
    )
    wanted = {n: base[n] * np.float32(0.15) + midtrain[n] * np.float32(0.85) for n in base}
    assert merged.keys() == wanted.keys() == final.keys()
    assert [n for n in wanted if merged[n].tobytes() != wanted[n].tobytes()] == []
    moved = {n for n in merged if merged[n].tobytes() != final[n].tobytes()}
    assert moved == {n for n in merged if n.endswith(("linear_qkv.weight", "linear_proj.weight"))} != set()

    facts: dict[str, Any] = receipts["long-context"]["record"]
    assert facts["layout"]["context_parallel_size"] == 2
    assert 0 < facts["trainable_parameters"] < facts["parameters"]
    lines = (folders["long-context"] / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line)["lr"] for line in lines]
    assert [round(rate / 5e-3, 6) for rate in rates] == [0.0, *(round(2 ** (1 - i / 4) - 1, 6) for i in range(4))]

    told = json.loads(prism("report", "recovery", "--root", str(root), "--json"))
    (row,) = (row for row in told["stages"] if row["kind"] == "merge")
    assert row["engine"] == "0.15 × base + 0.85 × midtrain"
    assert row["verification"]["read_back"] == "the bytes that were computed"
    page = (root / "runs" / "recovery" / "report" / "report.html").read_text()
    assert "Merged: merge = 0.15 × base + 0.85 × midtrain." in page and "the bytes that were computed" in page
    assert "merge" in prism("status", "recovery", "--root", str(root))
