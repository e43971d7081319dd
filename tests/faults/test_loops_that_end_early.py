"""A library's loop that ends early, though nothing asked it to, is an error with the numbers, once; `check` counts."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_files import write_tokenizer
from worker_stages import WorkerStage, make_stage, small_prepare, write_model

from launcher import cli
from launcher.errors import UserError, WorldError
from launcher.progress import how_it_ended
from launcher.supervisor.classify import Evidence, RankExit, classify

RECIPE = """
stages:
  prepare: {{kind: prepare, tokenizer: {{vocab_size: {vocab}}}, problems: {{p: {{task: gcd, count: {count}}}}}, sources: {{t: {{kind: problems, problems: p}}}}}}
  rl: {{kind: rl, backend: trl, checkpoint: ./m, prompts: prepare/p, max_steps: 2, prompts_per_step: {step}, num_generations: 2}}
  analyze: {{kind: analyze, pairs: [[./m, rl]], problems: prepare/p}}
"""  # noqa: E501


def check(tmp_path: Path, capsys: pytest.CaptureFixture[str], **numbers: int) -> tuple[int, str]:
    write_tokenizer(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "m" / "model.safetensors").write_bytes(b"")
    (tmp_path / "r.yaml").write_text(RECIPE.format(**numbers))
    return cli.main(["check", str(tmp_path / "r.yaml")]), capsys.readouterr().err


def test_check_counts_the_problems_of_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = check(tmp_path, capsys, vocab=300, count=3, step=4)
    assert code == 2
    assert "r.yaml:4: stages.rl.prompts: prepare/p has 3 problems, and prompts_per_step takes 4" in said
    assert "r.yaml:5: stages.analyze.problems: prepare/p has 3 problems, and CKA takes 4" in said


def test_check_refuses_a_vocabulary_without_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = check(tmp_path, capsys, vocab=259, count=4, step=4)
    assert code == 2
    assert "r.yaml:3: stages.prepare.tokenizer.vocab_size: 259 is below the 260" in said
    assert "takes 4" not in said


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> WorkerStage:
    """RL whose step takes as many prompts as there are."""
    from launcher.workers import prepare

    folder = tmp_path_factory.mktemp("rl")
    problems = {"p": {"task": "gcd", "count": 4}}
    sources = {"t": {"kind": "problems", "problems": "p"}}
    prepared = make_stage(folder, "prepare", small_prepare(problems=problems, sources=sources))
    prepare.main(prepared.job())
    small = {"hidden_size": 32, "head_dim": 8, "vocab_size": 300, "num_hidden_layers": 1, "intermediate_size": 32}
    model = write_model(folder / "model", prepared.partial / "tokenizer", **small)
    config = {"backend": "trl", "checkpoint": "m", "prompts": "prepare/p", "max_steps": 2, "num_generations": 2}
    inputs = {"checkpoint": (model, "hf"), "prepare.prompts": (prepared.partial / "prompts", "prompts")}
    return make_stage(folder, "rl", {**config, "prompts_per_step": 4, "max_completion_length": 2}, inputs)


def with_steps_of(stage: WorkerStage, prompts: int) -> WorkerStage:
    from worker_stages import variant

    return variant(stage, f"steps-of-{prompts}", prompts_per_step=prompts)


def test_too_few_prompts_end_before_training(stage: WorkerStage) -> None:
    from launcher.workers import rl_trl

    with pytest.raises(UserError, match="4 different prompts, fewer than the 5 of a step; lower prompts_per_step"):
        rl_trl.main(with_steps_of(stage, 5).job())


def test_as_many_prompts_as_a_step_takes_are_enough(stage: WorkerStage) -> None:
    from launcher.workers import rl_trl

    rl_trl.main(stage.job())
    assert stage.record()["rewards"]["step"] == 2


def test_an_end_that_nobody_asked_for_is_an_error_once(stage: WorkerStage, monkeypatch: pytest.MonkeyPatch) -> None:
    from trl import GRPOTrainer

    from launcher.workers import rl_trl

    monkeypatch.setattr(GRPOTrainer, "train", lambda self, **_: None)
    with pytest.raises(WorldError, match="ended after step 0 of 2, and nothing asked it to") as caught:
        rl_trl.main(with_steps_of(stage, 2).job())
    exit_class, message, code = how_it_ended(caught.value)
    said = {"class": exit_class, "message": message}
    outcome = classify(Evidence(exits=(RankExit("rl", 0, code, said),)))
    assert (outcome.exit_class, outcome.action) == ("crashed", "stop")
