"""One-stage artifacts that the counting worker makes, and supervisors that make them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher import store
from launcher.configs import Resources
from launcher.run_record import PlannedStage, RunRecord
from launcher.spec import Input, Limits, Output, StageSpec, Step, stage_text

CHECKOUT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("counter_worker.py")


def counting_step(name: str = "count", ntasks: int = 1, **options: Any) -> Step:
    """A step that runs the counting worker."""
    words = tuple(f"{k}={v}" for k, v in options.items())
    return Step(name=name, argv=("{python}", str(WORKER), "{stage_json}", *words), ntasks=ntasks)


def asking(stage: PlannedStage, resources: Resources, *servers: Step) -> PlannedStage:
    """The stage on other resources, its main program on all of their nodes; `servers` beside it."""
    steps = (replace(stage.spec.steps[0], nodes=resources.nodes), *servers)
    return replace(stage, spec=replace(stage.spec, steps=steps), resources=resources)


def counting_stage(*steps: Step, stage: str = "count", fingerprint: str = "f" * 20, **changes: Any) -> StageSpec:
    """A train stage whose steps are given, with short limits."""
    artifact = f"artifacts/train/{fingerprint}"
    spec = StageSpec(
        run="run",
        stage=stage,
        kind="train",
        kind_version=1,
        fingerprint=fingerprint,
        config={},
        seed=0,
        inputs={},
        outputs={"checkpoint": Output(f"{artifact}/checkpoint", "megatron")},
        steps=steps,
        limits=Limits(hang_s=30.0, save_s=10.0),
    )
    return replace(spec, **changes)


def counting_run(*stages: tuple[str, tuple[str, ...], dict[str, Any]]) -> RunRecord:
    """A run of counting stages: (name, those it reads, options of the worker); the number decides the fingerprint."""
    planned: dict[str, PlannedStage] = {}
    for number, (name, depends, options) in enumerate(stages):
        inputs = {d: _output_of(planned[d].spec) for d in depends}
        spec = counting_stage(counting_step(**options), stage=name, fingerprint=f"{number:020d}", inputs=inputs)
        planned[name] = PlannedStage(spec, depends, Resources())
    made = tuple(planned.values())
    return RunRecord("run", "recipe.yaml", (), "local", {}, made, created=0.0, versions={})


def _output_of(spec: StageSpec) -> Input:
    return Input(spec.outputs["checkpoint"].path, "megatron", spec.fingerprint)


class Store:
    """A root, and supervisors started in it."""

    def __init__(self, root: Path):
        self.root = root

    def start(self, spec: StageSpec, **variables: str) -> subprocess.Popen[str]:
        """Start an attempt; returns its supervisor."""
        path = store.stage_dir(self.root, spec.run, spec.stage) / "stage.json"
        store.write_atomic(path, stage_text(spec))
        attempt = store.new_attempt(path.parent)
        ours = {"PYTHONPATH": str(CHECKOUT), "PRISM_ROOT": str(self.root), "PRISM_ATTEMPT": str(attempt)}
        command = [sys.executable, "-m", "launcher.supervisor", str(path)]
        environment = {**os.environ, **ours, **variables}
        return subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=attempt
        )

    def run(self, spec: StageSpec, **variables: str) -> int:
        """Run an attempt to its end; returns the exit code."""
        process = self.start(spec, **variables)
        process.communicate(timeout=60)
        return process.returncode

    def attempt_dir(self, spec: StageSpec, number: int = 1) -> Path:
        return store.stage_dir(self.root, spec.run, spec.stage) / f"local.{number}"

    def events(self, spec: StageSpec, number: int = 1) -> list[dict[str, Any]]:
        lines = (self.attempt_dir(spec, number) / "events.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def end(self, spec: StageSpec, number: int = 1) -> dict[str, Any]:
        last = self.events(spec, number)[-1]
        assert last["event"] == "end"
        return last

    def wait_for(self, found: Callable[[], Any], seconds: float = 30.0) -> Any:
        import time

        end = time.monotonic() + seconds
        while time.monotonic() < end:
            value = found()
            if value:
                return value
            time.sleep(0.02)
        raise AssertionError("did not happen in time")

    def step_reached(self, spec: StageSpec, step: int, number: int = 1) -> bool:
        beats = [store.read_json(p) for p in self.attempt_dir(spec, number).glob("heartbeat.*.json")]
        return any(b and b["step"] >= step for b in beats)

    def processes(self) -> list[int]:
        """Living processes of this store, by their environment."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if f"PRISM_ROOT={self.root}".encode() in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
            except OSError:
                continue
        return [pid for pid in found if store.process_start(pid) is not None]
