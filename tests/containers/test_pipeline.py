"""A whole pipeline with every process in a Docker container, by the profile `local-docker`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from container_calls import CHECKOUT, call

from launcher import store
from launcher.attempts import attempts_at
from launcher.cluster import load_profile
from launcher.containers import list_argv
from launcher.data import data_dir
from launcher.run_record import read_run

pytestmark = pytest.mark.slow
RECIPE = CHECKOUT / "tests" / "containers" / "pipeline.yaml"


def test_prepare_train_convert_rl_evaluate(cpu_image: str, tmp_path: Path) -> None:
    shipped = (data_dir("slurm") / "clusters" / "local-docker.yaml").read_text()
    (tmp_path / "docker.yaml").write_text(shipped.replace(": prism-launch-cpu", f": {cpu_image}"))
    images = set(load_profile(str(tmp_path / "docker.yaml")).images.values())
    assert images == {cpu_image}
    root = tmp_path / "root"
    command = [sys.executable, "-m", "launcher.cli", "run", str(RECIPE), "--root", str(root)]
    done = subprocess.run(
        [*command, "--cluster", str(tmp_path / "docker.yaml")],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    logs = "\n".join(p.read_text()[-2000:] for p in root.glob("runs/*/stages/*/*/*.log"))
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}\n{logs[-6000:]}"
    record = read_run(root, "contained")
    assert [s.spec.kind for s in record.stages] == ["prepare", "train", "convert", "rl", "evaluate"]
    for stage in record.stages:
        receipt = store.read_receipt(root, stage.spec.artifact)
        assert receipt is not None and receipt.cpu_seconds > 0.5, stage.spec.stage
        (made_in,) = attempts_at(root, stage.spec)
        events = map(json.loads, (made_in.folder / "events.jsonl").read_text().splitlines())
        argvs = [e["argv"] for e in events if e["event"] == "launched"]
        assert argvs and all(argv[:2] == ["docker", "run"] and cpu_image in argv for argv in argvs)
        assert call(*list_argv("docker", f"{root}/{stage.spec.artifact}")).stdout == ""
    assert {path.stat().st_uid for path in root.rglob("*")} == {os.getuid()}
    report = json.loads(
        subprocess.run(
            [sys.executable, "-m", "launcher.cli", "report", "contained", "--json", "--root", str(root)],
            env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
            capture_output=True,
            check=True,
        ).stdout
    )
    assert len(report["results"]) == 6 and all(r["n"] == 8 for r in report["results"])
