"""The contract: `stage.json` reads back as what was written, and wrong data is refused with every problem named."""

import json
from pathlib import Path

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
