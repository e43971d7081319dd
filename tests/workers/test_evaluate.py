"""evaluate: figures, and the worker as a process, unbroken and broken off."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
from worker_stages import WorkerStage, make_stage, variant

from launcher.errors import UserError
from launcher.progress import Stopped
from launcher.store import write_json
from launcher.workers import evaluate
from launcher.workers.problems import problem_text, read_problems
from launcher.workers.sampling import Completion


@pytest.fixture(scope="module")
def stage(
    prepared: WorkerStage, models: dict[str, Path], taught: Path, tmp_path_factory: pytest.TempPathFactory
) -> WorkerStage:
    """Two checkpoints, two problem sets, two temperatures: eight units."""
    config = {
        "checkpoints": ["random", "taught"],
        "benchmarks": ["prepare/reasoning", "prepare/held-out"],
        "temperatures": [0.0, 1.0],
        "batch_size": 16,
    }
    inputs = {
        "random": (models["a"], "hf"),
        "taught": (taught, "hf"),
        "prepare.prompts": (prepared.partial / "prompts", "prompts"),
    }
    return make_stage(tmp_path_factory.mktemp("evaluate"), "evaluate", config, inputs, seed=2)


def figures(stage: WorkerStage) -> tuple[list[Any], str]:
    """Results without their seconds, and samples."""
    results = json.loads(stage.file("scores", "results.json").read_text())["results"]
    return [{k: v for k, v in r.items() if k != "seconds"} for r in results], stage.file(
        "scores", "samples.jsonl"
    ).read_text()


@pytest.fixture(scope="module")
def unbroken(stage: WorkerStage) -> tuple[list[Any], str]:
    """What the worker finds as a process."""
    assert stage.run() == (0, "")
    assert stage.exit_class() == "finished"
    return figures(stage)


def test_results_and_samples_agree(prepared: WorkerStage, unbroken: tuple[list[Any], str]) -> None:
    results, text = unbroken
    samples = [json.loads(line) for line in text.splitlines()]
    keys = [(r["checkpoint"], r["benchmark"], r["temperature"], r["n"]) for r in results]
    sizes = {"reasoning": 60, "held-out": 12}
    assert keys == [(c, b, t, n) for c in ("random", "taught") for b, n in sizes.items() for t in (0.0, 1.0)]
    for r in results:
        key = {k: r[k] for k in ("checkpoint", "benchmark", "temperature")}
        mine = [s for s in samples if {k: s[k] for k in key} == key]
        problems = read_problems(prepared.file("prompts", f"{r['benchmark']}.jsonl"))
        assert [s["id"] for s in mine] == [p["id"] for p in problems]
        right = [
            s["ended"] and s["completion"].rpartition("</think>")[2] == p["answer"] and "<think>" in s["completion"]
            for s, p in zip(mine, problems, strict=True)
        ]
        assert [s["right"] for s in mine] == right
        assert r["accuracy"] == sum(right) / r["n"]
    by = {(r["checkpoint"], r["benchmark"], r["temperature"]): r for r in results}
    assert by["taught", "reasoning", 0.0]["accuracy"] > 0.1
    assert by["random", "reasoning", 1.0]["accuracy"] == 0
    assert by["random", "reasoning", 1.0]["upper95"] == 3 / 60


def test_stop_between_parts_then_going_on_gives_the_same(
    stage: WorkerStage, unbroken: tuple[list[Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = variant(stage, "stopped")
    job = broken.job()

    def write_then_ask(path: Path, value: Any) -> None:
        write_json(path, value)
        if path.name == "unit.2.json":
            job._asked.append(0.0)

    monkeypatch.setattr(evaluate, "write_json", write_then_ask)
    with pytest.raises(Stopped, match="part 4 of 8; the parts before it are kept"):
        evaluate.main(job)
    assert {p.name for p in (broken.partial / "progress").iterdir()} == {f"unit.{i}.json" for i in range(3)}
    assert not broken.file("scores", "results.json").exists()
    evaluate.main(broken.job())
    assert figures(broken) == unbroken


def test_kill_then_going_on_gives_the_same(stage: WorkerStage, unbroken: tuple[list[Any], str]) -> None:
    broken = variant(stage, "killed")
    code, _ = broken.interrupt(lambda: (broken.partial / "progress" / "unit.1.json").exists())
    assert code == -signal.SIGKILL
    done = broken.partial / "progress" / "unit.0.json"
    # A part that an earlier attempt finished is taken from there, one that is half written is not.
    content = json.loads(done.read_text())
    content["result"]["mean_length"] = -1.0
    done.write_text(json.dumps(content))
    (broken.partial / "progress" / "unit.1.json").write_text(json.dumps(content)[:100])
    evaluate.main(broken.job())
    results, samples = figures(broken)
    assert results[0]["mean_length"] == -1.0
    assert (results[1:], samples) == (unbroken[0][1:], unbroken[1])


def test_stop_request_is_heard_within_a_part(stage: WorkerStage) -> None:
    stopped = variant(stage, "at-once")
    job = stopped.job()
    job._asked.append(0.0)
    with pytest.raises(Stopped, match="part 1 of 8"):
        evaluate.main(job)
    assert not (stopped.partial / "progress" / "unit.0.json").exists()


def test_folder_that_is_no_checkpoint_is_refused(stage: WorkerStage, prepared: WorkerStage, tmp_path: Path) -> None:
    inputs = {"x": (prepared.partial / "prompts", "hf"), "prepare.prompts": (prepared.partial / "prompts", "prompts")}
    wrong = make_stage(tmp_path, "evaluate", {"checkpoints": ["x"], "benchmarks": ["prepare/held-out"]}, inputs)
    with pytest.raises(UserError, match=r"prompts: no config\.json; a Hugging Face checkpoint is wanted"):
        evaluate.main(wrong.job())


def completions(problems: list[dict[str, Any]], kinds: str) -> list[Completion]:
    """One completion a problem: Worked, Terse, wrong (x), Unfinished, bare (b)."""
    found = []
    for problem, kind in zip(problems, kinds, strict=True):
        text = problem_text(problem, terse=kind == "T").removeprefix(problem["prompt"])
        text = {"x": f"{text}1.5", "b": problem["answer"]}.get(kind, text)
        found.append(Completion(text, kind != "U", 10))
    return found


def test_figures_by_hand(prepared: WorkerStage) -> None:
    problems = read_problems(prepared.file("prompts", "held-out.jsonl"))[:10]
    result, samples = evaluate.score(problems, completions(problems, "WWWTTxxUbb"))
    assert result["accuracy"] == 0.5
    assert result["stderr"] == pytest.approx(math.sqrt(0.5 * 0.5 / 10))
    assert (result["n"], result["formed"], result["mean_length"]) == (10, 0.7, 10)
    assert (result["worked_share"], result["terse_share"]) == (0.5, 0.2)
    assert (result["worked_accuracy"], result["terse_accuracy"]) == (0.6, 1.0)
    assert not {"upper95", "lower95"} & result.keys()
    assert [s["right"] for s in samples] == [True] * 5 + [False] * 5
    assert [s["ended"] for s in samples] == [True] * 7 + [False] + [True] * 2


def test_rule_of_three(prepared: WorkerStage) -> None:
    problems = read_problems(prepared.file("prompts", "held-out.jsonl"))
    none, _ = evaluate.score(problems, completions(problems, "b" * 12))
    assert (none["accuracy"], none["stderr"], none["upper95"]) == (0, 0, 3 / 12)
    assert none["worked_accuracy"] is None
    every, _ = evaluate.score(problems, completions(problems, "W" * 12))
    assert (every["accuracy"], every["stderr"], every["lower95"]) == (1, 0, 1 - 3 / 12)


PORTS = ("taught", "prepare.prompts")


def test_several_seeds_sample_differently_and_each_as_if_alone(stage: WorkerStage, tmp_path: Path) -> None:
    config = {"checkpoints": ["taught"], "benchmarks": ["prepare/held-out"], "temperatures": [1.0], "batch_size": 16}
    inputs = {port: (stage.root / stage.spec.inputs[port].path, stage.spec.inputs[port].format) for port in PORTS}

    def samples(name: str, seed: int, **seeds: Any) -> dict[int, list[str]]:
        made = make_stage(tmp_path / name, "evaluate", {**config, **seeds}, inputs, seed=seed)
        evaluate.main(made.job())
        found: dict[int, list[str]] = {}
        for line in made.file("scores", "samples.jsonl").read_text().splitlines():
            row = json.loads(line)
            found.setdefault(row["seed"], []).append(row["completion"])
        return found

    both = samples("both", 9, seeds=[2, 5])
    assert set(both) == {2, 5} and both[2] != both[5]
    assert samples("alone", 5) == {5: both[5]}
