"""Stages for the workers' tests: a `stage.json` under a root of its own, run as a process or in this one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from launcher.progress import StageJob
from launcher.spec import Input, Output, StageSpec, Step, stage_text

REPOSITORY = Path(__file__).resolve().parents[2]
MODULES = {"rl": "rl_trl"}
PORTS = {
    "prepare": {"tokenizer": "tokenizer", "tokens": "tokens", "prompts": "prompts"},
    "rl": {"checkpoint": "hf"},
    "merge": {"checkpoint": "hf"},
    "evaluate": {"scores": "scores"},
    "analyze": {"analysis": "analysis"},
}
#: Chain sums of four one-digit terms whose totals stay within 0..9: the demo's problems.
CHAIN_SUM = {
    "task": "chain_sum",
    "settings": {"min_terms": 4, "max_terms": 4, "min_digits": 1, "max_digits": 1},
    "totals": [0, 9],
}


@dataclass(frozen=True)
class WorkerStage:
    """A stage on disk."""

    root: Path
    spec: StageSpec

    @property
    def partial(self) -> Path:
        """Where its artifact is made."""
        return self.root / f"{self.spec.artifact}.partial"

    def file(self, port: str, name: str) -> Path:
        """A file of an output."""
        return self.partial / port / name

    def job(self) -> StageJob:
        """The job as a worker holds it."""
        attempt = self.root / "attempts" / self.spec.fingerprint
        attempt.mkdir(parents=True, exist_ok=True)
        return StageJob(self.spec, self.root, attempt, self.spec.kind)

    def start(self) -> subprocess.Popen[str]:
        """The worker as a process of its own."""
        job = self.job()
        (job.attempt_dir / "stage.json").write_text(stage_text(self.spec))
        for old in job.attempt_dir.glob("exit.*"):
            old.unlink()
        env = {**os.environ, "PRISM_ROOT": str(self.root), "PRISM_ATTEMPT_DIR": str(job.attempt_dir)}
        env |= {"PRISM_STEP": self.spec.kind, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        module = f"launcher.workers.{MODULES.get(self.spec.kind, self.spec.kind)}"
        argv = [sys.executable, "-m", module, str(job.attempt_dir / "stage.json")]
        return subprocess.Popen(argv, env=env, cwd=self.root, text=True, stdout=-1, stderr=-1)

    def run(self) -> tuple[int, str]:
        """Exit code and standard error of the worker."""
        process = self.start()
        _, errors = process.communicate(timeout=300)
        return process.returncode, errors

    def interrupt(self, when: Callable[[], bool], with_signal: int = signal.SIGKILL) -> tuple[int, str]:
        """Start the worker, signal it as soon as `when` is true, and wait for its end."""
        process = self.start()
        deadline = time.monotonic() + 240
        while process.poll() is None and not when():
            assert time.monotonic() < deadline, "the moment to interrupt never came"
            time.sleep(0.01)
        process.send_signal(with_signal)
        _, errors = process.communicate(timeout=240)
        return process.returncode, errors

    def exit_class(self) -> str:
        """How the worker says that it ended."""
        path = self.job().attempt_dir / f"exit.{self.spec.kind}.0.json"
        return str(json.loads(path.read_text())["class"])

    def record(self) -> dict[str, Any]:
        """What the worker wrote for the receipt."""
        return dict(json.loads((self.partial / "record.json").read_text()))


def make_stage(
    root: Path,
    kind: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, tuple[Path, str]] | None = None,
    seed: int = 0,
    name: str = "",
) -> WorkerStage:
    """A stage of `kind`; `inputs` maps ports to (folder, format). `name` tells artifacts under one root apart."""
    root.mkdir(parents=True, exist_ok=True)
    fingerprint = f"{name or kind}-{seed}"
    ports: dict[str, str] = PORTS[kind]
    spec = StageSpec(
        run="tests",
        stage=kind,
        kind=kind,  # type: ignore[arg-type]
        kind_version=1,
        fingerprint=fingerprint,
        config=dict(config),
        seed=seed,
        inputs={p: Input(str(path), f, "0" * 20) for p, (path, f) in (inputs or {}).items()},  # type: ignore[arg-type]
        outputs={p: Output(f"artifacts/{kind}/{fingerprint}/{p}", f) for p, f in ports.items()},  # type: ignore[arg-type]
        steps=(Step(kind, ("{python}",)),),
    )
    return WorkerStage(root, spec)


def variant(stage: WorkerStage, name: str, **config: Any) -> WorkerStage:
    """The same stage with another artifact and changes to its config."""
    spec = make_stage(
        stage.root, stage.spec.kind, {**stage.spec.config, **config}, seed=stage.spec.seed, name=name
    ).spec
    return WorkerStage(stage.root, replace(spec, inputs=stage.spec.inputs))


def demo_stage(name: str) -> dict[str, Any]:
    """A stage of the demo's recipe as its worker's config."""
    stage: dict[str, Any] = yaml.safe_load((REPOSITORY / "recipes" / "demo.yaml").read_text())["stages"][name]
    return {key: value for key, value in stage.items() if key != "kind"}


def small_prepare(**changes: Any) -> dict[str, Any]:
    """A prepare config in miniature: two problem sets, problems and files as sources."""
    config: dict[str, Any] = {
        "tokenizer": {"vocab_size": 300},
        "problems": {
            "held-out": {**CHAIN_SUM, "count": 12, "seed_offset": 1000},
            "reasoning": {**CHAIN_SUM, "count": 60, "seed_offset": 1, "exclude": ["held-out"]},
        },
        "sources": {"reasoning": {"kind": "problems", "problems": "reasoning", "terse_share": 0.5}},
    }
    return {**config, **changes}


def write_model(folder: Path, tokenizer: Path, name: str = "llama-tiny", seed: int = 0, **changes: Any) -> Path:
    """A checkpoint with random weights of a model in `recipes/models/`, and the tokenizer beside it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    recipe = yaml.safe_load((REPOSITORY / "recipes" / "models" / f"{name}.yaml").read_text())
    config = {**recipe["config"], **changes}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, recipe["init_method_std"])
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def teach(source: Path, target: Path, problems: list[dict[str, Any]], steps: int = 60) -> Path:
    """Train a checkpoint on the text of problems, for as many steps as leave it unsure."""
    import torch

    from launcher.workers.checkpoints import load_model
    from launcher.workers.problems import problem_text

    model, tokenizer = load_model(source)
    texts = [problem_text(p, terse=i % 2 == 0) + tokenizer.eos_token for i, p in enumerate(problems)]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target
