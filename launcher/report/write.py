"""The report's files: one page, the JSON behind it, one CSV a table. Each is written whole or not at all."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher import store
from launcher.data import install_command
from launcher.interpreter import module_command, module_environment
from launcher.report.collect import TABLES, collect
from launcher.report.page import render_page
from launcher.run_record import RunRecord
from launcher.terminal import plain

#: Seconds that drawing may take; the largest runs need a few.
DRAWING_LIMIT = 300
#: The exit code of `launcher.report.draw` where matplotlib is absent.
NO_MATPLOTLIB = 3


def write_report(root: Path, record: RunRecord, submitted: Mapping[str, float] | None = None) -> Path:
    """Write ROOT/runs/NAME/report/: report.html, report.json, TABLE.csv. Returns the page's path.

    Where figures cannot be drawn the page has tables alone and says why. Raises UserError where nothing is done.
    `submitted` is as for `collect`.
    """
    data = collect(root, record, submitted)
    folder = store.run_dir(root, record.run) / "report"
    figures, trouble = draw_figures(data)
    store.write_atomic(folder / "report.json", json.dumps(data, indent=2) + "\n")
    for name in TABLES:
        _write_csv(folder / f"{name}.csv", data[name])
    page = folder / "report.html"
    store.write_atomic(page, render_page(data, figures, trouble))
    return page


def draw_figures(data: Mapping[str, Any]) -> tuple[list[dict[str, str]], str | None]:
    """Figures by `launcher.report.draw` in a process that loads matplotlib; or none, and why in words."""
    try:
        done = subprocess.run(
            module_command("launcher.report.draw"),
            input=json.dumps(data),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env=module_environment(os.environ),
            cwd=os.sep,  # matplotlib reads a matplotlibrc where it starts
            timeout=DRAWING_LIMIT,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"drawing failed: {error}"
    if done.returncode == NO_MATPLOTLIB:
        return [], f"matplotlib is not installed; install the extra that draws: {install_command('report')}"
    if done.returncode != 0:
        return [], f"drawing failed: {(done.stderr.strip().splitlines() or [f'exit {done.returncode}'])[-1]}"
    figures: list[dict[str, str]] = json.loads(done.stdout)["figures"]
    return figures, None


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table with the keys of all rows as columns; a table without rows has no file."""
    if not rows:
        path.unlink(missing_ok=True)  # an earlier report may have had some
        return
    columns = list(dict.fromkeys(key for row in rows for key in row))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([_cell(column) for column in columns])
    writer.writerows([_cell(row.get(column)) for column in columns] for row in rows)
    store.write_atomic(path, out.getvalue())


def _cell(value: Any) -> str:
    """Text that no spreadsheet takes for a formula, nothing for None, anything else as JSON."""
    if not isinstance(value, str):
        return "" if value is None else json.dumps(value)
    text = plain(value)
    is_formula = text.strip().startswith(_FORMULA) or text.startswith(("\t", "\n"))
    return f"'{text}" if is_formula and not _is_number(text) else text


#: What spreadsheets begin a formula with; the last four are those of full width.
_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text
