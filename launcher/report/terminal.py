"""The result table for a terminal."""

from __future__ import annotations

from typing import Any

from launcher.report.numbers import (
    Data,
    accuracy_text,
    at_threshold,
    cka_text,
    classes_text,
    figure,
    listed,
    percent,
    results_by_temperature,
    unique,
)
from launcher.report.words import lowest_cka
from launcher.units import format_duration


def render_table(data: Data) -> Any:
    """A rich renderable: accuracy by checkpoint and temperature, weight change and CKA, what is missing."""
    from rich.console import Group
    from rich.text import Text

    tables = [_results(data, benchmark) for benchmark in unique(r["benchmark"] for r in data["results"])]
    changes = [_changes(data)] if data["weights"] else []
    missing = [Text(f"missing: {line}", style="yellow") for line in data["missing"]]
    return Group(*tables, *changes, *_cost(data), *missing)


def _cost(data: Data) -> list[Any]:
    from rich.text import Text

    cost = data["cost"]
    if not cost["attempts"]:
        return []
    unit = "GPU" if cost["gpu_hours"] else "core"
    parts = [f"{figure(cost[f'{unit.lower()}_hours'])} {unit}-hours", f"{percent(cost['lost_share'])} of them lost"]
    if cost["queue_seconds"] is not None:
        parts.append(f"{format_duration(cost['queue_seconds'])} in the queue")
    return [Text(f"cost: {', '.join(parts)}; attempts: {classes_text(cost['classes'])}")]


def _table(title: str, columns: list[str]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False
    )
    for number, column in enumerate(columns):
        # Text, not str: names come from recipes and may hold what rich reads as markup.
        table.add_column(Text(column), justify="right" if number else "left", overflow="fold")
    return table


def _results(data: Data, benchmark: str) -> Any:
    from rich.text import Text

    rows = [r for r in data["results"] if r["benchmark"] == benchmark]
    temperatures = unique(r["temperature"] for r in rows)
    table = _table(
        f"accuracy on {benchmark}, ± one standard error", ["checkpoint", *(f"T = {t:g}" for t in temperatures), "n"]
    )
    for checkpoint in unique(r["checkpoint"] for r in rows):
        found = results_by_temperature(data, benchmark, checkpoint)
        cells = [accuracy_text(found[t]) if t in found else "–" for t in temperatures]
        table.add_row(*(Text(c) for c in (checkpoint, *cells, listed(unique(r["n"] for r in found.values())))))
    return table


def _changes(data: Data) -> Any:
    from rich.text import Text

    rows = at_threshold(data["weights"])
    texts = unique(r.get("texts", "texts") for r in data["cka"])
    mark = percent(rows[0]["threshold"], 0)
    title = f"share of weights changed by more than {mark}, lowest CKA of any layer"
    table = _table(title, ["pair", f"> {mark}", "relative L2", *(f"CKA, {t}" for t in texts)])
    for row in rows:
        lowest = lowest_cka(data, row["from"], row["to"])
        cells = (
            percent(row["changed_fraction"]),
            figure(row["relative_l2"]),
            *(cka_text(lowest.get(t)) for t in texts),
        )
        table.add_row(*(Text(c) for c in (f"{row['from']} → {row['to']}", *cells)))
    return table
