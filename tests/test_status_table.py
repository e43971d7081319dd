"""The table of a run on terminals wide, narrow and low."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.run_record import RunRecord
from launcher.status import RunStatus, run_status
from launcher.status_table import StatusTable
from tests.left_attempts import leave_attempt, watched_record, watched_status
from tests.supervisor.counting import counting_run


@pytest.fixture
def record() -> RunRecord:
    return watched_record()


@pytest.fixture
def now(tmp_path: Path, record: RunRecord) -> RunStatus:
    return watched_status(tmp_path, record)


def shown(now: RunStatus, width: int = 160, lines: int | None = None) -> str:
    from rich.console import Console

    console = Console(width=width, record=True, file=io.StringIO())
    console.print(StatusTable(now, lines))
    return console.export_text()


def test_the_table_has_a_line_a_stage_and_says_why(now: RunStatus) -> None:
    text = shown(now)
    row = next(line for line in text.splitlines() if line.startswith("b "))
    for cell in ("running", "13", "n[1-2]", "21/100", "2.5", "16.4 k", "6m35s", "26h03m"):
        assert cell in row, row
    assert "a: diverged: nan !" in text.splitlines() and "c: job 14 waits for the stages it reads" in text.splitlines()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(8.24, "8.2s"), (59.97, "1m00s"), (3599.6, "1h00m"), (93784, "26h03m"), (270000, "3d03h"), (0, "0.0s")],
)
def test_durations_are_short(tmp_path: Path, record: RunRecord, seconds: float, text: str) -> None:
    leave_attempt(tmp_path, record.stage("a").spec, "local.1", 1000, 1002 + seconds, "crashed")
    row = next(line for line in shown(run_status(tmp_path, record)).splitlines() if line.startswith("a "))
    assert row.split()[3] == text


def test_columns_of_which_nothing_is_known_are_left_out(tmp_path: Path, record: RunRecord) -> None:
    text = shown(run_status(tmp_path, record))
    assert "tokens/s" not in text and "nodes" not in text and "waiting" in text


@pytest.mark.parametrize(("width", "cells"), [(31, 2), (32, 3), (43, 4), (61, 5), (73, 6), (94, 7), (100, 8)])
def test_a_narrow_terminal_shows_fewer_columns_and_those_whole(now: RunStatus, width: int, cells: int) -> None:
    text = shown(now, width)
    row = next(line for line in text.splitlines() if line.startswith("b "))
    wanted = ("running", "21/100", "6m35s", "16.4 k", "2.5", "n[1-2]", "26h03m", "13")
    assert all(cell in row for cell in wanted[:cells]), row
    assert "waiting" in text and max(len(line.rstrip()) for line in text.splitlines()) <= width


def test_hostile_names_are_shown_as_they_are(tmp_path: Path) -> None:
    run = counting_run(("[red]x[bold]", (), {}))
    leave_attempt(tmp_path, run.stages[0].spec, "local.1", 1, 2, "crashed", message="[bold]no[/bold]")
    text = shown(run_status(tmp_path, run))
    assert "[red]x[bold]" in text and "[bold]no[/bold]" in text


@pytest.mark.parametrize("lines", [6, 10, 20, 39])
def test_a_low_terminal_shows_what_asks_for_attention_and_counts_the_rest(now: RunStatus, lines: int) -> None:
    a, b, c, d = now.stages
    many = [replace(stage, stage=f"{stage.stage}{i}") for stage in (d, c) for i in range(50)]
    crowd = replace(now, stages=(*many, b, a), trouble="squeue: no answer")
    text = shown(crowd, lines=lines).splitlines()
    assert len(text) <= lines and any(line.startswith("a ") for line in text)  # the one that failed
    left_out = next(line for line in text if line.startswith("not shown: "))
    assert sum(int(word) for word in left_out.split() if word.isdigit()) + lines - 5 == 102
    assert "squeue: no answer" in text[-1]
    assert len([line for line in shown(crowd).splitlines() if line.startswith("c")]) == 100  # with their reasons
