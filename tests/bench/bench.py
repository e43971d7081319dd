"""`make bench`: measures what docs/bench.md describes and prints it beside the budgets.

    python -m tests.bench.bench [SECTION ...] [--json FILE]

Exit code 0 says that everything was measured, whatever the budgets; 1 that something could not be, or was not correct.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.bench import checkpoints, loading, login, measure, stall, supervision, tokenising, training
from tests.bench.measure import Row

SECTIONS: dict[str, Callable[[Path], list[Row]]] = {
    "commands": login.measure_commands,
    "render": login.measure_rendering,
    "supervisor": supervision.measure,
    "tokenise": tokenising.measure,
    "train": training.measure,
    "load": loading.measure,
    "stall": stall.measure,
    "convert": checkpoints.measure_conversion,
    "diff": checkpoints.measure_diff,
}
#: Sections that are measured where they are named only: many minutes, and many gigabytes of disk.
LONG: dict[str, Callable[[Path], list[Row]]] = {
    "conversions": checkpoints.measure_conversions,
    "conversion-24b": checkpoints.measure_big,
}
LIBRARIES = ("torch", "megatron-core", "transformers", "tokenizers", "safetensors", "numpy")


def main(argv: Sequence[str]) -> int:
    """Measure the named sections, all by default; returns the exit code."""
    parser = argparse.ArgumentParser(prog="bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "sections",
        nargs="*",
        metavar="SECTION",
        help=f"of {', '.join(SECTIONS)}, which are the default, and {', '.join(LONG)}",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every value there")
    args = parser.parse_args(argv)
    unknown = [name for name in args.sections if name not in {**SECTIONS, **LONG}]
    if unknown:
        parser.error(f"no section {', '.join(unknown)}; there is {', '.join([*SECTIONS, *LONG])}")
    before = _busy()
    rows, failures = _measure(args.sections or list(SECTIONS))
    facts = conditions(before)
    if args.json:
        body = {"conditions": facts, "rows": [_plain(row) for row in rows], "failures": failures}
        args.json.write_text(json.dumps(body, indent=2) + "\n")
    print_table(rows, facts)
    for name, message in failures.items():
        print(f"{name}: not measured: {message}", file=sys.stderr)
    return 1 if failures else 0


def _measure(names: Sequence[str]) -> tuple[list[Row], dict[str, str]]:
    rows: list[Row] = []
    failures = {}
    for name in names:
        scratch = Path(tempfile.mkdtemp(prefix=f"prism-bench-{name}-"))
        began = time.monotonic()
        try:
            rows += {**SECTIONS, **LONG}[name](scratch)
        except Exception as error:
            # One section that breaks must not take the others' figures with it.
            traceback.print_exc()
            failures[name] = f"{type(error).__name__}: {error}"
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return rows, failures


def _plain(row: Row) -> dict[str, Any]:
    return {**dataclasses.asdict(row), "median": row.median, "met": row.met}


# --------------------------------------------------------------------------------------------------------- conditions


def conditions(before: tuple[float, float, float]) -> dict[str, Any]:
    """What the figures depend on; `before` is `_busy` at the beginning."""
    began, busy, ours = before
    ended, busy_now, ours_now = _busy()
    cores = os.cpu_count() or 1
    others = max(0.0, busy_now - busy - (ours_now - ours)) / (cores * (ended - began))
    return {
        "cores": cores,
        "processor": _processor(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / measure.GIB, 1),
        "system": f"{platform.system()} {platform.release()}",
        "scratch": _file_system(Path(tempfile.gettempdir())),
        "python": platform.python_version(),
        **{name: _version(name) for name in LIBRARIES},
        "seconds": round(ended - began),
        "cpu_taken_by_others": round(others, 2),
    }


def _busy() -> tuple[float, float, float]:
    """Now, the CPU seconds that all cores have worked since boot, and those of this process and its children."""
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    busy = (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")  # idle and waiting for the disk apart
    times = os.times()
    return time.monotonic(), busy, sum(times[:4])


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _file_system(folder: Path) -> str:
    done = subprocess.run(["stat", "-f", "-c", "%T", str(folder)], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


# -------------------------------------------------------------------------------------------------------------- table


def print_table(rows: Sequence[Row], facts: dict[str, Any]) -> None:
    """The rows with their budgets, and the conditions below."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name, justify in (("what", "left"), ("median", "right"), ("least .. most", "right"), ("budget", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("")
    table.add_column("compared, and how", overflow="fold")
    for row in rows:
        sign = "<=" if row.better == "lower" else ">="
        budget = "" if row.budget is None else f"{sign} {row.budget:g} {row.unit}"
        spread = f"{_figure(min(row.values))} .. {_figure(max(row.values))} ({len(row.values)})"
        verdict = {True: "[green]met[/]", False: "[red]missed[/]", None: ""}[row.met]
        table.add_row(row.name, f"{_figure(row.median)} {row.unit}", spread, budget, verdict, row.how)
    console = Console(width=None if sys.stdout.isatty() else 170)
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()), highlight=False)


def _figure(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
