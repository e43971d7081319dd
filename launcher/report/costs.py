"""The page's section on cost: GPU-hours, waiting, what was lost, how attempts ended. Pure."""

from __future__ import annotations

import time

from launcher.report.markup import folded, paragraph, table
from launcher.report.numbers import Data, Row, classes_text, figure, percent
from launcher.units import format_duration


def costs(data: Data) -> str:
    """The section; empty where this run has made no attempt at anything."""
    rows = [r for r in data["costs"] if r["attempts"]]
    if not rows:
        return ""
    gpus = any(r["gpus"] for r in rows)
    unit, held, hours = ("GPU", "gpus", "gpu_hours") if gpus else ("core", "cores", "core_hours")
    body = [_cells(r["stage"], r, r[held], hours) for r in rows]
    if len(rows) > 1:
        body.append(_cells("all", data["cost"], "", hours))
    columns = ["stage", "attempts", f"{unit}s", "time held", f"{unit}-hours", "in the queue", "lost", "cores busy"]
    inner = table("Cost of each stage", [*columns, "attempts ended as"], body, (0, 8))
    return paragraph(_note(unit), "soft") + inner + _attempts(data)


def _note(unit: str) -> str:
    return (
        f"Counted from this run's own attempts: the {unit}s that a stage holds × the time from each attempt's start to "
        "its end, requeues included. Lost is the share that went into steps which had to be done again, or into "
        "attempts that did none. In the queue: from submission, or from the end of the stages that a stage reads, to "
        "each start."
    )


def _cells(name: str, row: Row, units: object, hours: str) -> list[object]:
    queued = row["queue_seconds"]
    return [
        name,
        row["attempts"],
        units,
        format_duration(row["seconds"]),
        figure(row[hours]),
        "–" if queued is None else format_duration(queued),
        percent(row["lost_share"]),
        percent(row["core_use"], 0) if "core_use" in row else "",
        classes_text(row["classes"]),
    ]


def _attempts(data: Data) -> str:
    body = [
        [
            f"{r['stage']} {r['attempt']}",
            time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(r["started"])),
            format_duration(r["seconds"]),
            "–" if r["last_step"] is None else f"{_known(r['first_step'])} to {r['last_step']}",
            format_duration(r["lost_seconds"]) if r["lost_seconds"] else "–",
            r["class"],
            " ".join(r["message"].split()),
        ]
        for r in data["attempts"]
    ]
    columns = ["attempt", "started (UTC)", "time", "steps", "lost", "ended as", "reason"]
    return folded("Every attempt", table("Attempts", columns, body, (0, 1, 5, 6)))


def _known(step: int | None) -> str:
    return "?" if step is None else str(step)
