"""One converted file, loaded by megatron-core at TP=2 and at PP=2: the logits of transformers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from real_models import REAL
from test_logits import TOLERANCE, difference, hf_logits, tokens

from launcher.convert.conversion import convert

#: Granite 4 hybrid has one Mamba group, which tensor parallelism would have to cut: PP alone (`check_layout`).
NO_TP = {"granite-4.0-h-micro-base"}


@pytest.mark.parametrize("layout", ["tp", "pp"])
def test_all_seven_on_two_ranks(layout: str, tmp_path: Path, hf_checkpoint: Callable[..., Path]) -> None:
    names = [name for name in REAL if layout == "pp" or name not in NO_TP]
    cases = []
    for name in names:
        folder = tmp_path / name
        folder.mkdir()
        convert(hf_checkpoint(name), folder, "megatron")
        torch.save(tokens(name), tmp_path / f"{name}.ids")
        cases.append({"folder": str(folder), "ids": f"{folder}.ids", "out": f"{folder}.logits"})
    (tmp_path / "job.json").write_text(json.dumps(cases))
    run_both(layout, tmp_path / "job.json")
    for name, case in zip(names, cases, strict=True):
        found, wanted = torch.load(case["out"]), hf_logits(hf_checkpoint(name), tokens(name))
        assert difference(found, wanted) <= TOLERANCE, name
        assert torch.equal(found.argmax(-1), wanted.argmax(-1)), name


def run_both(layout: str, job: Path) -> None:
    """Start two ranks and wait for both; what they said is in the failure."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("two_ranks.py")), layout, str(job)]
    logs = [job.with_name(f"rank{rank}.log") for rank in range(2)]
    ranks = []
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as out:
                ranks.append(subprocess.Popen(command, env={**common, "RANK": str(rank)}, stdout=out, stderr=out))
        codes = [rank.wait(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
