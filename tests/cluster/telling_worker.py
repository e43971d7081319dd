"""A worker that writes down the words and variables that reached it: `telling_worker.py STAGE_JSON WORD…`."""

from __future__ import annotations

import json
import os
import sys

from launcher.progress import StageJob, run_worker


def main(job: StageJob) -> None:
    told = {"words": sys.argv[2:], "env": dict(os.environ), "cwd": os.getcwd()}
    (job.output("checkpoint") / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    run_worker(main)
