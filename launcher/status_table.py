"""How a run stands, as a table for a terminal of any width."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.state import State
from launcher.status import RunStatus, StageStatus
from launcher.units import format_count

STYLES: dict[State, str] = {
    "done": "green",
    "running": "cyan",
    "queued": "blue",
    "failed": "bold red",
    "stopped": "yellow",
    "interrupted": "yellow",
    "waiting": "dim",
}
#: Which stages are shown before others where there is no room for all.
_URGENCY: tuple[State, ...] = ("failed", "interrupted", "running", "stopped", "queued", "waiting", "done")
#: Lines of title, head and rule, of what is not shown, and of Slurm's trouble.
_FRAME = 5
#: Lines about damaged files of one stage.
_DAMAGE = 3


@dataclass(frozen=True)
class StatusTable:
    """The run as rich shows it: a table as wide as the terminal, then a line for each stage that has a reason.

    Where `lines` bounds its height, stages that are done or wait are left out first.
    """

    status: RunStatus
    lines: int | None = None

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.text import Text

        stages = self._stages()
        yield self._table(stages, options.max_width)
        reasons = [Text(f"{s.stage}: {s.reason}", STYLES[s.state]) for s in stages if s.reason]
        reasons += [Text(f"{s.stage}: {words}", "yellow") for s in stages for words in _few(s.damage)]
        yield from reasons if self.lines is None else reasons[: max(0, self.lines - _FRAME - len(stages))]
        if len(stages) < len(self.status.stages):
            counts = Counter(s.state for s in self.status.stages if s not in stages)
            yield Text("not shown: " + ", ".join(f"{n} {state}" for state, n in counts.items()), "dim")
        if self.status.trouble:
            yield Text(self.status.trouble, "yellow")

    def _stages(self) -> list[StageStatus]:
        stages = list(self.status.stages)
        if self.lines is None or len(stages) <= self.lines - _FRAME:
            return stages
        chosen = sorted(stages, key=lambda s: _URGENCY.index(s.state))[: max(1, self.lines - _FRAME)]
        return [s for s in stages if s in chosen]

    def _table(self, stages: Sequence[StageStatus], width: int) -> Any:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        title = Text(_title(self.status))
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        rows = [_cells(stage) for stage in stages]
        shown = _fitting(rows, width)
        for name in shown:
            is_number = _COLUMNS[name]
            table.add_column(name, justify="right" if is_number else "left", overflow="fold", no_wrap=is_number)
        for stage, row in zip(stages, rows, strict=True):
            table.add_row(*(Text(row[name], STYLES[stage.state] if name == "state" else "") for name in shown))
        return table


def _few(damage: Sequence[str]) -> Sequence[str]:
    """What is shown of the damage to one stage's files; all of it stands in the JSON."""
    return damage if len(damage) <= _DAMAGE else [*damage[:_DAMAGE], f"and {len(damage) - _DAMAGE} more"]


def _fitting(rows: Sequence[Mapping[str, str]], width: int) -> list[str]:
    """The columns of which something is known, less those that a narrow terminal can do without."""
    shown = [name for name in _COLUMNS if name in ("stage", "state") or any(row[name] for row in rows)]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in shown}
    for name in _DISPENSABLE:
        if sum(widths[n] + 3 for n in shown) - 3 <= width:
            break
        shown = [n for n in shown if n != name]
    return shown


def _title(status: RunStatus) -> str:
    return f"run {status.run}: {status.state}{_cost_text(status)}"


def _cost_text(status: RunStatus) -> str:
    if status.gpu_hours:
        return f", {status.gpu_hours:.3g} GPU-hours"
    return f", {status.core_hours:.3g} core-hours" if status.core_hours else ""


#: Name of each column, and whether it holds numbers.
_COLUMNS = {
    "stage": False,
    "state": False,
    "job": False,
    "nodes": False,
    "tries": True,
    "time": True,
    "step": True,
    "loss": True,
    "tokens/s": True,
    "left": True,
    "limit": True,
    "GPU-h": True,
}
#: What a narrow terminal does without, first to last.
_DISPENSABLE = ("tries", "job", "limit", "time", "nodes", "loss", "GPU-h", "tokens/s", "left")


def _cells(stage: StageStatus) -> dict[str, str]:
    return {
        "stage": stage.stage,
        "state": stage.state,
        "job": stage.job or "",
        "nodes": stage.nodes or "" if stage.job else "",
        "tries": str(stage.attempts) if stage.attempts else "",
        "time": _duration(stage.seconds),
        "step": f"{stage.step}/{stage.total}" if stage.step is not None and stage.state != "done" else "",
        "loss": f"{stage.loss:.4g}" if stage.loss is not None else "",
        "tokens/s": format_count(stage.tokens_per_s) if stage.tokens_per_s is not None else "",
        "left": _duration(stage.left_seconds),
        "limit": _duration(stage.limit_left_seconds),
        "GPU-h": f"{stage.gpu_hours:.3g}" if stage.gpu_hours else "",
    }


def _duration(seconds: float | None) -> str:
    """`8.2s`, `3m05s`, `26h10m`, `3d04h`: half as wide as `format_duration` has it."""
    if seconds is None:
        return ""
    whole = round(seconds)
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    hours = whole // 3600
    return f"{hours}h{whole % 3600 // 60:02}m" if hours < 48 else f"{hours // 24}d{hours % 24:02}h"
