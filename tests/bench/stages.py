"""`train` stages for measurements: token files, tokenizer, stage.json under a root, and the worker that runs one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy
import yaml

from launcher import spec, steps, store
from tests.bench.measure import CHECKOUT

EXAMPLE = CHECKOUT / "tests" / "data" / "stage.json"


def model_named(name: str) -> dict[str, Any]:
    """A model of `recipes/models/`."""
    found: dict[str, Any] = yaml.safe_load((CHECKOUT / "recipes" / "models" / f"{name}.yaml").read_text())
    return found


@dataclass(frozen=True)
class Root:
    """A folder with one prepare stage's tokens and tokenizer, under which train stages run."""

    path: Path
    vocab_size: int

    def fill(self, tokens: int, source: str = "text") -> None:
        """Write `tokens` random ids as documents of a thousand on average, and a tokenizer of the whole vocabulary."""
        from launcher.workers.tokens import token_dtype, write_indexed

        ports = json.loads(EXAMPLE.read_text())["inputs"]
        folders = {name: self.path / ports[f"prepare.{name}"]["path"] for name in ("tokens", "tokenizer")}
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        random = numpy.random.default_rng(0)
        documents, left = [], tokens
        while left > 0:
            length = min(left, int(random.integers(16, 2000)))
            documents.append(random.integers(2, self.vocab_size, length))
            left -= length
        write_indexed(folders["tokens"] / source, documents, token_dtype(self.vocab_size))
        ids = {"<pad>": 0, "<eos>": 1, **{f"t{i}": i for i in range(2, self.vocab_size)}}
        tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "vocab": ids, "unk_token": "<pad>"}}
        config = {"pad_token": "<pad>", "eos_token": "<eos>", "tokenizer_class": "PreTrainedTokenizerFast"}
        (folders["tokenizer"] / "tokenizer.json").write_text(json.dumps({**tokenizer, "added_tokens": []}))
        (folders["tokenizer"] / "tokenizer_config.json").write_text(json.dumps(config))


@dataclass(frozen=True)
class Stage:
    """A train stage on disk, run once as a process of its own."""

    root: Root
    spec: spec.StageSpec

    @property
    def folder(self) -> Path:
        """Where stage.json and the attempt lie."""
        return self.root.path / "runs" / "bench" / "stages" / self.spec.stage

    @property
    def workdir(self) -> Path:
        """The artifact that it makes."""
        return store.partial_dir(self.root.path, self.spec.artifact)

    @property
    def checkpoint(self) -> Path:
        """The weights that it leaves."""
        return self.workdir / "checkpoint"

    @property
    def log(self) -> str:
        """What the worker wrote."""
        return (self.folder / "log").read_text(errors="replace")

    def metrics(self) -> list[dict[str, Any]]:
        """A line a step."""
        return [json.loads(line) for line in (self.workdir / "metrics.jsonl").read_text().splitlines()]

    def record(self) -> dict[str, Any]:
        """What it tells of itself for the receipt."""
        found: dict[str, Any] = json.loads((self.workdir / "record.json").read_text())
        return found

    def run(self, device: Literal["gpu", "cpu"], timeout: float = 900) -> float:
        """Run the worker to its end; returns wall seconds. Raises RuntimeError with its last words where it fails.

        On a machine with a GPU, "cpu" hides it.
        """
        attempt = self.folder / "attempt"
        attempt.mkdir(parents=True)
        stage_json = self.folder / "stage.json"
        stage_json.write_text(spec.stage_text(self.spec))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        step = self.spec.steps[0]
        late = {"hosts": {step.name: "127.0.0.1"}, "ports": {step.name: port}}
        place = steps.place_of(self.spec, self.root.path, stage_json, attempt, sys.executable, **late)
        argv, variables = steps.local_commands(self.spec, step, place, "")[0]
        surroundings = {**os.environ, "PYTHONPATH": str(CHECKOUT), **variables}
        if device == "cpu":
            surroundings["CUDA_VISIBLE_DEVICES"] = ""
        began = time.monotonic()
        with (self.folder / "log").open("w") as log:
            done = subprocess.run(
                argv, env=surroundings, cwd=CHECKOUT, stdout=log, stderr=subprocess.STDOUT, timeout=timeout
            )
        if done.returncode != 0:
            words = "\n".join(self.log.strip().splitlines()[-12:])
            raise RuntimeError(f"{self.spec.stage}: exit code {done.returncode}: {words}")
        return time.monotonic() - began


def make_stage(root: Root, name: str, model: Mapping[str, Any], start: Stage | None = None, **changes: Any) -> Stage:
    """A train stage; `start` is a finished one whose weights it starts from, `changes` are of its config."""
    example = json.loads(EXAMPLE.read_text())
    inputs = {port: found for port, found in example["inputs"].items() if port != "checkpoint"}
    if start is not None:
        path = str(start.checkpoint.relative_to(root.path))
        inputs["checkpoint"] = {"path": path, "format": "megatron", "fingerprint": "0" * 20}
    config = {**example["config"], "checkpoint": start.spec.stage if start else None, "data": {"prepare/text": 1.0}}
    config |= {"model": dict(model), "save_interval": 10**6, "lr": 1e-4, **changes}
    fingerprint = name.ljust(20, "0")
    outputs = {"checkpoint": {"path": f"artifacts/train/{fingerprint}/checkpoint", "format": "megatron"}}
    data = {**example, "run": "bench", "stage": name, "fingerprint": fingerprint, "config": config}
    data |= {"inputs": inputs, "outputs": outputs}
    if config["entrypoint"]:
        step = example["steps"][0]
        argv = [w.replace("launcher.workers.train", "launcher.workers.train_script") for w in step["argv"]]
        data["steps"] = [{**step, "argv": argv}]
    return Stage(root, spec.decode(spec.StageSpec, data))
