"""A worker whose every rank writes down where it finds itself: `looking_worker.py STAGE_JSON FILE…`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from launcher.progress import StageJob, run_worker


def main(job: StageJob) -> None:
    found = {"env": dict(os.environ), "python": sys.executable, "cwd": os.getcwd(), "node": os.uname().nodename}
    files = {name: Path(name).read_text() for name in sys.argv[2:]}
    (job.output("checkpoint") / f"{job.rank}.json").write_text(json.dumps({**found, "files": files}))


if __name__ == "__main__":
    run_worker(main)
