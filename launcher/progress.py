"""How a worker speaks: heartbeat, metrics, record, exit file; and how it is asked to stop.

    attempt folder   heartbeat.STEP.RANK.json   the newest step, atomically replaced
                     exit.STEP.RANK.json        how the rank ended; written last
                     term                       a rank was told to terminate
    artifact         metrics.jsonl              one line a step (rank 0), kept with the artifact
                     record.json                versions, verification, figures: goes into the receipt

A worker is asked to save and stop by SIGUSR2; it then exits 0 with class `time-limit`. TERM counts as the same and is
noted, because Slurm tells of a preemption with grace time nobody but the steps' processes.
Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import re
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher import store
from launcher.errors import PrismError, UserError, WorldError
from launcher.spec import ExitClass, SpecError, StageSpec, decode, read_stage

METRICS = "metrics.jsonl"
RECORD = "record.json"
TERM_NOTE = "term"
#: Seconds between looks at a claim in small jobs; in large ones all nodes together look this often a second.
_CLAIM_S, _CLAIMS_A_SECOND = 2.0, 8.0
#: Where a rank that is not the first of its node looks as well: this many times as seldom.
_SELDOM = 8
#: Heartbeats a second of all ranks but the first together; and at the least in the time after which a hang is seen.
_BEATS_A_SECOND, _BEATS_TO_A_HANG = 5.0, 4
#: What each node must find in the attempt's folder before a stage starts, and what it leaves there by its own name.
PREFLIGHT_SEEN, PREFLIGHT_LEFT = "preflight.seen", "preflight.{node}"


class Stopped(BaseException):
    """Raised by a worker that was asked to stop, after it has saved: unfinished, to be continued."""


class Diverged(PrismError):
    """Training went to NaN or ran away; running it again would do the same."""


@dataclass(frozen=True)
class StageJob:
    """What a worker holds: its stage, the root, the folder of this attempt and its place among the ranks."""

    spec: StageSpec
    root: Path
    attempt_dir: Path
    step: str
    rank: int = 0
    world_size: int = 1
    _asked: list[float] = field(default_factory=list)
    _claim: dict[str, Any] = field(default_factory=dict)
    _first: list[dict[str, float]] = field(default_factory=list)
    _beaten: list[float] = field(default_factory=list)
    _said: dict[str, Any] = field(default_factory=dict)

    # ---- paths

    def input(self, port: str) -> Path:
        """Where an input lies."""
        return self.root / self.spec.inputs[port].path

    def output(self, port: str) -> Path:
        """Where an output is made; the folder exists."""
        path = store.working_path(self.root, self.spec.artifact, self.spec.outputs[port].path)
        path.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def workdir(self) -> Path:
        """The unfinished artifact: place of `progress/`, what a later attempt goes on from and `seal` leaves out."""
        path = store.partial_dir(self.root, self.spec.artifact)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def config(self, cls: type[Any]) -> Any:
        """The stage's config as its dataclass."""
        return decode(cls, self.spec.config)

    # ---- speaking

    @property
    def stop_requested(self) -> bool:
        """True once the worker has been asked to save and stop."""
        return bool(self._asked)

    def beat(self, step: int, total: int, *, pause_s: float = 0.0, **figures: float | int | str) -> None:
        """Say that work goes on: `step` of `total` done, and figures such as loss, tokens_per_s.

        Does not return where the artifact is another attempt's by now. The first beat stays in all that follow: from it
        come the pace, and what an attempt went on from. Nothing is written within `pause_s` of the beat before; ranks
        other than 0 write seldom, each at its own time, so that a thousand do not wear the file system out.
        """
        self._end_if_given_up()
        self._said.update(step=step, total=total, figures=figures)
        now, pause = time.time(), self._pause(pause_s)
        if not self._first:
            self._first.append({"step": step, "time": now})
            self._beaten[:] = [now - pause * self._phase] if self.rank else []
        if self._beaten and 0 <= now - self._beaten[0] < pause:
            return
        self._beaten[:] = [now]
        beat = {"time": now, "pid": os.getpid(), **self._said, "first": self._first[0]}
        self._replace(self.attempt_dir / f"heartbeat.{self.step}.{self.rank}.json", beat)

    def beat_again(self, *, pause_s: float = 0.0) -> None:
        """Say the last beat once more: work goes on, though no step is done, such as while a slow disk is waited for.

        Where that cannot be written nothing is raised: whoever is waited for will tell, on all ranks.
        """
        if self._said:
            with contextlib.suppress(OSError):
                self.beat(self._said["step"], self._said["total"], pause_s=pause_s, **self._said["figures"])

    @property
    def _phase(self) -> float:
        """Where in its interval this rank looks and beats, so that all do not at once."""
        return self.rank / max(self.world_size, 1)

    @property
    def _is_first_of_node(self) -> bool:
        """Ranks lie on nodes in blocks."""
        nodes = next((s.nodes for s in self.spec.steps if s.name == self.step), 1)
        return self.rank % -(-self.world_size // nodes) == 0

    def _pause(self, pause_s: float) -> float:
        if self.rank == 0:
            return pause_s
        hang_s = self.spec.limits.hang_s
        seldom = max(hang_s / 20, self.world_size / _BEATS_A_SECOND)
        return max(pause_s, min(seldom, hang_s / _BEATS_TO_A_HANG))

    def metric(self, **figures: Any) -> None:
        """Append one line to the artifact's metrics; rank 0 alone calls it."""
        with (self.workdir / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures, sort_keys=True) + "\n")

    def truncate_metrics(self, key: str, last: int) -> None:
        """Drop metric lines past step `last`, and damaged ones: a resumed run writes them again."""
        path = self.workdir / METRICS
        if not path.exists():
            return
        numbered = [row for row in store.read_rows(path) if isinstance(row.get(key, 0), (int, float))]
        kept = [json.dumps(row, sort_keys=True) for row in numbered if row.get(key, 0) <= last]
        store.write_atomic(path, "".join(f"{line}\n" for line in kept))

    def record(self, **facts: Any) -> None:
        """Merge facts into what the receipt will say of this work; rank 0 alone calls it."""
        path = self.workdir / RECORD
        known = store.read_json(path)
        store.write_json(path, {**(known if isinstance(known, dict) else {}), **facts})

    def exit(self, exit_class: ExitClass, message: str = "", **evidence: Any) -> None:
        """Write how this rank ended and what it used; under Slurm its supervisor cannot see that itself."""
        own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        used = {
            "cpu_seconds": own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime,
            "peak_memory_bytes": max(own.ru_maxrss, children.ru_maxrss) * 1024,
        }
        body = {"class": exit_class, "message": message, "time": time.time(), **used, **evidence}
        self._replace(self.attempt_dir / f"exit.{self.step}.{self.rank}.json", body)

    def _end_if_given_up(self) -> None:
        """Exit at once where the supervisor that started this process holds the artifact's claim no more.

        Slurm cannot end the processes of a node whose slurmd is gone: they would write beside the next attempt's.
        """
        now, every_s = time.monotonic(), claim_s(self.spec) * (1 if self._is_first_of_node else _SELDOM)
        if now - self._claim.get("looked", -every_s) < every_s:
            return
        self._claim["looked"] = now if "looked" in self._claim else now - every_s * self._phase
        try:
            holder = store.claim_holder(store.claim_dir(self.root, self.spec.artifact))
        except OSError:  # a file system that is away for a while
            return
        if holder != self._claim.setdefault("holder", holder):
            print("the attempt that this process belongs to is over: it ends", file=sys.stderr, flush=True)
            os._exit(1)

    def _stop_asked(self, number: int) -> None:
        self._asked.append(time.time())
        if number == signal.SIGTERM:
            with contextlib.suppress(OSError):
                (self.attempt_dir / TERM_NOTE).touch()

    @staticmethod
    def _replace(path: Path, value: Mapping[str, Any]) -> None:
        # No fsync: a heartbeat must be cheap, and one lost with the machine is no loss.
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(value), encoding="utf-8")
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def claim_s(spec: StageSpec) -> float:
    """How often the claim of the artifact is read by those who work on it: one process a node, and the supervisor."""
    return max(_CLAIM_S, max((step.nodes for step in spec.steps), default=1) / _CLAIMS_A_SECOND)


