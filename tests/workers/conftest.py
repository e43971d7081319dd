"""What the workers' tests share: prepared data and checkpoints with random weights, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from worker_stages import WorkerStage, make_stage, small_prepare, write_model


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> WorkerStage:
    """A prepare stage in miniature, done in this process."""
    from launcher.workers import prepare

    folder = tmp_path_factory.mktemp("prepared")
    (folder / "notes.txt").write_text("".join(f"Line {i} of {i * i % 97} of the notes.\n" for i in range(400)))
    config = small_prepare()
    config["sources"]["notes"] = {"kind": "files", "path": str(folder / "notes.txt")}
    stage = make_stage(folder / "root", "prepare", config, seed=5)
    prepare.main(stage.job())
    return stage


@pytest.fixture(scope="session")
def models(prepared: WorkerStage, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints with random weights: two Llamas and a Nemotron-H, smaller than the demo's."""
    folder = tmp_path_factory.mktemp("models")
    small = {"hidden_size": 32, "head_dim": 8, "vocab_size": 300}
    llama = {**small, "num_hidden_layers": 2, "intermediate_size": 64}
    nemotron = {**small, "intermediate_size": 48, "mamba_num_heads": 4, "mamba_head_dim": 16, "chunk_size": 16}
    tokenizer = prepared.partial / "tokenizer"
    return {
        "a": write_model(folder / "a", tokenizer, seed=1, **llama),
        "b": write_model(folder / "b", tokenizer, seed=2, **llama),
        "nemotron": write_model(folder / "nemotron", tokenizer, "nemotron-h-tiny", seed=3, **nemotron),
    }


@pytest.fixture(scope="session")
def taught(prepared: WorkerStage, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint `a` after it learnt the texts of 24 problems nearly by heart: it earns some rewards, not all."""
    from worker_stages import teach

    from launcher.workers.problems import read_problems

    problems = read_problems(prepared.file("prompts", "reasoning.jsonl"))[:24]
    return teach(models["a"], tmp_path_factory.mktemp("taught") / "model", problems)
