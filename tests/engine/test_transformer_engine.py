"""megatron-core's wrappers of Transformer Engine on a stand-in that refuses what the engine asserts: twins of the seven
models on every layout build, train as with plain layers, and say the right words to it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from real_models import REAL
from run_layouts import LAYOUTS, worlds

HERE = Path(__file__).resolve().parent
#: What cannot be, and where that is said.
REFUSED = {
    "granite-4.0-h-micro-base tp": "Mamba groups",
    "granite-4.0-h-micro-base tp-sp": "Mamba groups",
    "granite-4.0-h-micro-base masked-cp": "document_masking",
    "Nemotron-H-8B-Base-8K masked-cp": "document_masking",
}
WINDOW = "Mistral-7B-v0.1"
#: Seconds after which a world hangs.
DEADLINE_S = 300.0


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """What each of two ranks found, by world."""
    folder = tmp_path_factory.mktemp("engine")
    return [in_world(world, folder) for world in range(len(worlds()))]


def in_world(world: int, folder: Path) -> list[dict[str, Any]]:
    """What each of two ranks found in a world. Where one fails the other is ended: it would wait for it."""
    # Without torch.compile: what it makes of three functions here takes longer than all else, and is not looked at.
    paths = os.pathsep.join(map(str, (HERE.parent.parent, HERE.parent)))
    environment = {**os.environ, "PYTHONPATH": paths, "TORCH_COMPILE_DISABLE": "1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    logs = [folder / f"{world}.{rank}.log" for rank in range(2)]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE / "run_layouts.py"), str(world), str(rank), port, str(folder)],
            env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]  # fmt: skip
    deadline = time.monotonic() + DEADLINE_S
    try:
        while any(r.poll() is None for r in ranks) and not any(r.poll() for r in ranks):
            assert time.monotonic() < deadline, "".join(log.read_text()[-3000:] for log in logs)
            time.sleep(0.2)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert [r.returncode for r in ranks] == [0, 0], "".join(log.read_text()[-3000:] for log in logs)
    return [json.loads((folder / f"{world}.{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def found(told: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """What two ranks found, by model and layout; both must have found the same losses."""
    cases: dict[str, Any] = {}
    for first, second in told:
        for key, case in first["cases"].items():
            other = second["cases"][key]
            assert case.get("engine") == other.get("engine")
            cases[key] = case | {"records": [*case.get("records", ()), *other.get("records", ())]}
    return cases


def test_a_process_has_the_threads_of_its_groups_and_no_more(told: list[list[dict[str, Any]]]) -> None:
    """One set of groups has some sixty; those of all 126 trainings, kept, once brought a machine to a stand."""
    assert max(rank["threads"] for world in told for rank in world) < 120


def records(case: dict[str, Any], name: str, how: str) -> list[dict[str, Any]]:
    return [keywords for module, when, keywords in case["records"] if (module, when) == (name, how)]


@pytest.mark.parametrize("model", REAL)
def test_every_layout_trains_as_with_plain_layers(found: dict[str, Any], model: str) -> None:
    for layout in LAYOUTS:
        key = f"{model} {layout}"
        case = found[key]
        if key in REFUSED:
            assert any(REFUSED[key] in problem for problem in case["refused"]), key
            continue
        assert case["engine"] == pytest.approx(case["plain"], rel=5e-6), key
        assert case["engine"][0] != case["engine"][-3], "it trains"


@pytest.mark.parametrize("model", REAL)
def test_the_engine_is_told_what_the_layout_says(found: dict[str, Any], model: str) -> None:
    for layout in LAYOUTS:
        if f"{model} {layout}" in REFUSED:
            continue
        case, split = found[f"{model} {layout}"], 2 if layout.startswith("tp") else 1
        names = ("TELayerNormColumnParallelLinear", "TERowParallelLinear")
        linear = [k for name in names for k in records(case, name, "built")]
        assert linear and all(k["fuse_wgrad_accumulation"] and k["tp_size"] == split for k in linear)
        assert {k["sequence_parallel"] for k in linear} == {layout == "tp-sp"}
        attention = records(case, "DotProductAttention", "built")
        by_torch = layout == "masked-cp"
        assert bool(attention) is not by_torch, "pieces of documents are torch's"
        wanted = None if layout != "cp" else "all_gather" if model == WINDOW else "p2p"
        assert by_torch or {k.get("cp_comm_type") for k in attention} == {wanted}
        windows = {tuple(k["window_size"]) if "window_size" in k else None for k in attention}
        assert by_torch or windows == {(7, 0) if model == WINDOW else None}
        calls = records(case, "DotProductAttention", "called")
        form = ("thd", "padding_causal") if layout == "masked" else ("sbhd", "causal")
        assert by_torch or {(k["qkv_format"], k["attn_mask_type"]) for k in calls} == {form}
