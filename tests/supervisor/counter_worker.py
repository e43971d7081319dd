"""A worker of the real protocol that counts and saves: stands for a trainer where only the supervisor is looked at.

    python counter_worker.py STAGE_JSON [key=value ...]

Keys: until=N, sleep=S (a step), save=N (steps between saves), fail_at=N with fail=raise|exit|user|diverge|kill|full|
gpu|memory|gpu-memory|oom|hang, fail_on=NODE (on that node alone), once=1 (fails once), hang_at=N, ignore=1 (does not
listen to signals), empty=1 (leaves the port empty), fill=BYTES (of the port), heavy=BYTES (of a saved count),
cgroup=FOLDER (which `oom` enters).
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.progress import Diverged, StageJob, Stopped, run_worker
from launcher.store import write_atomic

OPTIONS: dict[str, Any] = dict(word.split("=", 1) for word in sys.argv[2:])


class OutOfMemoryError(RuntimeError):
    """Stands for torch's of the same name."""


def main(job: StageJob) -> None:
    until, every = int(OPTIONS.get("until", 5)), int(OPTIONS.get("save", 1))
    saved = job.workdir / "progress" / "count"
    step = int(saved.read_text()) if saved.exists() else 0
    print(f"from step {step}", flush=True)
    if OPTIONS.get("ignore"):
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    if job.rank == 0:
        (job.output("checkpoint") / "half").write_text("half-written")
    while step < until:
        step += 1
        time.sleep(float(OPTIONS.get("sleep", 0.01)))
        fail(step, saved)
        job.beat(step, until, loss=1.0 / step)
        if job.rank == 0 and (step % every == 0 or job.stop_requested):
            write_atomic(saved, str(step) + " " * int(OPTIONS.get("heavy", 0)))
        if job.stop_requested and step < until:
            raise Stopped(f"saved at {step}")
    if job.rank == 0:
        (job.output("checkpoint") / "half").unlink()
        if not OPTIONS.get("empty"):
            (job.output("checkpoint") / "weights").write_text(str(step))
        if "fill" in OPTIONS:
            (job.output("checkpoint") / "filler").write_bytes(bytes(int(OPTIONS["fill"])))
        job.record(steps=step)


def fail(step: int, saved: Any) -> None:
    """Fail as the options say; with `once=1` in the first attempt alone."""
    if step == int(OPTIONS.get("hang_at", -1)):
        time.sleep(3600)
    failed_before = saved.with_name("failed")
    if step != int(OPTIONS.get("fail_at", -1)) or failed_before.exists():
        return
    if OPTIONS.get("fail_on", os.environ.get("SLURMD_NODENAME")) != os.environ.get("SLURMD_NODENAME"):
        return
    if OPTIONS.get("once"):
        write_atomic(failed_before, "")
    how = OPTIONS["fail"]
    if how == "hang":
        time.sleep(3600)
    if how == "raise":
        raise RuntimeError("a fault of the code")
    if how == "user":
        raise UserError("data.jsonl:3: not text; mend it")
    if how == "diverge":
        raise Diverged(f"step {step}: loss is nan")
    if how == "full":
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")
    if how == "gpu":
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable")
    if how == "gpu-memory":
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79 GiB.")
    if how == "memory":
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
        bytearray(2 << 30)
    if how == "oom":
        Path(OPTIONS["cgroup"], "cgroup.procs").write_text(str(os.getpid()))
        print("taking memory", flush=True)
        kept = [b"x" * (1 << 20) for _ in range(1 << 12)]
        raise AssertionError(f"nobody stopped at {len(kept)} MiB")
    if how == "exit":
        print("one\n\ntwo\nthe last words", flush=True)
        os._exit(7)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    run_worker(main)
