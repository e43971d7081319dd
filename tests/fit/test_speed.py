"""The MFU of past runs: which receipts tell it, which of them a task learns from, and what that does to the times.

No GPU was at hand: the receipt is that of a real run on a CPU (tests/data/train-receipt.json), and what tells of a GPU
is written into it here.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_fit_layouts import GRANITE_H, LLAMA

from launcher import store
from launcher.fit.gpus import GPUS, type_of_device
from launcher.fit.layers import architecture_of, flops_per_token
from launcher.fit.memory import Layout
from launcher.fit.search import Task, find_layouts, step_seconds
from launcher.fit.speed import PastRun, layout_factor, measured_mfu, past_runs, runs_like
from launcher.models.families import shape_of
from tests.test_cli import prism

CPU_RECEIPT: dict[str, Any] = json.loads(
    (Path(__file__).resolve().parents[1] / "data" / "train-receipt.json").read_text()
)
H100 = "NVIDIA H100 80GB HBM3"


def receipt(
    model: dict[str, Any] = LLAMA,
    tokens_per_s: float | None = 80_000.0,
    device: str | None = H100,
    fingerprint: str = "f" * 20,
    world_size: int = 8,
    layout: dict[str, Any] | None = None,
    **config: Any,
) -> dict[str, Any]:
    """The receipt as a run on GPUs would have left it."""
    settings = {"seq_length": 8192, "global_batch_size": 128, "micro_batch_size": 1, "precision": "bf16", **config}
    parallelism = {**CPU_RECEIPT["config"]["parallelism"], **(layout or {})}
    named = {"name": "m", "family": model["model_type"], "config": model}
    facts = {"device": device, "cpu_mode": False, "tokens_per_s": tokens_per_s, "world_size": world_size}
    return {
        **CPU_RECEIPT,
        "fingerprint": fingerprint,
        "config": {**CPU_RECEIPT["config"], **settings, "model": named, "parallelism": parallelism},
        "record": {**CPU_RECEIPT["record"], **facts},
    }


def write(root: Path, *found: dict[str, Any]) -> None:
    for data in found:
        store.write_json(root / "artifacts" / "train" / data["fingerprint"] / "artifact.json", data)


def runs(root: Path, *found: dict[str, Any]) -> list[PastRun]:
    write(root, *found)
    return past_runs(store.receipts(root, "train"))


def task(model: dict[str, Any] = LLAMA, **changes: Any) -> Task:
    given = Task(
        shape=shape_of(model), gpu=GPUS["h100-80gb"], gpus=8, seq_length=8192, global_batch_size=128, train_iters=10
    )
    return replace(given, **changes)


def test_a_run_on_gpus_tells_its_mfu(tmp_path: Path) -> None:
    layout = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "recompute": "mlp"}
    (run,) = runs(tmp_path, receipt(layout=layout))
    per_token = flops_per_token(architecture_of(shape_of(LLAMA)), 8192)
    assert run.mfu == pytest.approx(80_000 * per_token / (8 * 989.4e12)) == pytest.approx(0.520, abs=1e-3)
    assert run.gpu == "h100-80gb" and run.shape == shape_of(LLAMA)
    assert run.layout == Layout(
        gpus=8, tp=2, sp=True, recompute="mlp", micro_batch_size=1, global_batch_size=128, seq_length=8192
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"device": None},
        {"device": "NVIDIA H100 80GB HBM3 MIG 3g.40gb"},
        {"tokens_per_s": None},
        {"tokens_per_s": 0.0},
        {"tokens_per_s": float("nan")},
        {"world_size": None},
        {"world_size": 0},
        {"model": {**LLAMA, "model_type": "mixtral"}},
        {"train_iters": "many"},
        {"entrypoint": "pretrain_gpt.py"},
    ],
)
def test_receipts_that_do_not_tell_are_passed_over(changes: dict[str, Any], tmp_path: Path) -> None:
    assert runs(tmp_path, receipt(**changes)) == []


def test_a_run_on_a_cpu_never_counts(tmp_path: Path) -> None:
    """The real receipt as it is; and one that claims a device too."""
    assert CPU_RECEIPT["record"]["cpu_mode"] is True and CPU_RECEIPT["record"]["tokens_per_s"] > 0
    claims = {**CPU_RECEIPT, "fingerprint": "c" * 20, "record": {**CPU_RECEIPT["record"], "device": H100}}
    assert runs(tmp_path, CPU_RECEIPT, claims) == []


def test_what_is_not_whole_or_not_readable_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path, {**receipt(), "fingerprint": "f.partial"}, {**receipt(), "fingerprint": "f.damaged.1"})
    write(tmp_path, {**receipt(fingerprint="0" * 20), "schema": 99}, {"fingerprint": "1" * 20})
    broken = tmp_path / "artifacts" / "train" / ("2" * 20)
    broken.mkdir()
    (broken / "artifact.json").write_text('{"kind": ')
    assert store.receipts(tmp_path, "train") == [] == store.receipts(tmp_path / "absent", "train")


def test_this_model_comes_before_its_class_and_other_classes_do_not_count(tmp_path: Path) -> None:
    other = {**LLAMA, "num_hidden_layers": 16}
    found = runs(
        tmp_path,
        receipt(fingerprint="1" * 20),
        receipt(other, fingerprint="2" * 20),
        receipt(GRANITE_H, fingerprint="3" * 20),
        receipt(device="NVIDIA H100 PCIe", fingerprint="4" * 20),
        receipt(precision="fp32", fingerprint="5" * 20),
    )
    assert len(found) == 5

    def like(model: dict[str, Any], gpu: str = "h100-80gb", precision: Any = "bf16") -> list[str]:
        return [f"{r.gpu} {r.shape.num_layers}" for r in runs_like(found, gpu, shape_of(model), precision)]

    assert like(LLAMA) == ["h100-80gb 32"]
    assert like({**LLAMA, "num_hidden_layers": 24}) == ["h100-80gb 32", "h100-80gb 16"]
    assert like({**GRANITE_H, "hidden_size": 1024, "mamba_n_heads": 32}) == ["h100-80gb 80"]
    assert like(LLAMA, "h100-pcie-80gb") == ["h100-pcie-80gb 32"]
    assert like(LLAMA, "h200-141gb") == []
    assert like(LLAMA, precision="fp32") == ["h100-80gb 32"]


def test_a_layout_that_was_run_takes_what_it_took(tmp_path: Path) -> None:
    """The same step's time as was measured; and that of other layouts by the ratios that are assumed."""
    two = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    found = runs(tmp_path, receipt(layout=two, tokens_per_s=64_000.0))
    learnt = task(past=tuple(found))
    architecture = architecture_of(shape_of(LLAMA))
    seconds = {
        (tp, pp): step_seconds(
            learnt, architecture, Layout(gpus=8, tp=tp, pp=pp, global_batch_size=128, seq_length=8192)
        )
        for tp, pp in ((2, 1), (4, 1), (2, 2))
    }
    assert seconds[2, 1] == pytest.approx(128 * 8192 / 64_000)
    assert seconds[4, 1] == pytest.approx(seconds[2, 1] * 0.97 / 0.92)
    assert seconds[2, 2] == pytest.approx(seconds[2, 1] * (1 + 1 / 64))


