"""Makes `train` stages under a root of their own: token files, tokenizer, stage.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from launcher import spec

REPOSITORY = Path(__file__).resolve().parents[3]
EXAMPLE = REPOSITORY / "tests" / "data" / "stage.json"


def model(name: str, **changes: Any) -> dict[str, Any]:
    """A model of `recipes/models/`, with changes to its config.json."""
    data: dict[str, Any] = yaml.safe_load((REPOSITORY / "recipes" / "models" / f"{name}.yaml").read_text())
    data["config"].update(changes)
    return data


def write_tokens(folder: Path, sources: Mapping[str, int], vocab: int = 512, seed: int = 0) -> None:
    """Token files of about so many tokens each: documents of a language with some order, ids 2 .. vocab - 1."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, tokens) in enumerate(sources.items()):
        rng = np.random.default_rng([seed, number])
        step = int(rng.integers(3, 40))
        builder = IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=np.uint16)
        while tokens > 0:
            length = min(int(rng.integers(20, 200)), tokens)
            noise = rng.integers(0, 5, length)
            document = 2 + (int(rng.integers(vocab)) + np.cumsum(step + noise)) % (vocab - 2)
            builder.add_document(document.astype(np.uint16), [length])
            tokens -= length
        builder.finalize(str(folder / f"{name}.idx"))


def write_tokenizer(folder: Path, vocab: int = 512) -> None:
    """The two files of a tokenizer that the trainer reads; ids 0 and 1 are <pad> and <eos>."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = {"<pad>": 0, "<eos>": 1, **{f"t{i}": i for i in range(2, vocab)}}
    tokenizer = {"model": {"type": "WordLevel", "vocab": ids}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {"pad_token": "<pad>", "eos_token": {"content": "<eos>"}, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@dataclasses.dataclass(frozen=True)
class TrainStage:
    """A stage on disk, and where its artifact is made."""

    root: Path
    spec: spec.StageSpec

    @property
    def path(self) -> Path:
        return self.root / "runs" / "test" / "stages" / self.spec.stage / "stage.json"

    @property
    def workdir(self) -> Path:
        return self.root / f"{self.spec.artifact}.partial"

    @property
    def checkpoint(self) -> Path:
        return self.workdir / "checkpoint"

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.workdir / "metrics.jsonl").read_text().splitlines()]

    def losses(self) -> list[float]:
        return [row["loss"] for row in self.metrics()]

    def record(self) -> dict[str, Any]:
        return json.loads((self.workdir / "record.json").read_text())


def make_stage(root: Path, name: str = "base", *, start: TrainStage | None = None, **changes: Any) -> TrainStage:
    """Write `stage.json` of a train stage; `start` is the finished stage whose checkpoint it goes on from.

    `changes` are of the config; `data` maps sources of the one prepare stage to weights.
    """
    example = json.loads(EXAMPLE.read_text())
    config = {**example["config"], "checkpoint": None, "train_iters": 8, "save_interval": 100, "seq_length": 32}
    config |= {"data": {"prepare/one": 1.0}, "lr_warmup_fraction": 0.1, **changes}
    config["checkpoint"] = start.spec.stage if start else None
    seed = config.pop("seed", 0)
    inputs = {k: v for k, v in example["inputs"].items() if k != "checkpoint"}
    if start:
        relative = str(start.checkpoint.relative_to(root))
        inputs["checkpoint"] = {"path": relative, "format": "megatron", "fingerprint": "x" * 20}
    fingerprint = name.ljust(20, "0")
    data = {**example, "stage": name, "fingerprint": fingerprint, "seed": seed, "config": config, "inputs": inputs}
    data["outputs"] = {"checkpoint": {"path": f"artifacts/train/{fingerprint}/checkpoint", "format": "megatron"}}
    stage = TrainStage(root, spec.decode(spec.StageSpec, data))
    stage.path.parent.mkdir(parents=True, exist_ok=True)
    stage.path.write_text(spec.stage_text(stage.spec))
    return stage


def tokens_dir(root: Path) -> Path:
    """Where the port `prepare.tokens` of every stage here lies."""
    return root / json.loads(EXAMPLE.read_text())["inputs"]["prepare.tokens"]["path"]


def tokenizer_dir(root: Path) -> Path:
    """Where the port `prepare.tokenizer` of every stage here lies."""
    return root / json.loads(EXAMPLE.read_text())["inputs"]["prepare.tokenizer"]["path"]
