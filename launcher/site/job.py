"""The batch step of a test job: starts the steps as stages do, signals them and itself, and is requeued once.

What it learns stands in `job.json` of the attempt's folder, written anew after each part.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from launcher import slurm, store
from launcher.errors import PrismError
from launcher.spec import StageSpec, Step, read_stage
from launcher.steps import SRUN_DEFAULTS, Place, SlurmAttempt, slurm_place, srun_argv

#: `srun: error: NODE: task 1: Exited with exit code 7`, `srun: error: task 1 launch failed: REASON`.
_COMPLAINT = re.compile(r"^srun: error: (.*\btasks? .+)$", re.MULTILINE)
#: How long a step may take, and how much longer than the first rank that failed.
_STEP_S = 240.0
_OTHERS_S = 12.0
_SIGNAL_S = 15.0
#: How much later one node may see what another has written: on NFS, a minute.
_SEEN_S = 75.0


def run(stage_json: str) -> int:
    """The first life examines and asks for a second one, which only says that it came."""
    spec, root = read_stage(stage_json), Path(os.environ["PRISM_ROOT"])
    restarts = os.environ.get("SLURM_RESTART_COUNT") or "0"
    attempt = SlurmAttempt(os.environ["SLURM_JOB_ID"], restarts, os.environ["SLURMD_NODENAME"])
    folder = store.new_attempt(store.stage_dir(root, spec.run, spec.stage), attempt.name)
    attempt = replace(attempt, folder=folder.name)
    life = Life(spec, slurm_place(spec, root, sys.executable, attempt), attempt)
    earlier = life.folder.with_name(f"{attempt.job}.{int(restarts) - 1}") / "job.json"
    if (store.read_json(earlier) or {}).get("requeue") == "asked":
        life.note(began=time.time(), ended=True)
        return 0
    life.examine()
    life.note(requeue="asked")
    refused = slurm.requeue(attempt.job)
    if refused is None:
        os._exit(0)
    life.note(requeue=refused, ended=True)
    return 0


@dataclass
class Life:
    """One life of the job and what it has learnt so far."""

    spec: StageSpec
    place: Place
    attempt: SlurmAttempt
    known: dict[str, Any] = field(default_factory=dict)
    heard: list[float] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """What this life writes."""
        return Path(self.place.attempt_dir)

    def note(self, **what: Any) -> None:
        """Add to what is known, and write it down."""
        self.known |= what
        store.write_json(self.folder / "job.json", self.known)

    def examine(self) -> None:
        """Every part in turn; a part that needs all nodes is left out where they did not all start."""
        signal.signal(signal.SIGUSR2, lambda *_: self.heard.append(time.time()))
        python = [sys.executable, platform.python_version()]
        self.note(python=python, nodes=os.environ["SLURM_JOB_NODELIST"], began=time.time(), steps={})
        steps = {step.name: step for step in self.spec.steps}
        for name, step in steps.items():
            if name not in ("all-reduce", "signals"):
                self.run_step(step)
        self.signal_batch()
        if self.known["steps"]["nodes"]["code"] == 0:
            self.reduce(steps["all-reduce"])
            self.signal_step(steps["signals"])
        self.note(sbatch=_sbatch(self.folder.parent / "job.sbatch"), examined=time.time())

    def run_step(self, step: Step) -> None:
        """Start a step and wait for its end."""
        srun = self.start(step)
        if srun:
            self.note_end(step, srun, time.monotonic() + _STEP_S)

    def start(self, step: Step) -> subprocess.Popen[bytes] | None:
        """The step's srun, which says what it has to say in STEP.srun.log; None where there is none, which is noted."""
        unset = (*SRUN_DEFAULTS, *self.spec.runtime.env_unset)
        inherited = {name: value for name, value in os.environ.items() if name not in unset}
        try:
            argv = srun_argv(step, self.place, self.spec.runtime)
            with self._log(step).open("ab") as log:
                null = subprocess.DEVNULL
                return subprocess.Popen(
                    argv, env=inherited, cwd=self.folder, stdin=null, stdout=null, stderr=log, start_new_session=True
                )
        except (PrismError, OSError) as error:
            self.note(steps={**self.known["steps"], step.name: {"code": "not started", "said": str(error)}})
            return None

    def _log(self, step: Step) -> Path:
        return self.folder / f"{step.name}.srun.log"

    def note_end(self, step: Step, srun: subprocess.Popen[bytes], deadline: float) -> None:
        """Wait for a step's end. After the first rank that fails, the others get a moment to write what they know."""
        complaint = None
        while srun.poll() is None and time.monotonic() < deadline:
            # srun says of a task that could not be started, but ends with 0 when the others have ended.
            if complaint is None and (
                complaint := _COMPLAINT.search(self._log(step).read_text(errors="replace", encoding="utf-8"))
            ):
                deadline = min(deadline, time.monotonic() + _OTHERS_S)
            time.sleep(0.05)
        complaint = complaint or _COMPLAINT.search(self._log(step).read_text(errors="replace", encoding="utf-8"))
        late = srun.poll() is None and not complaint
        with contextlib.suppress(ProcessLookupError):
            os.killpg(srun.pid, signal.SIGKILL)
        ended = srun.wait()
        code = "time-out" if late else _code(complaint[1]) if complaint else ended
        said = _tail(self.folder, step) if code else ""
        self.note(steps={**self.known["steps"], step.name: {"code": code, "said": said}})

    def reduce(self, step: Step) -> None:
        """The all-reduce, with a rank a GPU where torch sees some; left out where its image has no torch."""
        names = [s.name for s in self.spec.steps if s.name.startswith("imports-") and s.image == step.image]
        told = store.read_json(self.folder / f"{names[0]}.0.json") or {}
        torch = told.get("kernels", {}).get("torch", {})
        if "version" in torch:
            ranks = max(1, torch.get("devices", 0))
            if step.nodes * ranks > 1:
                self.run_step(replace(step, ntasks=step.nodes * ranks, cpus=max(1, step.cpus // ranks)))

    def signal_batch(self) -> None:
        """USR2 to the batch step, as Slurm sends it before the time limit."""
        sent = time.time()
        answer = slurm.call("scancel", "--signal=USR2", "--batch", self.attempt.job)
        _wait(lambda: self.heard)
        delay = self.heard[0] - sent if self.heard else None
        self.note(batch_signal={"delay_s": delay, "said": answer.err})

    def signal_step(self, step: Step) -> None:
        """USR2 through srun, as the supervisor sends it, and TERM through Slurm, as preemption does."""
        srun = self.start(step)
        if srun is None:
            return
        reports = [self.folder / f"{step.name}.{rank}.json" for rank in range(step.ntasks)]
        _wait(lambda: all(p.exists() for p in reports) or srun.poll() is not None, _SEEN_S)
        if not all(p.exists() for p in reports):
            self.note_end(step, srun, time.monotonic())
            return
        sent = {"SIGUSR2": time.time()}
        srun.send_signal(signal.SIGUSR2)
        _wait(lambda: "SIGUSR2" in _heard(reports[0]))
        number = (store.read_json(reports[0]) or {}).get("step")
        sent["SIGTERM"] = time.time()
        slurm.call("scancel", "--signal=TERM", f"{self.attempt.job}.{number}")
        self.note_end(step, srun, time.monotonic() + _SIGNAL_S)  # each rank ends at TERM
        _wait(lambda: all(set(sent) <= set(_heard(p)) for p in reports), _SEEN_S)
        self.note(step_signals={name: _arrivals(reports, name, began) for name, began in sent.items()})


def _code(complaint: str) -> int | str:
    """An exit code as a number; what else srun complains of as it says it."""
    number = re.search(r"exit code (\d+)", complaint)
    return int(number[1]) if number else "not started" if "launch failed" in complaint else complaint


def _arrivals(reports: list[Path], name: str, sent: float) -> dict[str, Any]:
    """The ranks that heard a signal, and the seconds that it took to the first one, whose clock is ours."""
    heard = {rank: _heard(path).get(name) for rank, path in enumerate(reports)}
    first = heard[0]
    return {"deaf": [r for r, t in heard.items() if t is None], "delay_s": None if first is None else first - sent}


def _heard(path: Path) -> dict[str, float]:
    return dict((store.read_json(path) or {}).get("heard", {}))


def _wait(ready: Callable[[], Any], seconds: float = _SIGNAL_S) -> None:
    end = time.monotonic() + seconds
    while not ready() and time.monotonic() < end:
        time.sleep(0.02)


def _sbatch(script: Path) -> str:
    """What is said against submitting from here; nothing where it is allowed."""
    try:
        answer = slurm.call("sbatch", "--test-only", str(script), timeout=30.0)
    except PrismError as error:
        return str(error)
    return "" if answer.ok else answer.err or "no answer"


def _tail(folder: Path, step: Step) -> str:
    """The last lines of a step's own log, or of srun's."""
    names = [f"{step.name}.srun.log", *(f"{step.name}.{rank}.log" for rank in range(step.ntasks))]
    texts = [
        path.read_text(errors="replace", encoding="utf-8").strip()
        for path in (folder / name for name in names)
        if path.exists()
    ]
    return "\n".join(line for text in texts for line in text.splitlines()[-4:])[-2000:]