def test_runs_of_the_same_tensor_parallel_size_come_first_and_their_median_counts(tmp_path: Path) -> None:
    speeds = {"1": 10_000.0, "2": 50_000.0, "3": 60_000.0, "4": 90_000.0}
    found = runs(
        tmp_path,
        *(
            receipt(
                fingerprint=name * 20,
                tokens_per_s=speed,
                layout={"tensor_model_parallel_size": 1 if name == "1" else 4, "sequence_parallel": name != "1"},
            )
            for name, speed in speeds.items()
        ),
    )
    by_speed = {name: r.mfu for name, r in zip(speeds, sorted(found, key=lambda r: r.mfu), strict=True)}
    four, one = Layout(gpus=8, tp=4), Layout(gpus=8, tp=1)
    assert measured_mfu(found, four) == pytest.approx(by_speed["3"] / 0.92)
    assert measured_mfu(found, one) == pytest.approx(by_speed["1"])
    eight = Layout(gpus=8, tp=8)
    assert measured_mfu(found, eight) == pytest.approx((by_speed["2"] + by_speed["3"]) / 2 / 0.92)
    assert layout_factor(eight) == 0.75


def test_what_the_time_rests_on_is_said() -> None:
    run = PastRun("h100-80gb", shape_of(LLAMA), Layout(gpus=8), 0.5)
    other = replace(run, shape=shape_of({**LLAMA, "num_hidden_layers": 16}))
    assert task().mfu_source == "assumed"
    assert task(past=(run, run)).mfu_source == "measured: 2 runs of this model"
    assert task(past=(other,)).mfu_source == "measured: 1 run of other dense models"
    assert task(GRANITE_H, past=(run,)).mfu_source == "measured: 1 run of other hybrid models"
    assert task(past=(run,), mfu=0.3).mfu_source == "given"
    assert task(precision="fp32").mfu_source is None
    assert task(precision="fp32", past=(run,)).mfu_source == "measured: 1 run of this model"


