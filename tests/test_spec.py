"""The contract: `stage.json` reads back as what was written, and wrong data is refused with every problem named."""

import json
from pathlib import Path
from typing import Any

import pytest

from launcher import configs, spec

EXAMPLE = Path(__file__).parent / "data" / "stage.json"


def test_stage_json_round_trip() -> None:
    stage = spec.read_stage(EXAMPLE)
    assert spec.stage_text(stage) == EXAMPLE.read_text()
    assert stage.artifact == f"artifacts/train/{stage.fingerprint}"
    config = spec.decode(configs.TrainConfig, stage.config)
    assert config.data == {"prepare/reasoning": 0.8, "prepare/general-unseen": 0.2}


def test_all_problems_at_once() -> None:
    data = {**json.loads(EXAMPLE.read_text())["config"], "train_iter": 5, "lr": "fast", "data": {"a/b": -1}}
    with pytest.raises(spec.SpecError) as caught:
        spec.decode(configs.TrainConfig, data)
    assert ("train_iter", "unknown key, did you mean train_iters?") in caught.value.problems
    assert ("lr", 'expected a number, got "fast"') in caught.value.problems


def test_bool_is_no_number() -> None:
    with pytest.raises(spec.SpecError, match="expected a whole number, got true"):
        spec.decode(configs.Resources, {"nodes": True})


def test_layout_and_intervals_are_not_identity() -> None:
    config = spec.decode(configs.TrainConfig, json.loads(EXAMPLE.read_text())["config"])
    kept = configs.identity(config)
    assert "parallelism" not in kept and "save_interval" not in kept
    assert kept["lr"] == 5e-3 and kept["model"]["config"]["hidden_size"] == 96


def test_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "stage.json"
    path.write_text(json.dumps({**json.loads(EXAMPLE.read_text()), "schema": 99}))
    with pytest.raises(spec.SpecError, match="another version"):
        spec.read_stage(path)


@pytest.mark.parametrize(
    ("hint", "data", "problem"),
    [
        (configs.AnySource, {"path": "x"}, ("kind", "is required: one of python-stdlib, files, problems, dataset")),
        (configs.AnySource, {"kind": "fils", "path": "x"}, ("kind", "did you mean files?")),
        (configs.AnySource, {"kind": ["files"]}, ("kind", "expected one of 'python-stdlib'")),
        (configs.AnySource, {"kind": "files"}, ("path", "is required")),
        (
            configs.AnySource,
            {"kind": "files", "path": "x", "terse_share": 0.5},
            ("terse_share", "kind files does not know it; kind problems does"),
        ),
        (configs.AnySource, {"kind": "files", "path": "x", "shar": 1}, ("shar", "unknown key, did you mean share?")),
        (
            configs.AnyProblemSet,
            {"path": "x", "count": 1, "task": "gcd"},
            ("task", "is no key of a published set; it is one of a generated set"),
        ),
        (configs.AnyProblemSet, {"task": "gcd"}, ("count", "is required")),
    ],
)
def test_what_is_wrong_with_an_alternative_is_said_of_the_one_that_is_meant(
    hint: Any, data: dict[str, Any], problem: tuple[str, str]
) -> None:
    with pytest.raises(spec.SpecError) as caught:
        spec.decode(hint, data)
    ((key, message),) = caught.value.problems
    assert key == problem[0] and problem[1] in message


def test_alternatives_are_told_apart() -> None:
    assert spec.decode(configs.AnySource, {"kind": "problems", "problems": "p"}) == configs.ProblemsSource(
        kind="problems", problems="p"
    )
    assert isinstance(spec.decode(configs.AnyProblemSet, {"path": "x", "count": 1}), configs.PublishedSet)
    assert isinstance(spec.decode(configs.AnyProblemSet, {"count": 1}), configs.GeneratedSet)
    assert spec.tag_of([configs.PublishedSet, configs.GeneratedSet]) is None
