"""Stages in containers on several nodes of a real Slurm: by Charliecloud, and by pyxis's options."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from on_slurm import CHECKOUT, lacking, until
from test_submit import OnSlurm

from launcher import store
from launcher.cluster import place_record
from launcher.configs import Resources
from launcher.devcluster.cluster import DevCluster
from launcher.run_record import PlannedStage, RunRecord
from launcher.spec import Runtime, StageSpec, Step
from launcher.steps import SlurmAttempt, slurm_place, srun_argv
from launcher.submit import cancel_jobs
from tests.supervisor.counting import counting_run

#: Of an image that was made for something else.
IMAGE_ENVIRONMENT = {"FROM_IMAGE": "yes", "OMP_NUM_THREADS": "99", "PYTHONPATH": "/wrong", "PRISM_ROOT": "/wrong"}
HOSTILE = {"A": "$(touch hacked); 'q' \"d\"", "B": "two\nlines", "C": "mlx5_0,mlx5_1", "D": ""}


class Image:
    """A folder that holds Python alone, and the roots that it has mount points for."""

    def __init__(self, folder: Path):
        self.path = folder / "image"
        self.roots = {runtime: folder / runtime for runtime in ("charliecloud", "pyxis")}
        self.data = folder / "data"
        self.data.mkdir()
        (self.data / "file").write_text("read")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    made = Image(tmp_path_factory.mktemp("containers"))
    points = [*made.roots.values(), CHECKOUT, "/mnt/data"]
    options = [f"--mount-point={point}" for point in points]
    build = [sys.executable, str(CHECKOUT / "containers" / "build_here.py"), "--bare", f"--folder={made.path}"]
    subprocess.run([*build, *options], check=True)
    lines = "".join(f"{name}={value}\n" for name, value in IMAGE_ENVIRONMENT.items())
    (made.path / "etc" / "environment").write_text(lines)
    return made


@pytest.fixture(scope="module")
def charliecloud() -> None:
    if shutil.which("ch-run") is None:
        lacking("ch-run is not installed; Debian's package charliecloud-runtime has it")


@pytest.fixture(scope="module")
def pyxis(devcluster: DevCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The stand-in for pyxis, loaded into every step that starts meanwhile."""
    if shutil.which("gcc") is None or not Path("/usr/include/slurm/spank.h").exists():
        lacking("gcc and slurm/spank.h are not installed; Debian's packages gcc and libslurm-dev have them")
    if os.geteuid() != 0:
        lacking("the stand-in for pyxis mounts, which only root may")
    plugin = tmp_path_factory.mktemp("spank") / "pyxis_stand_in.so"
    source = Path(__file__).with_name("pyxis_stand_in.c")
    subprocess.run(["gcc", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", plugin, source], check=True)
    plugstack = devcluster.slurm_conf.with_name("plugstack.conf")
    before = plugstack.read_text()
    plugstack.write_text(f"{before}\nrequired {plugin}\n")
    yield
    plugstack.write_text(before)


@pytest.fixture(params=["charliecloud", "pyxis"])
def on(
    request: pytest.FixtureRequest, devcluster: DevCluster, image: Image, monkeypatch: pytest.MonkeyPatch
) -> OnSlurm:
    request.getfixturevalue(request.param)
    monkeypatch.setenv("SLURM_CONF", str(devcluster.slurm_conf))
    # What a submitting shell might carry along.
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    monkeypatch.delenv("USER", raising=False)
    found = OnSlurm(image.roots[request.param], devcluster)
    found.profile = replace(
        found.profile,
        runtime=Runtime(container=request.param, mpi="none"),
        images={"train": str(image.path)},
        mounts=(f"{image.data}:/mnt/data:ro",),
        env=HOSTILE,
        python="/opt/prism/bin/python3",
        host_python=sys.executable,
        code=str(CHECKOUT),
    )
    return found


def planned(on: OnSlurm) -> RunRecord:
    """`look` on two nodes with two ranks each, `count`, which would take long, and `bad` with a mount of nothing."""
    run = counting_run(("look", (), {}), ("count", (), {"until": 1000, "sleep": 0.1, "save": 1000}), ("bad", (), {}))
    look, count, bad = run.stages
    misled = replace(bad.spec.steps[0], mounts=(f"{on.root}/nowhere:/mnt/data",))
    worker = str(Path(__file__).with_name("looking_worker.py"))
    argv = ("{python}", worker, "{stage_json}", "/mnt/data/file")
    step = Step(name="look", argv=argv, nodes=2, ntasks=4, gpus=2, cpus=3)
    two = Resources(nodes=2, ntasks_per_node=2, gpus_per_node=2, cpus_per_task=3, mem="200M")
    one = Resources(mem="200M")
    runtime = on.profile.runtime
    stages = (
        PlannedStage(replace(look.spec, steps=(step,), runtime=runtime), (), two),
        PlannedStage(replace(count.spec, runtime=runtime), (), one),
        PlannedStage(replace(bad.spec, steps=(misled,), runtime=runtime), (), one),
    )
    return place_record(replace(run, cluster="dev", stages=stages), on.profile, on.root)


def launched(on: OnSlurm, spec: StageSpec, job: str) -> tuple[str, ...]:
    lines = (store.stage_dir(on.root, "run", spec.stage) / f"{job}.0" / "events.jsonl").read_text().splitlines()
    (event,) = (e for e in map(json.loads, lines) if e["event"] == "launched")
    return tuple(event["argv"])


def test_stages_run_in_containers_on_two_nodes(on: OnSlurm, image: Image) -> None:
    record = planned(on)
    jobs = on.submit(record)
    until(lambda: not {"queued", "running"} & {on.states(record)[s] for s in ("look", "bad")}, 90, "two of three ends")
    on.await_step(record, 3, "count")
    assert cancel_jobs(on.root, record) == ["count"]
    assert on.finish(record) == {"look": "done", "count": "stopped", "bad": "failed"}

    look, count, bad = (stage.spec for stage in record.stages)
    made = on.root / look.outputs["checkpoint"].path
    ranks: list[dict[str, Any]] = [json.loads((made / f"{rank}.json").read_text()) for rank in range(4)]
    # /opt/prism is in the image and not on the nodes.
    assert {r["python"] for r in ranks} == {"/opt/prism/bin/python3"} and not Path("/opt/prism").exists()
    assert len({r["node"] for r in ranks}) == 2 and {r["files"]["/mnt/data/file"] for r in ranks} == {"read"}
    assert {r["cwd"] for r in ranks} == {str(store.stage_dir(on.root, "run", "look"))}
    for rank in ranks:
        env = rank["env"]
        assert {name: env[name] for name in HOSTILE} == HOSTILE
        assert (env["OMP_NUM_THREADS"], env["PYTHONPATH"], env["PRISM_ROOT"]) == ("3", str(CHECKOUT), str(on.root))
        assert env["CUDA_VISIBLE_DEVICES"] == "0,1" and "PYTHONHOME" not in env
        assert env.get("FROM_IMAGE") == ("yes" if on.profile.runtime.container == "pyxis" else None)
    assert not list(image.path.parent.rglob("hacked"))

    argv = launched(on, look, jobs["look"])
    node = next(word for word in argv if word.startswith("MASTER_ADDR=")).partition("=")[2]
    place = slurm_place(look, on.root, on.profile.python, SlurmAttempt(jobs["look"], "0", node))
    assert argv == srun_argv(look.steps[0], place, look.runtime)

    end = on.end(f"{jobs['count']}.0", "count")
    saved = int((store.partial_dir(on.root, count.artifact) / "progress" / "count").read_text())
    assert end["class"] == "cancelled" and saved >= 3, "it saves when asked alone"

    logs = [path.read_text() for path in store.stage_dir(on.root, "run", "bad").rglob("*.log")]
    assert any(f"{on.root}/nowhere" in text for text in logs), logs
