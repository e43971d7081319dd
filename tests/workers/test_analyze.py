"""analyze, end to end as a process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worker_stages import WorkerStage, make_stage, variant

from launcher.errors import UserError
from launcher.progress import Stopped
from launcher.workers import analyze
from launcher.workers.analyze import text_pieces
from launcher.workers.checkpoints import load_model
from launcher.workers.cka import linear_cka, pooled_states
from launcher.workers.problems import problem_text, read_problems
from launcher.workers.tokens import read_indexed
from launcher.workers.weight_diff import rows, weight_change


@pytest.fixture(scope="module")
def stage(
    prepared: WorkerStage, models: dict[str, Path], taught: Path, tmp_path_factory: pytest.TempPathFactory
) -> WorkerStage:
    config = {
        "pairs": [["base", "mid"], ["mid", "other"], ["base", "base"]],
        "problems": "prepare/reasoning",
        "source": "prepare/notes",
        "num_texts": 15,
    }
    inputs = {
        "base": (models["a"], "hf"),
        "mid": (taught, "hf"),
        "other": (models["b"], "hf"),
        "prepare.prompts": (prepared.partial / "prompts", "prompts"),
        "prepare.tokens": (prepared.partial / "tokens", "tokens"),
    }
    return make_stage(tmp_path_factory.mktemp("analyze"), "analyze", config, inputs)


@pytest.fixture(scope="module")
def found(stage: WorkerStage) -> dict[str, Any]:
    assert stage.run() == (0, "")
    assert stage.exit_class() == "finished"
    return dict(json.loads(stage.file("analysis", "analysis.json").read_text()))


def test_keys_that_scripts_rely_on(found: dict[str, Any]) -> None:
    assert found.keys() == {"weights", "weights_by_module", "cka", "dtypes"}
    assert all({"from", "to", "threshold", "changed_fraction", "relative_l2"} <= r.keys() for r in found["weights"])
    assert all({"from", "to", "layer", "module", "changed_fraction"} <= r.keys() for r in found["weights_by_module"])
    assert not any({"layer", "module"} & r.keys() for r in found["weights"])
    assert all({"from", "to", "layer", "value", "debiased", "texts", "n"} <= r.keys() for r in found["cka"])
    assert found["dtypes"] == {"base": ["F32"], "mid": ["F32"], "other": ["F32"]}


def test_weights_are_those_of_the_pairs(found: dict[str, Any], models: dict[str, Path], taught: Path) -> None:
    whole, _ = weight_change(models["a"], taught)
    pair = [r for r in found["weights"] if (r["from"], r["to"]) == ("base", "mid")]
    assert pair == rows(whole, {"from": "base", "to": "mid"})
    same = [r for r in found["weights"] if (r["from"], r["to"]) == ("base", "base")]
    assert [(r["changed_fraction"], r["relative_l2"]) for r in same] == [(0.0, 0.0)] * 6


def test_every_pair_has_each_layer_once_for_each_kind_of_text(found: dict[str, Any]) -> None:
    keys = [(r["from"], r["to"], r["texts"], r["layer"]) for r in found["cka"]]
    pairs = [("base", "mid"), ("mid", "other"), ("base", "base")]
    assert keys == [(*p, texts, layer) for p in pairs for texts in ("problems", "source") for layer in range(3)]
    for row in found["cka"]:
        assert row["n"] == 15
        assert row["value"] == pytest.approx(1) if row["from"] == row["to"] else row["value"] < 0.9999


def test_cka_is_taken_on_the_problems_and_on_the_source(
    found: dict[str, Any], prepared: WorkerStage, models: dict[str, Path], taught: Path
) -> None:
    texts = {"problems": [problem_text(p) for p in read_problems(prepared.file("prompts", "reasoning.jsonl"))[:15]]}
    tokenizer = load_model(taught)[1]
    texts["source"] = [tokenizer.decode(ids) for ids in text_pieces(read_indexed(prepared.file("tokens", "notes")), 15)]
    for name, chosen in texts.items():
        states = [pooled_states(*load_model(folder), chosen) for folder in (models["a"], taught)]
        values = [r["value"] for r in found["cka"] if (r["to"], r["texts"]) == ("mid", name)]
        assert values == pytest.approx([linear_cka(x, y) for x, y in zip(*states, strict=True)], abs=1e-6)


def test_too_few_texts_are_refused(stage: WorkerStage) -> None:
    few = variant(stage, "few", source="prepare/reasoning")  # its documents are too short for one piece
    with pytest.raises(UserError, match="prepare/reasoning: only 0 texts for CKA; at least 4 are needed"):
        analyze.main(few.job())


def test_stop_request_ends_it_unfinished(stage: WorkerStage) -> None:
    job = variant(stage, "stopped").job()
    job._asked.append(0.0)
    with pytest.raises(Stopped):
        analyze.main(job)


def test_pieces_are_spread_and_hold_no_end_token() -> None:
    documents = [np.array([*range(start, start + size), -1]) for start, size in ((0, 25), (100, 9), (200, 30))]
    pieces = [piece.tolist() for piece in text_pieces(documents, 10, length=10)]
    assert [p[0] for p in pieces] == [0, 10, 200, 210, 220]
    assert all(len(p) == 10 and -1 not in p for p in pieces)
    assert [p[0] for p in text_pieces(documents, 2, length=10)] == [0, 200]
    assert [p[0] for p in text_pieces(documents, 4, length=10)] == [0, 10, 200, 210]
    assert [p[0] for p in text_pieces(documents, 3, length=5)] == [0, 20, 210]
    assert text_pieces(documents, 2, length=31) == []
