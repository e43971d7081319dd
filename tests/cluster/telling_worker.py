"""A worker that writes down what reached it: `telling_worker.py STAGE_JSON WORD…`. Of secrets it keeps the hash."""

from __future__ import annotations

import hashlib
import json
import os
import sys

from launcher.progress import StageJob, run_worker


def main(job: StageJob) -> None:
    hashes = {name: hashlib.sha256(os.environ[name].encode()).hexdigest() for name in job.spec.secrets}
    variables = {name: value for name, value in os.environ.items() if name not in hashes}
    told = {"words": sys.argv[2:], "env": variables, "cwd": os.getcwd(), "secrets": hashes}
    (job.output("checkpoint") / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    run_worker(main)
