"""What the report says in numbers, against a run whose every figure differs from its neighbours."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from report_run import ALL, CHANGES, TRACES, end, make_run, on_gpus, plan_run, rl_metrics, train_metrics, write_lines

from launcher import store
from launcher.errors import UserError
from launcher.report import collect
from launcher.report.collect import TABLES, pooled


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("root")
    return collect(root, make_run(root, plan_run()))


def test_the_rows_that_scripts_rely_on_have_their_keys(data: dict[str, Any]) -> None:
    wanted = {
        "results": {"checkpoint", "benchmark", "temperature", "accuracy", "stderr", "n"},
        "weights": {"from", "to", "threshold", "changed_fraction", "relative_l2"},
        "weights_by_module": {"from", "to", "layer", "module", "threshold", "changed_fraction", "relative_l2"},
        "cka": {"from", "to", "layer", "value"},
    }
    for table, keys in wanted.items():
        assert data[table] and all(keys <= set(row) for row in data[table]), table
    assert not any("module" in row or "layer" in row for row in data["weights"])


def test_the_whole_is_json_and_every_table_has_rows(data: dict[str, Any]) -> None:
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert {name for name in TABLES if not data[name]} == {"results_by_seed"}, "one seed: no rows by seed"
    assert data["missing"] == []


def test_each_result_stands_at_its_checkpoint_and_temperature(data: dict[str, Any]) -> None:
    assert len(data["results"]) == 12
    for row in data["results"]:
        worked, right, terse, terse_right = TRACES.get((row["checkpoint"], row["temperature"]), (0, 0, 0, 0))
        assert abs(row["accuracy"] - worked * right - terse * terse_right) < 1 / 500
        assert (row["stage"], row["benchmark"], row["worked_share"]) == ("evaluate", "held-out", worked)


def test_weight_change_belongs_to_its_pair(data: dict[str, Any]) -> None:
    found = {(r["from"], r["to"]): r["relative_l2"] for r in data["weights"]}
    assert found == {pair: norm for pair, (_, norm) in CHANGES.items()}
    assert len(data["weights"]) == 18 and len(data["weights_by_module"]) == 33


def test_curves_and_rewards_belong_to_their_stage(data: dict[str, Any]) -> None:
    record = plan_run()
    for stage, make in (("base", train_metrics), ("midtrain", train_metrics)):
        wanted = make(record.stage(stage).spec)
        got = [r for r in data["training"] if r["stage"] == stage]
        assert [r["loss"] for r in got] == [r["loss"] for r in wanted]
    for stage in ("rl-from-base", "rl-from-midtrain"):
        got = [r for r in data["rl"] if r["stage"] == stage]
        assert [r["reward"] for r in got] == [r["reward"] for r in rl_metrics(record.stage(stage).spec)]
        assert {r["samples"] for r in got} == {16 * 8}
    zeros = {r["stage"]: (r["start"], r["all_zero"], r["backend"]) for r in data["rewards"]}
    assert zeros == {"rl-from-base": ("base", True, "trl"), "rl-from-midtrain": ("midtrain", False, "trl")}


def test_stages_carry_their_cost_engine_and_start(data: dict[str, Any]) -> None:
    rows = {r["stage"]: r for r in data["stages"]}
    assert [rows[name]["seconds"] for name in ALL] == [10.0 * i + 0.25 for i in range(1, 10)]
    assert rows["base"]["engine"] == "megatron-core on a CPU with reference kernels"
    assert rows["rl-from-base"]["engine"] == "trl (grpo) on a CPU"
    assert rows["midtrain-to-hf"]["verification"]["tensors_read"] == 32
    starts = {name: row["start"] for name, row in rows.items() if row["start"]}
    assert starts == {"midtrain": "base", "rl-from-base": "base", "rl-from-midtrain": "midtrain"}


def test_costs_are_those_of_all_attempts(data: dict[str, Any]) -> None:
    """Stages with an odd number crashed first: 80 s, of whose 40 steps 10 had to be done again."""
    rows = {r["stage"]: r for r in data["costs"]}
    first, second = (rows[name] for name in ALL[:2])
    assert (first["attempts"], first["classes"], first["seconds"]) == (2, {"crashed": 1, "finished": 1}, 80 + 101)
    assert first["lost_seconds"] == pytest.approx(20) and first["lost_share"] == pytest.approx(20 / 181)
    assert (second["attempts"], second["seconds"], second["lost_seconds"]) == (1, 102, 0)
    record = plan_run()
    resources = record.stage("prepare").resources
    cores = resources.nodes * resources.ntasks_per_node * resources.cpus_per_task
    assert first["gpu_hours"] == 0 and first["core_hours"] == pytest.approx(cores * 181 / 3600)
    assert first["core_use"] == pytest.approx(9.5 / (10.25 * cores)) and first["queue_seconds"] is None
    attempts = [r for r in data["attempts"] if r["stage"] == "prepare"]
    assert [(r["class"], r["first_step"], r["last_step"]) for r in attempts] == [
        ("crashed", 1, 40),
        ("finished", 31, 100),
    ]
    assert data["cost"]["classes"] == {"crashed": 5, "finished": 9}
    assert data["cost"]["attempts"] == 14 == len(data["attempts"])


def test_on_gpus_hours_are_gpu_hours_and_waiting_is_told(tmp_path: Path) -> None:
    record = make_run(tmp_path, on_gpus(plan_run()), ["prepare", "base"])
    folder = store.stage_dir(tmp_path, "demo", "base")
    for number, old in enumerate(sorted(folder.iterdir())):
        old.rename(folder / f"77.{number}")
    start = 1.76e9 + 2000  # of the second stage: one attempt, 100 s later; what it reads was whole long before
    data = collect(tmp_path, record, {"77": start + 40})
    rows = {r["stage"]: r for r in data["costs"]}
    assert rows["base"]["gpu_hours"] == pytest.approx(16 * 102 / 3600)
    assert rows["base"]["queue_seconds"] == pytest.approx(60) and rows["prepare"]["queue_seconds"] is None
    cost = data["cost"]
    assert cost["gpu_hours"] == pytest.approx(16 * (102 + 181) / 3600) and cost["queue_seconds"] == pytest.approx(60)
    assert cost["lost_share"] == pytest.approx(20 / 283)


def test_a_stage_that_another_run_made_costs_this_one_nothing(tmp_path: Path) -> None:
    make_run(tmp_path, plan_run("first"))
    data = collect(tmp_path, make_run(tmp_path, plan_run("second"), []))
    assert {r["made_by_run"] for r in data["stages"]} == {"first"}
    assert data["cost"] == {
        "attempts": 0, "seconds": 0, "gpu_hours": 0, "core_hours": 0, "queue_seconds": None, "lost_share": None,
        "classes": {},
    }  # fmt: skip
    assert all(r["core_use"] is None for r in data["costs"])


def test_sources_say_which_hold_terse_traces(data: dict[str, Any]) -> None:
    terse = {r["name"]: r["terse_share"] for r in data["sources"]}
    assert terse == {"general": None, "general-unseen": None, "general-probe": None, "reasoning": 0.5}
    mix = {(r["stage"], r["source"]): r["epochs"] for r in data["data_mix"]}
    assert mix["midtrain", "prepare/reasoning"] == pytest.approx(4 * mix["midtrain", "prepare/general-unseen"])


def test_a_part_of_a_run_is_reported_with_what_it_lacks(tmp_path: Path) -> None:
    record = make_run(tmp_path, plan_run(), ["prepare", "base"])
    spec = record.stage("midtrain").spec
    rows = train_metrics(spec)[:7]
    write_lines(store.partial_dir(tmp_path, spec.artifact) / "metrics.jsonl", rows, end='{"iteration": 9')
    end(tmp_path, record, "rl-from-base", "crashed", "step rl, rank 0: no such tensor\nand more")
    data = collect(tmp_path, record)
    assert len([r for r in data["training"] if r["stage"] == "midtrain"]) == 7
    assert data["results"] == data["weights"] == data["cka"] == []
    states = {r["stage"]: r["state"] for r in data["stages"]}
    assert (states["base"], states["rl-from-base"], states["evaluate"]) == ("done", "failed", "waiting")
    assert "rl-from-base (rl) failed: step rl, rank 0: no such tensor" in data["missing"]
    assert len(data["missing"]) == 7


def test_a_stage_that_was_asked_to_stop_has_not_failed(tmp_path: Path) -> None:
    record = make_run(tmp_path, plan_run(), ["prepare"])
    end(tmp_path, record, "base", "time-limit", "saved and stopped as asked")
    assert "base (train) was stopped: saved and stopped as asked" in collect(tmp_path, record)["missing"]


def test_an_artifact_without_one_of_its_files_is_not_reported(tmp_path: Path) -> None:
    record = make_run(tmp_path, plan_run())
    (tmp_path / record.stage("evaluate").spec.artifact / "scores" / "results.json").unlink()
    data = collect(tmp_path, record)
    assert data["results"] == [] and any(line.startswith("evaluate") for line in data["missing"])


def test_a_figure_that_is_no_number_is_null(tmp_path: Path) -> None:
    record = make_run(tmp_path, plan_run(), ["prepare"])
    rows = [{"iteration": 1, "loss": math.nan, "tokens": 10}, {"iteration": 2, "loss": math.inf, "tokens": 20}]
    write_lines(store.partial_dir(tmp_path, record.stage("base").spec.artifact) / "metrics.jsonl", rows)
    data = collect(tmp_path, record)
    assert [r["loss"] for r in data["training"]] == [None, None]


@pytest.mark.parametrize("failed", [False, True])
def test_a_run_with_nothing_done_is_one_clear_message(tmp_path: Path, failed: bool) -> None:
    record = make_run(tmp_path, plan_run("mine"), [])
    if failed:
        end(tmp_path, record, "prepare", "user-error", "problems.rl.count: 9999999 wanted")
    with pytest.raises(UserError) as caught:
        collect(tmp_path, record)
    message = str(caught.value)
    assert "run mine: nothing is done yet" in message and "prism-launch resume mine" in message
    assert ("9999999 wanted" in message) == failed


def test_parts_of_a_stage_that_fans_out_are_one_stage(tmp_path: Path) -> None:
    record = plan_run("demo", ("evaluate.fan_out=true", "evaluate.seeds=[0, 1]"))
    parts = [s.spec.stage for s in record.stages if s.part_of]
    assert len(parts) == 2
    make_run(tmp_path, record, [*(name for name in ALL if name != "evaluate"), *parts])
    found = collect(tmp_path, record)
    assert {r["stage"] for r in found["results_by_seed"]} == {"evaluate"}
    assert len(found["results_by_seed"]) == 2 * len(found["results"]) > 0
    assert {r["seeds"] for r in found["results"]} == {2}
    assert set(parts) < {r["stage"] for r in found["stages"]}


def test_seeds_are_pooled_as_means() -> None:
    """The error is that of so many problems, however many seeds there are."""
    head = {"stage": "evaluate", "checkpoint": "a", "benchmark": "b", "n": 100}
    rows = [
        {**head, "temperature": 1.0, "seed": 0, "accuracy": 0.0, "upper95": 0.03, "worked_accuracy": None},
        {**head, "temperature": 1.0, "seed": 1, "accuracy": 0.5, "worked_accuracy": 0.25},
        {**head, "temperature": 0.0, "seed": 0, "accuracy": 0.75, "stderr": 0.1},
    ]
    mean, single = pooled(rows)
    assert single is rows[2]
    assert (mean["accuracy"], mean["worked_accuracy"], mean["seeds"]) == (0.25, 0.25, 2)
    assert mean["stderr"] == pytest.approx(math.sqrt(0.25 * 0.75 / 100)) and not {"seed", "upper95"} & mean.keys()
    never = pooled([{**rows[0], "seed": s} for s in range(3)])
    assert never[0]["upper95"] == 3 / 100
