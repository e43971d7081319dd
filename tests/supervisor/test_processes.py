"""A step's srun, played by a script."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.supervisor.processes import SrunStep, kill_all
from tests.supervisor.counting import counting_step

SRUN = """
import signal, sys, time
def end(*_):
    print("srun: forcing job termination", file=sys.stderr, flush=True)
    sys.exit(137)
signal.signal(signal.SIGTERM, signal.SIG_IGN if sys.argv[1] == "deaf" else end)
print("up", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("manner", ["hears", "deaf"])
def test_srun_is_asked_before_it_is_killed(tmp_path: Path, manner: str) -> None:
    argv = [sys.executable, "-c", SRUN, manner]
    popen = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    assert popen.stdout is not None and popen.stderr is not None
    with popen.stdout, popen.stderr:
        assert popen.stdout.readline() == b"up\n"
        os.set_blocking(popen.stderr.fileno(), False)
        step = SrunStep(counting_step(), 0, popen, tmp_path)
        kill_all([step])
        (found,) = step.exits()
        assert popen.returncode == {"hears": 137, "deaf": -signal.SIGKILL}[manner]
        assert found.code == -signal.SIGKILL, "its ranks were killed, whoever did it"
    said = tmp_path / "count.srun.log"
    assert ("forcing job termination" in said.read_text()) if manner == "hears" else not said.exists()