def test_a_given_mfu_comes_before_a_measured_one() -> None:
    run = PastRun("h100-80gb", shape_of(LLAMA), Layout(gpus=8), 0.5)
    layout, architecture = Layout(gpus=8), architecture_of(shape_of(LLAMA))
    times = [
        step_seconds(task(**given), architecture, layout) for given in ({"mfu": 0.25}, {"mfu": 0.25, "past": (run,)})
    ]
    assert times[0] == times[1] == 2 * step_seconds(task(past=(run,)), architecture, layout)


def test_the_command_learns_from_the_store_and_says_so(tmp_path: Path) -> None:
    """A slow run doubles the time; the order of layouts is of the same speeds."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    wanted = ("fit", str(tmp_path / "config.json"), "--gpus", "8", "--gpu", "h100-80gb")
    assumed = json.loads(prism(*wanted, "--root", str(tmp_path / "root"), "--json").stdout)
    per_token = flops_per_token(architecture_of(shape_of(LLAMA)), 8192)
    slow = 0.42 / 2 * 8 * 989.4e12 / per_token
    write(tmp_path / "root", receipt(tokens_per_s=slow), CPU_RECEIPT)
    done = prism(*wanted, "--root", str(tmp_path / "root"), "--json")
    learnt = json.loads(done.stdout)
    assert (assumed["mfu_source"], learnt["mfu_source"]) == ("assumed", "measured: 1 run of this model")
    assert len(assumed["layouts"]) == len(learnt["layouts"]) > 20
    for before, after in zip(assumed["layouts"], learnt["layouts"], strict=True):
        assert after["step_seconds"] == pytest.approx(2 * before["step_seconds"], rel=1e-3)
        assert after["mfu"] == pytest.approx(before["mfu"] / 2, abs=1e-3)
    shown = prism(*wanted, PRISM_ROOT=str(tmp_path / "root"), COLUMNS="200").stdout
    assert "measured: 1 run of this model" in shown and "± 20 %" not in shown
    given = json.loads(prism(*wanted, "--root", str(tmp_path / "root"), "--mfu", "0.42", "--json").stdout)
    assert given["mfu_source"] == "given"
    assert [f["step_seconds"] for f in given["layouts"]] == [f["step_seconds"] for f in assumed["layouts"]]


# -------------------------------------------------------------------------------------------------------------- GPUs


@pytest.mark.parametrize(
    ("device", "gpu", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80gb", 312.0),
        ("NVIDIA A100 80GB PCIe", "a100-80gb", 312.0),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb", 312.0),
        ("NVIDIA H100 80GB HBM3", "h100-80gb", 989.4),
        ("NVIDIA H100 PCIe", "h100-pcie-80gb", 756.0),
        ("NVIDIA H100 NVL", "h100-nvl-94gb", 835.5),
        ("NVIDIA H200", "h200-141gb", 989.4),
        ("NVIDIA H200 NVL", "h200-nvl-141gb", 835.5),
    ],
)
def test_each_form_of_a_gpu_has_its_own_peak(device: str, gpu: str, peak: float) -> None:
    assert type_of_device(device) == gpu and GPUS[gpu].tflops == peak


@pytest.mark.parametrize(
    "device", ["NVIDIA GH200 480GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA H20", "NVIDIA A100-SXM-64GB", ""]
)
def test_others_have_no_peak_and_so_no_mfu(device: str) -> None:
    assert type_of_device(device) is None


# ------------------------------------------------------------------------------------------------------------- fp32


def test_fp32_needs_more_and_has_no_time_of_its_own() -> None:
    """8 + 8/d bytes a parameter beside 6 + 12/d; attention's scores stay."""
    one = {"tp": 1, "pp": 1, "cp": 1, "micro_batch_size": 1}
    narrow, wide = (
        next(f for f in find_layouts(task(fixed=one, precision=p, seq_length=1024)) if f.layout.recompute == "none")
        for p in ("bf16", "fp32")
    )
    count = narrow.memory.parameters
    assert (narrow.memory.weights, narrow.memory.optimizer) == (2 * count, 12 * count / 8)
    assert (wide.memory.weights, wide.memory.gradients, wide.memory.optimizer) == (4 * count, 4 * count, count)
    scores = 9 * 32 * 1024 * 32 * 1024  # 9 bytes each, of 32 heads, in 32 layers
    statistics = 4 * 32 * 32 * 1024
    assert wide.memory.activations == 2 * narrow.memory.activations - statistics + scores
