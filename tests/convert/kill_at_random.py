"""Convert and be killed, again and again; what `test_target.py` starts.

    python kill_at_random.py SRC WORK TARGET TIMES

Each conversion is a fork of this process, in which torch is loaded already; it gets SIGKILL at moments that are spread
over what a whole one takes. What a killed one has left stays for the next.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from launcher import store
from launcher.convert.__main__ import run

#: An archive is of format nemo, and its name is that of the target.
FORMATS = {"x.nemo": "nemo"}


def main(source: Path, work: Path, name: str, times: int) -> None:
    """Exit code 0 unless a killed conversion left something that looks whole and is not."""
    os.environ["OMP_NUM_THREADS"] = "1"  # a fork has no threads of OpenMP; torch is loaded after this
    target, wrong, shuffled = work / name, 0, random.Random(4)
    work.mkdir()
    convert(source, target)  # what is loaded on first use
    remove(target)
    began = time.monotonic()
    convert(source, target)
    seconds, wanted = time.monotonic() - began, content(target)
    remove(target)
    for turn in range(times):
        child = os.fork()
        if child == 0:
            convert(source, target)
            os._exit(0)
        time.sleep(seconds * 1.2 * (turn + shuffled.random()) / times)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if os.path.lexists(target):
            wrong += content(target) != wanted
            remove(target)
    convert(source, target)
    wrong += content(target) != wanted
    # one killed before it had written whose claim it is leaves a folder that could be a living one's
    left = [p.name for p in work.iterdir() if not (p.name.startswith(".") and store.claim_holder(p) is None)]
    print(f"{times} killed or done, {wrong} wrong, then there is {', '.join(left)}")
    sys.exit(wrong > 0 or left != [name])


def convert(source: Path, target: Path) -> None:
    """One conversion, in the format that the target's name says."""
    run(source, target, FORMATS.get(target.name, target.name))


def remove(target: Path) -> None:
    """Take a file or folder away."""
    shutil.rmtree(target) if target.is_dir() else target.unlink()


def content(path: Path) -> dict[str, bytes]:
    """The bytes of a file, or of all files of a folder but the record, in which there are seconds."""
    files = (p for p in path.rglob("*") if p.is_file() and p.name != "conversion.json")
    return {str(p.relative_to(path)): p.read_bytes() for p in (files if path.is_dir() else [path])}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
