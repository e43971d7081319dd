"""What `plan` tells of the stages to come: time, GPU-hours, memory, bytes, and what of it will not go well."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import store
from launcher.cluster import Profile
from launcher.fit.estimate import Estimate, estimates
from launcher.fit.gpus import GPUS
from launcher.fit.host import NODE_RATE
from launcher.fit.speed import past_runs
from launcher.run_record import PlannedStage, RunRecord
from launcher.units import format_bytes, format_count, format_duration, parse_duration, significant


@dataclass(frozen=True)
class Outlook:
    """The estimates of a plan's stages on a cluster; `done` names those that will not run."""

    profile: Profile
    stages: tuple[PlannedStage, ...]
    found: Mapping[str, Estimate]
    done: frozenset[str]


def outlook_of(root: Path, record: RunRecord, profile: Profile) -> Outlook:
    """The estimates of a plan, corrected by the runs under the root."""
    past = past_runs(store.receipts(root, "train")) if profile.gpu in GPUS else []
    done = (s.spec.stage for s in record.stages if store.read_receipt(root, s.spec.artifact) is not None)
    return Outlook(profile, record.stages, estimates(record.stages, profile.gpu, past), frozenset(done))


def lives_of(outlook: Outlook, stage: PlannedStage) -> int | None:
    """How many jobs, or lives of one, a stage needs within its time limit; None where no time is known or limited."""
    seconds = outlook.found[stage.spec.stage].seconds
    if seconds is None or outlook.profile.scheduler != "slurm":
        return None
    usable = parse_duration(outlook.profile.time_of(stage.resources)) - outlook.profile.signal_lead_s
    return math.ceil(seconds / max(1, usable))


def warnings_of(outlook: Outlook) -> list[str]:
    """What will not go well by these estimates, a line each."""
    found = []
    for stage in outlook.stages:
        name, estimate, lives = stage.spec.stage, outlook.found[stage.spec.stage], lives_of(outlook, stage)
        if name in outlook.done:
            continue
        if estimate.fits is False and outlook.profile.gpu:
            room = f"{GPUS[outlook.profile.gpu].memory_gib:.0f} of {outlook.profile.gpu}"
            found.append(
                f"{name}: needs about {estimate.memory_gib:.0f} GiB a GPU, and programs get {room}; "
                "`prism-launch fit` lists the layouts that fit"
            )
        limits = stage.spec.limits
        if _is_cut_off(outlook, estimate, limits.save_s):
            found.append(
                f"{name}: a save at the time limit takes about {format_duration(estimate.stop_seconds or 0)} where a "
                f"node writes {NODE_RATE / 1e9:g} GB/s, and gets {limits.save_s:g} s; raise save_s in the profile's "
                "limits, or ask for more nodes"
            )
        if lives and limits.continuation == "chain" and lives > limits.chain_jobs:
            found.append(
                f"{name}: takes about {format_duration(estimate.seconds or 0)}, but its chain has no more than "
                f"{limits.chain_jobs} jobs of {outlook.profile.time_of(stage.resources)}; raise time, or chain_jobs in "
                "the profile's limits"
            )
        found += [f"{name}: {note}" for note in estimate.notes]
    return found


def _is_cut_off(outlook: Outlook, estimate: Estimate, save_s: float) -> bool:
    """Whether a stage that Slurm's time limit stops will not have saved in time."""
    if outlook.profile.scheduler != "slurm" or estimate.fits is False or estimate.stop_seconds is None:
        return False
    return estimate.stop_seconds > save_s


def estimate_json(outlook: Outlook, stage: PlannedStage) -> dict[str, Any]:
    """The estimate of a stage; null where nothing is known."""
    estimate = outlook.found[stage.spec.stage]
    return {
        "seconds": None if estimate.seconds is None else significant(estimate.seconds),
        "gpu_hours": None if estimate.gpu_hours is None else significant(estimate.gpu_hours),
        "mfu_source": estimate.mfu_source,
        "lives": lives_of(outlook, stage),
        "memory_gib": None if estimate.memory_gib is None else round(estimate.memory_gib, 1),
        "fits": estimate.fits,
        "host_gib_per_node": None if estimate.host_gib is None else round(estimate.host_gib, 1),
        "stop_seconds": None if estimate.stop_seconds is None else significant(estimate.stop_seconds),
        "artifact_bytes": estimate.writes,
        "resume_bytes": estimate.keeps,
    }


# ---------------------------------------------------------------------------------------------------------- terminal


def estimate_table(outlook: Outlook) -> Any | None:
    """The stages to come of which anything is known, a row each; None where there are none."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = [s for s in outlook.stages if s.spec.stage not in outlook.done and _is_known(outlook.found[s.spec.stage])]
    if not rows:
        return None
    timed = any(outlook.found[s.spec.stage].memory_gib is not None for s in rows)
    names = ("tokens", *(("time", "GPU-h", "GiB\na GPU") if timed else ()), "writes", "to resume\nat most")
    table = Table("stage", title="estimates", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for stage in rows:
        cells = _cells(outlook, stage)
        table.add_row(stage.spec.stage, *(cells[name] for name in names))
    table.caption, table.caption_justify = Text("\n".join(_caption(outlook, rows))), "left"
    return table


def _is_known(estimate: Estimate) -> bool:
    return estimate.tokens is not None or estimate.writes is not None


def _cells(outlook: Outlook, stage: PlannedStage) -> dict[str, Any]:
    from rich.text import Text

    estimate, lives = outlook.found[stage.spec.stage], lives_of(outlook, stage)
    took = format_duration(estimate.seconds) if estimate.seconds is not None else ""
    return {
        "tokens": format_count(estimate.tokens) if estimate.tokens else "",
        "time": f"{took}\nin {lives} lives" if lives and lives > 1 else took,
        "GPU-h": f"{estimate.gpu_hours:,.0f}" if estimate.gpu_hours is not None else "",
        "GiB\na GPU": Text(
            f"{estimate.memory_gib:.0f}" if estimate.memory_gib is not None else "", "" if estimate.fits else "red"
        ),
        "writes": format_bytes(estimate.writes) if estimate.writes else "",
        "to resume\nat most": format_bytes(estimate.keeps) if estimate.keeps else "",
    }


def _caption(outlook: Outlook, rows: list[PlannedStage]) -> list[str]:
    sources = {outlook.found[s.spec.stage].mfu_source for s in rows} - {None}
    band = " ± 20 %" if "assumed" in sources else ""
    told = [f"Time on {outlook.profile.gpu}{band}, of training alone; MFU {', '.join(sorted(map(str, sources)))}."]
    return [*(told if sources else []), *warnings_of(outlook)]
