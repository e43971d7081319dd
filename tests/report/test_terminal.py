"""The result table on a terminal."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from report_run import make_run, plan_run
from rich.console import Console

from launcher.report import collect, render_table


def shown(data: dict[str, Any], width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(render_table(data))
    return out.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("root")
    return collect(root, make_run(root, plan_run()))


def test_each_checkpoint_has_a_row_with_errors_and_n(data: dict[str, Any]) -> None:
    lines = shown(data).splitlines()
    assert max(map(len, lines)) <= 80
    (row,) = [line for line in lines if line.startswith("rl-from-midtrain ")]
    assert re.split(r"\s{2,}", row.strip()) == [
        "rl-from-midtrain",
        "89.2 ± 1.4 %",
        "87.4 ± 1.5 %",
        "80.6 ± 1.8 %",
        "500",
    ]
    (row,) = [line for line in lines if line.startswith("base ") and "→" not in line]
    assert row.count("0 % (< 0.6 %)") == 3
    (row,) = [line for line in lines if "midtrain → rl-from-midtrain" in line]
    assert "0.00621" in row and "0.9887" in row and "0.9970" in row


def test_names_are_no_markup(data: dict[str, Any]) -> None:
    named = json.loads(json.dumps(data).replace("held-out", "[red]x[/red]").replace("rl-from-base", "[bold]rl"))
    text = shown(named)
    assert "[red]x[/red]" in text and "[bold]rl" in text


def test_a_partial_run_says_what_is_missing(tmp_path: Path) -> None:
    text = shown(collect(tmp_path, make_run(tmp_path, plan_run(), ["prepare"])))
    assert "missing: evaluate (evaluate) has not been run" in text and "accuracy" not in text


def test_the_last_line_is_the_cost(data: dict[str, Any]) -> None:
    line = next(line for line in shown(data, 120).splitlines() if line.startswith("cost: "))
    assert "core-hours" in line and line.endswith("attempts: 5 × crashed, 9 × finished")
