"""Attempts as supervisors and workers would leave them, with times of the test's choice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launcher import store
from launcher.spec import StageSpec, encode


def leave_attempt(
    root: Path,
    spec: StageSpec,
    name: str,
    started: float,
    ended: float | None = None,
    exit_class: str = "finished",
    steps: tuple[int, int] | None = None,
    owner: store.Owner | None = None,
    **end: Any,
) -> Path:
    """An attempt that beat at the first and last of `steps`, ten seconds after its start and at its end."""
    folder = store.stage_dir(root, spec.run, spec.stage) / name
    folder.mkdir(parents=True)
    job = name.partition(".")[0] if name[0].isdigit() else None
    owner = owner or store.Owner("elsewhere", "boot", 7, "1", job)
    events: list[dict[str, Any]] = [
        {"time": started, "event": "start", "owner": encode(owner), "fingerprint": spec.fingerprint}
    ]
    if ended is not None:
        facts = {"class": exit_class, "message": "", "action": "stop", "seconds": ended - started - 2, **end}
        events.append({"time": ended, "event": "end", **facts})
    (folder / "events.jsonl").write_text("".join(f"{json.dumps(e)}\n" for e in events))
    if steps is not None:
        beat = {
            "time": ended or started + 110,
            "step": steps[1],
            "total": 100,
            "figures": {"loss": 2.5, "tokens_per_s": 16400.0},
            "first": {"step": steps[0], "time": started + 10},
        }
        (folder / "heartbeat.count.0.json").write_text(json.dumps(beat))
    return folder
