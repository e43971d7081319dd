"""What words, tables and figures share: comparing results, tracing checkpoints, writing numbers. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

#: Keeps a number and its unit on one line.
NBSP = "\u00a0"

Row = Mapping[str, Any]
Data = Mapping[str, Any]


def uncertainty(result: Row) -> float:
    """Standard error of an accuracy; where none or all are right, what the 95 % bound by the rule of three stands for.

    The binomial formula gives 0 there, which would make any difference look certain.
    """
    accuracy, n = result["accuracy"], result["n"]
    return 3 / n / 1.96 if accuracy in (0, 1) else float(result["stderr"])


def gap(low: Row, high: Row) -> float:
    """Difference of two accuracies in standard errors, taken as independent; positive where `high` is above."""
    return float((high["accuracy"] - low["accuracy"]) / math.hypot(uncertainty(low), uncertainty(high)))


def interval(result: Row) -> tuple[float, float]:
    """Error bar of an accuracy, down and up: one standard error, or the 95 % bound where none or all are right."""
    accuracy, bound = result["accuracy"], 3 / result["n"]
    if accuracy in (0, 1):
        return (0.0, bound) if accuracy == 0 else (bound, 0.0)
    return result["stderr"], result["stderr"]


def unique(values: Iterable[Any]) -> list[Any]:
    """The different values, in the order of their first place."""
    return list(dict.fromkeys(values))


def results_by_temperature(data: Data, benchmark: str, checkpoint: str) -> dict[float, Row]:
    """Temperature to result."""
    rows = [r for r in data["results"] if (r["benchmark"], r["checkpoint"]) == (benchmark, checkpoint)]
    return {r["temperature"]: r for r in rows}


def stage_row(data: Data, name: str | None) -> Row:
    """The row of a stage; empty for what is no stage of this run."""
    return next((s for s in data["stages"] if s["stage"] == name), {})


def lineage(data: Data, checkpoint: str) -> list[str]:
    """A checkpoint and the stages that it was trained from, the newest first."""
    found: list[str] = []
    name: str | None = checkpoint
    while name and name not in found:
        found.append(name)
        name = stage_row(data, name).get("start")
    return found


def at_threshold(rows: Sequence[Row], threshold: float = 0.01) -> list[Row]:
    """The rows at the threshold that is nearest; the default is PRISM's 1 %."""
    if not rows:
        return []
    nearest = min((r["threshold"] for r in rows), key=lambda t: abs(t - threshold))
    return [r for r in rows if r["threshold"] == nearest]


def pairs(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The pairs of checkpoints in rows with `from` and `to`."""
    return unique((r["from"], r["to"]) for r in rows)


def total_cost(rows: Sequence[Row]) -> dict[str, Any]:
    """The sum of the stages' costs; waiting times are summed too, though stages may have waited side by side."""
    total: dict[str, Any] = {k: sum(r[k] for r in rows) for k in ("attempts", "seconds", "gpu_hours", "core_hours")}
    waits = [r["queue_seconds"] for r in rows if r["queue_seconds"] is not None]
    # A lost hour of eight GPUs weighs eight times that of one; where there are GPUs, they are what counts.
    unit = "gpus" if total["gpu_hours"] else "cores"
    spent, lost = (sum(r[key] * r[unit] for r in rows) for key in ("seconds", "lost_seconds"))
    classes: dict[str, int] = {}
    for row in rows:
        for name, count in row["classes"].items():
            classes[name] = classes.get(name, 0) + count
    share = lost / spent if spent else None
    return {**total, "queue_seconds": sum(waits) if waits else None, "lost_share": share, "classes": classes}


def classes_text(classes: Mapping[str, int]) -> str:
    """`finished, 2 × preempted`; an en dash for none."""
    return ", ".join(name if count == 1 else f"{count} × {name}" for name, count in classes.items()) or "–"


# ------------------------------------------------------------------------------------------------------------ writing


def percent(fraction: float | None, digits: int = 1) -> str:
    """`88.4 %`; an en dash for no figure."""
    return "–" if fraction is None else f"{100 * fraction:.{digits}f}{NBSP}%"


def figure(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits; an en dash for no figure."""
    return "–" if value is None else f"{value:.{digits}g}"


def accuracy_text(result: Row) -> str:
    """`88.4 ± 1.4 %`, or where none or all are right `0 % (< 0.6 %)`, the bound at 95 %."""
    accuracy, bound = result["accuracy"], 3 / result["n"]
    if accuracy == 0:
        return f"0 % (< {100 * bound:.1f} %)"
    if accuracy == 1:
        return f"100 % (> {100 * (1 - bound):.1f} %)"
    return f"{100 * accuracy:.1f} ± {100 * result['stderr']:.1f} %"


def cka_text(value: float | None) -> str:
    """Four digits after the point: what matters lies near 1."""
    return "–" if value is None else f"{value:.4f}"


def listed(names: Iterable[Any]) -> str:
    """`a, b and c`."""
    *rest, last = [str(n) for n in names]
    return f"{', '.join(rest)} and {last}" if rest else last
