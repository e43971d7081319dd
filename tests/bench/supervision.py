"""The supervisor: from the death of a worker to its being seen, and to its step being gone."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from launcher import store
from launcher.spec import StageSpec, Step
from tests.bench.measure import Row
from tests.supervisor.counting import Store, counting_stage, counting_step

RUNS = 5
#: Notes when the supervisor, having seen a death, asks it to stop; `deaf` goes on all the same, as one in a collective.
_WITNESS = """
import pathlib, signal, sys, time
def asked(number, frame):
    pathlib.Path("asked.new").write_text(repr(time.time()))
    pathlib.Path("asked.new").rename("asked")
    if sys.argv[1] != "deaf":
        sys.exit(0)
signal.signal(signal.SIGUSR2, asked)
pathlib.Path("listening").touch()
while True:
    time.sleep(60)
"""


def measure(scratch: Path) -> list[Row]:
    """A rank is killed with SIGKILL while another process of its stage, which listens or does not, goes on."""
    listening = [_kill_one(Store(scratch / f"listening-{i}"), "listening") for i in range(RUNS)]
    deaf = [_kill_one(Store(scratch / f"deaf-{i}"), "deaf") for i in range(3)]
    how = "wall clock from SIGKILL of one process"
    return [
        Row("dead worker seen", tuple(s for s, _ in listening + deaf), "s", f"{how} to the others' being asked", 0.5),
        Row("its stage gone, others stop when asked", tuple(g for _, g in listening), "s", f"{how} to the last", 1.0),
        Row("its stage gone, others do not listen", tuple(g for _, g in deaf), "s", f"{how} to the last", 1.0),
    ]


def _kill_one(at: Store, manner: str) -> tuple[float, float]:
    """Seconds until a death was seen, and until no process of the stage was left."""
    witness = Step(name="witness", argv=("{python}", "-c", _WITNESS, manner))
    spec = counting_stage(counting_step(until=100000, sleep=0.02), witness)
    supervisor = at.start(spec)
    try:
        at.wait_for(lambda: (at.attempt_dir(spec) / "listening").exists() and at.step_reached(spec, 2))
        pids = _launched(at, spec)
        died = time.time()
        os.kill(pids.pop("count"), signal.SIGKILL)
        end = died + 60
        while store.process_start(pids["witness"]) is not None:
            if time.time() > end:
                raise RuntimeError("a process of the stage is left after 60 s")
            time.sleep(0.005)
        gone = time.time() - died
        supervisor.communicate(timeout=60)
    finally:
        supervisor.kill()
        supervisor.wait()
    return float((at.attempt_dir(spec) / "asked").read_text()) - died, gone


def _launched(at: Store, spec: StageSpec) -> dict[str, int]:
    return {e["step"]: e["pid"] for e in at.events(spec) if e["event"] == "launched"}