def die_with_parent(parent: int) -> None:
    """Ask Linux to kill this process when its parent dies, so that no worker outlives its supervisor."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(137)  # it died before the call


def run_worker(main: Callable[[StageJob], None]) -> None:
    """The one entry of every worker: read `stage.json`, run `main`, write how it ended, exit.

    The environment names the rest: PRISM_ROOT, PRISM_ATTEMPT_DIR, PRISM_STEP, RANK, WORLD_SIZE, LOCAL_RANK; the last
    three are taken from srun where they are not set.
    """
    for name, slurm in (("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_NTASKS"), ("LOCAL_RANK", "SLURM_LOCALID")):
        if slurm in os.environ:
            os.environ.setdefault(name, os.environ[slurm])
    if parent := os.environ.get("PRISM_PARENT"):
        die_with_parent(int(parent))
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)
    job = StageJob(
        spec=read_stage(sys.argv[1]),
        root=Path(os.environ["PRISM_ROOT"]),
        attempt_dir=Path(os.environ["PRISM_ATTEMPT_DIR"]),
        step=os.environ.get("PRISM_STEP", "main"),
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
    )
    job._end_if_given_up()  # whoever holds the claim now has started this process
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, lambda got, _: job._stop_asked(got))
    code = _run(main, job)
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # Python would go back to the default on its way out: death
    if code and job.world_size > 1:
        # Process groups would be torn down on the way out, which waits for the other ranks, and they for this one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _run(main: Callable[[StageJob], None], job: StageJob) -> int:
    exit_class: ExitClass = "finished"
    message, code, trace = "", 0, None
    try:
        main(job)
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        exit_class, message, code = how_it_ended(error)
        trace = traceback.format_exc() if exit_class in ("crashed", "storage", "out-of-memory") else None
    try:
        job.exit(exit_class, message, **({"traceback": trace} if trace else {}))
    except OSError as error:
        print(f"{job.attempt_dir}: the exit file cannot be written: {error}", file=sys.stderr)
        code = code or 1
    if trace or message:
        print(trace or message, file=sys.stderr, flush=True)
    return code


#: EIO, ENOSPC, EROFS, EDQUOT, ESTALE.
_STORAGE = (5, 28, 30, 122, 116)
_GPU_MEMORY = re.compile(
    r"(CUDA|HIP)[^\n]{0,20}out of memory|Cuda failure 2 |(CUBLAS|CUDNN)_STATUS_\w*ALLOC\w*_FAILED|"
    r"cudaErrorMemoryAllocation",
    re.IGNORECASE,
)
_HOST_MEMORY = re.compile(r"DefaultCPUAllocator: can't allocate memory|Cannot allocate memory")


def how_it_ended(error: BaseException) -> tuple[ExitClass, str, int]:
    """Class, message and exit code of a worker that ended with an exception."""
    words = str(error)
    if isinstance(error, Stopped):
        return "time-limit", words or "saved and stopped as asked", 0
    if isinstance(error, Diverged):
        return "diverged", words, 1
    if isinstance(error, (UserError, SpecError)):
        return "user-error", words, 2
    if isinstance(error, OSError) and error.errno in _STORAGE:
        mend = "free some room, then run again" if error.errno in (28, 122) else "mend that, then run again"
        return "storage", f"{f'{error.filename}: ' if error.filename else ''}{error.strerror}; {mend}", 1
    if "OutOfMemory" in type(error).__name__ or _GPU_MEMORY.search(words):
        mend = "lower micro_batch_size or seq_length, or spread the model over more GPUs or nodes"
        return "out-of-memory", f"out of GPU memory: {_first_line(words)}; {mend}", 1
    if isinstance(error, MemoryError) or _HOST_MEMORY.search(words):
        mend = "ask for more memory a node (`mem`) or for more nodes"
        return "out-of-memory", f"out of memory of the machine {socket.gethostname()}; {mend}", 1
    return "crashed", words if isinstance(error, (OSError, WorldError)) else f"{type(error).__name__}: {words}", 1


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0].removesuffix(".")
