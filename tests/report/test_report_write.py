"""The files of a report, with figures drawn once by matplotlib and once without it."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from report_run import make_run, plan_run
from test_page import HOSTILE, parsed

from launcher import store
from launcher.report import collect, write_report
from launcher.report.collect import TABLES
from launcher.report.write import draw_figures

NAMES = ["accuracy-0", "kinds-0", "loss", "rate", "rl-reward", "rl-zero-reward-share", "rl-entropy", "rl-mean-length"]
NAMES = [*NAMES, "thresholds", "modules-0", "modules-1", "modules-2", "cka-0", "cka-1", "mix"]
#: Tables with rows; by seed there are some only where a stage has several.
FILLED = [name for name in TABLES if name != "results_by_seed"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a report with figures, and the run's numbers."""
    root = tmp_path_factory.mktemp("root")
    record = make_run(root, plan_run())
    page = write_report(root, record)
    assert page == root / "runs" / "demo" / "report" / "report.html"
    return page.parent, collect(root, record)


def hide_matplotlib(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without the extra: the first matplotlib found says that there is none."""
    (folder / "matplotlib.py").write_text("raise ModuleNotFoundError('no matplotlib', name='matplotlib')\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_runs_of_many_training_and_rl_stages_have_figures(written: tuple[Path, dict[str, Any]]) -> None:
    """More than there are dashes that matplotlib knows by a word."""
    data = dict(written[1])
    for name in ("training", "rl"):
        first = [row for row in data[name] if row["stage"] == data[name][0]["stage"]]
        data[name] = [{**row, "stage": f"{row['stage']}-{i}"} for i in range(8) for row in first]
        data["stages"] = [
            *data["stages"],
            *({**data["stages"][0], "stage": s} for s in {r["stage"] for r in data[name]}),
        ]
    figures, why = draw_figures(data)
    assert why is None, why
    assert {"loss", "rate", "rl-reward"} <= {figure["name"] for figure in figures}


def test_json_and_csv_hold_the_same_numbers(written: tuple[Path, dict[str, Any]]) -> None:
    folder, data = written
    assert json.loads((folder / "report.json").read_text()) == data
    for name in FILLED:
        with (folder / f"{name}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == len(data[name]) > 0
        for got, wanted in zip(rows, data[name], strict=True):
            plain = {k: v if isinstance(v, str) else "" if v is None else json.dumps(v) for k, v in wanted.items()}
            assert {k: v for k, v in got.items() if v or k in plain} == plain


def test_the_page_holds_every_figure_and_is_whole(written: tuple[Path, dict[str, Any]]) -> None:
    page = (written[0] / "report.html").read_text()
    found = parsed(page)
    assert page.count("<svg") == len(NAMES) and "http" not in page
    assert "rl-from-midtrain" in found.text and "T = 0.6" in found.text
    assert "#010203" not in page and "#040506" not in page and "currentColor" in page
    for reference in re.findall(r"url\(#([^)]*)\)", page):
        assert reference in found.ids
    assert sorted(p.name for p in written[0].iterdir()) == sorted(
        ["report.html", "report.json", *(f"{t}.csv" for t in FILLED)]
    )


def test_the_same_numbers_give_the_same_figures_and_names_stay_text(written: tuple[Path, dict[str, Any]]) -> None:
    text = json.dumps(written[1])
    hostile = json.loads(text.replace("midtrain", json.dumps(f"midtrain{HOSTILE}$x^2$")[1:-1]))
    first, trouble = draw_figures(hostile)
    assert trouble is None and [f["name"] for f in first] == NAMES
    assert draw_figures(hostile)[0] == first
    for drawn in first:
        assert "<script" not in drawn["svg"] and drawn["caption"]
        assert parsed(drawn["svg"]).tags >= {"svg", "text"}
    assert HOSTILE in parsed(first[0]["svg"]).text


def test_without_matplotlib_the_page_has_tables_and_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide_matplotlib(tmp_path, monkeypatch)
    page = write_report(tmp_path, make_run(tmp_path, plan_run())).read_text()
    found = parsed(page)
    assert "[report]" in found.text and "<svg" not in page
    assert "89.2 ± 1.4 %" in found.text


def test_drawing_that_fails_is_named_and_the_page_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "matplotlib.py").write_text("raise RuntimeError('fonts are broken')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    page = write_report(tmp_path, make_run(tmp_path, plan_run(), ["prepare", "base"])).read_text()
    assert "drawing failed: RuntimeError: fonts are broken" in parsed(page).text


def test_a_table_that_an_earlier_report_had_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_matplotlib(tmp_path, monkeypatch)
    record = make_run(tmp_path, plan_run())
    folder = write_report(tmp_path, record).parent
    (tmp_path / record.stage("evaluate").spec.artifact / "artifact.json").unlink()
    write_report(tmp_path, record)
    assert not (folder / "results.csv").exists() and (folder / "weights.csv").exists()


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_matplotlib(tmp_path, monkeypatch)
    record = make_run(tmp_path, plan_run())
    page = write_report(tmp_path, record)
    before = page.read_text()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_report(tmp_path, record)
    assert page.read_text() == before
    assert not [p for p in page.parent.iterdir() if p.name.startswith(".")]


def test_the_command_prints_json_and_nothing_else(tmp_path: Path) -> None:
    record = make_run(tmp_path, plan_run())
    command = [sys.executable, "-m", "launcher.cli", "report", "demo", "--json", "--root", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == collect(tmp_path, record)
    assert not (store.run_dir(tmp_path, "demo") / "report").exists()
