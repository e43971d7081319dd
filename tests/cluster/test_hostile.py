"""Values that a shell would act on reach the worker as they are on a real Slurm, nothing of them is run, and secrets
reach it without standing in any file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_submit import OnSlurm

from launcher.cluster import place_record
from launcher.devcluster.cluster import DevCluster
from launcher.spec import Step
from tests.supervisor.counting import counting_run

HOSTILE = {
    "SPACES": "  two  blanks ",
    "QUOTES": """it's "quoted\"""",
    "RUNS": "$(touch {marker}) `touch {marker}`; touch {marker} & touch {marker} | touch {marker}",
    "LINES": "first\ntouch {marker}\n#SBATCH --partition=nowhere\n",
    "GLOBS": "* ? [a-z] ~ !! $HOME ${{HOME}} \\ \\n %j",
    "WORDS": "naïve ünïcode 模型 🧪",
    "DASH": "--partition=nowhere",
    "EMPTY": "",
}
SECRET = "plantedPlanted0123"
FOLDER = """it's $(touch hacked); "ü" `touch hacked` & #x"""


def test_hostile_values_and_paths_run_as_text(
    devcluster: DevCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(devcluster.slurm_conf))
    monkeypatch.setenv("PLANTED_TOKEN", SECRET)
    on = OnSlurm(tmp_path / FOLDER, devcluster)
    marker = tmp_path / "hacked"
    values = {name: value.format(marker=marker) for name, value in HOSTILE.items()}
    profile = replace(on.profile, env={**on.profile.env, **{f"PROFILE_{k}": v for k, v in values.items()}})
    worker = Path(__file__).with_name("telling_worker.py")
    step = Step(name="tell", argv=("{python}", str(worker), "{stage_json}", *values.values()), env=values)
    run = counting_run(("a", (), {}))
    spec = replace(run.stages[0].spec, steps=(step,), secrets=("PLANTED_TOKEN",))
    planned = replace(run.stages[0], spec=spec)
    record = place_record(replace(run, cluster="dev", stages=(planned,)), profile, on.root)
    on.profile = profile
    on.submit(record)
    assert on.finish(record) == {"a": "done"}
    told = json.loads((on.root / spec.outputs["checkpoint"].path / "told.json").read_text())
    assert told["words"] == list(values.values())
    assert {name: told["env"][name] for name in values} == values
    assert {name: told["env"][f"PROFILE_{name}"] for name in values} == values
    assert str(on.root) in told["cwd"] and not marker.exists()
    assert list(tmp_path.rglob("hacked")) == []
    assert told["secrets"] == {"PLANTED_TOKEN": hashlib.sha256(SECRET.encode()).hexdigest()}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5 and [path for path in files if SECRET.encode() in path.read_bytes()] == []
