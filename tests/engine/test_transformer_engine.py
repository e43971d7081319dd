"""megatron-core's wrappers of Transformer Engine on a stand-in that refuses what the engine asserts: twins of the seven
models on every layout build, train as with plain layers, and say the right words to it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from real_models import REAL
from run_layouts import LAYOUTS

HERE = Path(__file__).resolve().parent
#: What cannot be, and where that is said.
REFUSED = {
    "granite-4.0-h-micro-base tp": "Mamba groups",
    "granite-4.0-h-micro-base tp-sp": "Mamba groups",
    "granite-4.0-h-micro-base masked-cp": "document_masking",
    "Nemotron-H-8B-Base-8K masked-cp": "document_masking",
}
WINDOW = "Mistral-7B-v0.1"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What two ranks found, by model and layout; both must have found the same losses."""
    folder = tmp_path_factory.mktemp("engine")
    tests = HERE.parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tests.parent, tests)))}
    port = str(21000 + os.getpid() % 8000)
    words = [sys.executable, str(HERE / "run_layouts.py")]
    logs = [folder / f"{rank}.log" for rank in range(2)]
    said: dict[str, Any] = {"env": environment, "stderr": subprocess.STDOUT}
    ranks = [
        subprocess.Popen([*words, str(rank), port, str(folder)], stdout=log.open("w"), **said)
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [rank.wait(900) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0, 0], "".join(log.read_text()[-3000:] for log in logs)
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(2))
    assert [c.get("engine") for c in first.values()] == [c.get("engine") for c in second.values()]
    for case, other in zip(first.values(), second.values(), strict=True):
        case["records"] = [*case.get("records", ()), *other.get("records", ())]
    yield first


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
