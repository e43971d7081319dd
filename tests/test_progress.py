"""How a worker's end is told apart, by what it ended with."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import progress, store
from launcher.errors import UserError, WorldError
from launcher.progress import Diverged, StageJob, Stopped, how_it_ended
from launcher.spec import stage_text
from tests.supervisor.counting import CHECKOUT, counting_stage


class OutOfMemoryError(RuntimeError):
    """Stands for torch's of the same name."""


@pytest.mark.parametrize(
    ("error", "exit_class", "message", "code"),
    [
        (Stopped("saved at 3"), "time-limit", "saved at 3", 0),
        (Diverged("step 3: loss is nan"), "diverged", "step 3: loss is nan", 1),
        (UserError("a.jsonl:3: not text"), "user-error", "a.jsonl:3: not text", 2),
        (OSError(errno.ENOSPC, "No space left", "/x/y"), "storage", "/x/y: No space left; free some room", 1),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/x"), "storage", "free some room", 1),
        (OSError(errno.EIO, "Input/output error", "/x"), "storage", "mend that", 1),
        (OSError(errno.ENOENT, "No such file or directory", "/x"), "crashed", "No such file", 1),
        (WorldError("x: no such program"), "crashed", "x: no such program", 1),
        (MemoryError(), "out-of-memory", "out of memory of the machine", 1),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to"
                      " allocate 8589934592 bytes."), "out-of-memory", "ask for more memory a node", 1),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out-of-memory", "ask for more memory a node", 1),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation"), "out-of-memory",
         "out of GPU memory: CUDA out of memory. Tried to allocate 2.00 GiB; lower micro_batch_size", 1),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors"), "out-of-memory", "out of GPU memory", 1),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "out-of-memory",
         "out of GPU memory", 1),
        (RuntimeError("shape mismatch"), "crashed", "RuntimeError: shape mismatch", 1),
    ],
)  # fmt: skip
def test_ends(error: BaseException, exit_class: str, message: str, code: int) -> None:
    found = how_it_ended(error)
    assert (found[0], found[2]) == (exit_class, code) and message in found[1] and "\n" not in found[1]


def test_what_is_no_exception_leaves_an_exit_file_too(tmp_path: Path) -> None:
    """torch.distributed.checkpoint.CheckpointException is a BaseException."""
    (tmp_path / "stage.json").write_text(stage_text(counting_stage()))
    code = (
        "from launcher.progress import run_worker\n"
        "class CheckpointException(BaseException): pass\n"
        "def main(job): raise CheckpointException('ranks: 0')\n"
        "run_worker(main)"
    )
    variables = {"PYTHONPATH": str(CHECKOUT), "PRISM_ROOT": str(tmp_path), "PRISM_ATTEMPT_DIR": str(tmp_path)}
    command = [sys.executable, "-c", code, str(tmp_path / "stage.json")]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60)
    said = store.read_json(tmp_path / "exit.main.0.json")
    assert done.returncode == 1 and (said["class"], said["message"]) == ("crashed", "CheckpointException: ranks: 0")
    assert "CheckpointException" in json.dumps(said["traceback"])


def test_a_heartbeat_within_the_pause_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = StageJob(counting_stage(), tmp_path, tmp_path, "count")
    clock = [1000.0]
    monkeypatch.setattr(progress.time, "time", lambda: clock[0])

    def beat(step: int, after: float, pause_s: float) -> int:
        clock[0] += after
        job.beat(step, 9, pause_s=pause_s)
        return int(json.loads((tmp_path / "heartbeat.count.0.json").read_text())["step"])

    assert beat(1, 0.0, 1.0) == 1, "the first is"
    assert beat(2, 0.9, 1.0) == 1
    assert beat(3, 0.2, 1.0) == 3
    assert beat(4, 0.0, 0.0) == 4, "nor does one wait that must be seen"
    assert beat(5, -60.0, 1.0) == 5, "nor for a clock that was set back"


def test_the_last_beat_is_said_again_while_something_else_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, clock = StageJob(counting_stage(), tmp_path, tmp_path, "count"), [1000.0]
    monkeypatch.setattr(progress.time, "time", lambda: clock[0])
    job.beat_again()
    path = tmp_path / "heartbeat.count.0.json"
    assert not path.exists(), "nothing was said yet"
    job.beat(3, 9, loss=2.5)
    said = json.loads(path.read_text())
    clock[0] += 0.5
    job.beat_again(pause_s=1.0)
    assert json.loads(path.read_text()) == said
    clock[0] += 1.0
    job.beat_again(pause_s=1.0)
    assert json.loads(path.read_text()) == said | {"time": 1001.5}
    path.unlink()
    path.mkdir()  # nothing can be written over it
    job.beat_again()
