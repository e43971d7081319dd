"""A rank that fails alone is told as what it is, and not as the fault of those that waited for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher import store
from launcher.spec import Step, stage_text
from launcher.supervisor.classify import Evidence, RankExit, Said, classify, only_secondhand
from tests.supervisor.counting import CHECKOUT, Store, counting_stage, counting_step

WATCHDOG = "[rank1]:[E ProcessGroupNCCL.cpp:616] [Rank 1] Watchdog caught collective operation timeout: WorkNCCL("
ENDED = (
    f"{WATCHDOG}\nterminate called after throwing\n  what():  Process group watchdog thread terminated with exception"
)
NO_MEMORY = Said("out-of-memory", "out of GPU memory: CUDA out of memory; lower micro_batch_size")
LOST = Said("crashed", "RuntimeError: Connection closed by peer [10.0.0.1]:4242")


def aborted(rank: int, log: str = WATCHDOG) -> RankExit:
    """A rank that its watchdog ended: it wrote no word of its own."""
    return RankExit("train", rank, -signal.SIGABRT, None, f"n{rank}", log)


def said(rank: int, word: Said) -> RankExit:
    return RankExit("train", rank, 1, word, f"n{rank}")


@pytest.mark.parametrize(
    ("word", "exit_class", "action"),
    [
        (NO_MEMORY, "out-of-memory", "stop"),
        (Said("user-error", "data.jsonl:3: token 99 of 50"), "user-error", "stop"),
        (Said("storage", "/x: No space left"), "storage", "stop"),
        (Said("crashed", "IndexError: 7"), "crashed", "stop"),
    ],
)
def test_whoever_has_a_cause_wins_over_those_that_waited(word: Said, exit_class: str, action: str) -> None:
    for exits in ([aborted(0), aborted(1), said(2, word)], [said(0, LOST), aborted(1), said(2, word), aborted(3)]):
        found = classify(Evidence(exits))
        assert (found.exit_class, found.action, found.suspect, found.exclude) == (exit_class, action, (), ())
        assert found.blamed == ("train", 2) and word.message in found.message


def test_a_killed_rank_is_the_cause_of_the_others_timeouts() -> None:
    found = classify(Evidence([aborted(0), RankExit("train", 1, -signal.SIGKILL, None, "n1")], memory_kill=True))
    assert (found.exit_class, found.blamed) == ("out-of-memory", ("train", 1))


def test_where_all_waited_their_nodes_stay_under_suspicion() -> None:
    exits = [aborted(0), aborted(1)]
    assert only_secondhand(exits)
    found = classify(Evidence(exits))
    assert (found.exit_class, found.action, found.suspect) == ("gpu-fault", "again", ("n0",))
    assert classify(Evidence([said(0, LOST), aborted(1)])).suspect == ("n1",), "a watchdog saw more than a lost peer"


def test_a_rank_whose_gpu_broke_is_a_cause_although_its_watchdog_ended_it() -> None:
    broken = aborted(1, f"NVRM: Xid (PCI:0000:41:00): 79, GPU has fallen off the bus.\n{WATCHDOG}")
    found = classify(Evidence([aborted(0, ENDED), broken]))
    assert (found.exit_class, found.exclude, found.suspect) == ("gpu-fault", ("n1",), ())


STUCK = """
import sys, time
from launcher.progress import StageJob
from launcher.spec import read_stage
import os, pathlib
job = StageJob(read_stage(sys.argv[1]), pathlib.Path(os.environ["PRISM_ROOT"]),
               pathlib.Path(os.environ["PRISM_ATTEMPT_DIR"]), "stuck")
job.exit("out-of-memory", "out of GPU memory: CUDA out of memory")
time.sleep(600)  # in its process group's end, which waits for the others
"""
ABORTED = f"""
import os, pathlib, time
while not (pathlib.Path(os.environ["PRISM_ATTEMPT_DIR"]) / "exit.stuck.0.json").exists():
    time.sleep(0.05)
print({WATCHDOG!r}, flush=True)
os.abort()
"""


def test_a_rank_that_has_said_why_is_heard_before_it_is_gone(at: Store) -> None:
    """Its process is stuck on its way out, and the others' watchdogs end them first."""
    stuck = Step("stuck", ("{python}", "-c", STUCK, "{stage_json}"))
    other = Step("other", ("{python}", "-c", ABORTED), gpus=1)
    spec = counting_stage(stuck, other)
    assert at.run(spec) == 1
    end = at.end(spec)
    assert (end["class"], end["action"]) == ("out-of-memory", "stop") and "suspect" not in end, end
    assert not at.processes()


@pytest.fixture
def at(tmp_path: Path) -> Store:
    return Store(tmp_path)


FAILING = """
import atexit, threading, time
from launcher.progress import run_worker
class OutOfMemoryError(RuntimeError): pass
def main(job):
    atexit.register(time.sleep, 600)
    threading.Thread(target=time.sleep, args=(600,)).start()
    raise {error}
run_worker(main)
"""


@pytest.mark.parametrize(
    ("error", "exit_class", "code"),
    [
        ('OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")', "out-of-memory", 1),
        ('RuntimeError("shape mismatch")', "crashed", 1),
        ('__import__("launcher.errors").errors.UserError("token 99 of 50")', "user-error", 2),
    ],
)
def test_one_of_several_that_fails_leaves_at_once(tmp_path: Path, error: str, exit_class: str, code: int) -> None:
    """Whatever would be torn down on the way out: threads, process groups, handlers that wait for the other ranks."""
    spec = replace(counting_stage(counting_step(ntasks=2)))
    (tmp_path / "stage.json").write_text(stage_text(spec))
    ours = {"PYTHONPATH": str(CHECKOUT), "PRISM_ROOT": str(tmp_path), "PRISM_ATTEMPT_DIR": str(tmp_path)}
    variables: dict[str, Any] = {**os.environ, **ours, "RANK": "1", "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", FAILING.format(error=error), str(tmp_path / "stage.json")]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
    found = store.read_json(tmp_path / "exit.main.1.json")
    assert (done.returncode, found["class"]) == (code, exit_class)
    assert exit_class == "user-error" or "Traceback" in done.stderr and "Traceback" in found["traceback"]
