"""Slurm's commands played by scripts: a queue and accounts that a test writes, and notes of what was asked."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher import store
from launcher.cluster import Profile, load_profile, place_record
from launcher.run_record import RunRecord, write_run
from launcher.spec import Limits
from tests.supervisor.counting import CHECKOUT, counting_run

_SBATCH = """
case "$*" in *--test-only*) exit 0;; esac
for script; do :; done
id=$(cat "$HERE/next"); echo $((id + 1)) > "$HERE/next"
echo "$id|$script|PENDING||N/A|30:00|Priority" >> "$HERE/queue"; echo "$id"
"""
#: Lines of the queue are ID|SCRIPT|STATE|NODES|END|LEFT|REASON.
_SQUEUE = """
case "$*" in
*%o*) cut -d'|' -f1,2 < "$HERE/queue"; exit 0;;
*--jobs=*) ids="$*"; ids=${ids##*--jobs=}; ids=,${ids%% *},; rc=1
    while IFS='|' read -r id script rest; do
        case "$ids" in *",${id%%_*},"* | *",$id,"* | *",${id}_"*) echo "$id|$rest"; rc=0;; esac
    done < "$HERE/queue"
    [ $rc = 0 ] || echo "slurm_load_jobs error: Invalid job id specified" >&2
    exit $rc;;
*) cut -d'|' -f1 < "$HERE/queue";;
esac
"""


class StandIn:
    """A site on PATH, and a root with a run on it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.root, self.bin = folder, folder / "root", folder / "bin"
        self.bin.mkdir()
        self.root.mkdir(mode=0o700)
        for name in ("queue", "accounts", "calls"):
            (folder / name).write_text("")
        (folder / "next").write_text("101\n")
        self.put("sbatch", _SBATCH)
        self.put("squeue", _SQUEUE)
        self.put("sacct", 'cat "$HERE/accounts"')
        self.put("scancel")
        self.put("scontrol", "exit 1")
        self.put("sinfo")
        self.put("sacctmgr")
        monkeypatch.setenv("PATH", f"{self.bin}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.delenv("SLURM_CONF", raising=False)
        self.site = folder / "site.yaml"
        self.site.write_text("scheduler: slurm\npython: python3\npoll_s: 1\n")

    def put(self, name: str, body: str = "") -> None:
        """Let a command do what a piece of shell says; its calls are noted."""
        here = f"HERE={self.folder}; " if "'" not in str(self.folder) else ""
        (self.bin / name).write_text(f'#!/bin/bash\n{here}echo "{name} $*" >> "$HERE/calls"\n{body}\n')
        (self.bin / name).chmod(0o755)

    @property
    def profile(self) -> Profile:
        return load_profile(str(self.site))

    def plan(self, *stages: tuple[str, tuple[str, ...], dict[str, Any]], run: str = "run", **limits: Any) -> RunRecord:
        """A run of counting stages, written down and placed on the site."""
        record = counting_run(*(stages or (("a", (), {}), ("b", ("a",), {}))))
        limit = Limits(**{"visibility_s": 0.0, **limits})
        planned = (replace(s, spec=replace(s.spec, limits=limit, run=run)) for s in record.stages)
        record = replace(record, run=run, cluster=str(self.site), stages=tuple(planned))
        placed = place_record(record, self.profile, self.root)
        write_run(self.root, placed)
        return placed

    def script(self, stage: str, run: str = "run") -> str:
        return str(store.stage_dir(self.root, run, stage) / "job.sbatch")

    def queue(self, *jobs: tuple[str, str, str]) -> None:
        """What the controller knows: ids, scripts and states."""
        lines = (f"{job}|{script}|{state}|n1|N/A|30:00|None\n" for job, script, state in jobs)
        (self.folder / "queue").write_text("".join(lines))

    def accounts(self, *lines: str) -> None:
        """What sacct prints."""
        (self.folder / "accounts").write_text("".join(f"{line}\n" for line in lines))

    @property
    def in_queue(self) -> list[str]:
        return [line.split("|")[0] for line in (self.folder / "queue").read_text().splitlines()]

    def calls(self, command: str) -> list[str]:
        """The arguments of each call of a command."""
        lines = (self.folder / "calls").read_text().splitlines()
        return [line.partition(" ")[2] for line in lines if line.startswith(f"{command} ")]

    def prism(self, *args: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        """`prism-launch ARGS… --root ROOT` as a process of its own."""
        env = {**os.environ, "PYTHONPATH": str(CHECKOUT), "COLUMNS": "200"}
        command = [sys.executable, "-m", "launcher.cli", *args, "--root", str(self.root)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, cwd=self.folder, env=env, check=False
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done
