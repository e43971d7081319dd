"""Rendering: golden files, the folder that render writes, and submit.sh as it runs.

Run as a program (`make golden`) it accepts what is rendered now as golden.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.check import check_recipe
from launcher.cluster import Profile, load_profile, profile_files
from launcher.errors import UserError
from launcher.inputs import External, Inputs, resolve_inputs
from launcher.plan import build_plan
from launcher.recipe.load import load_recipes
from launcher.render import dry_run, files, render_plan
from launcher.run_record import RunRecord, read_run
from launcher.spec import Limits, Runtime, SpecError, read_stage

GOLDEN = Path(__file__).resolve().parent / "golden"
CHECKOUT = GOLDEN.parents[1]
ROOT = Path("/scratch/prism")
SLURM = [path.stem for path in profile_files() if load_profile(str(path)).scheduler == "slurm"]


PYXIS = load_profile("example-pyxis")
#: Without containers any root will do; pyxis can quote few.
BARE = replace(PYXIS, name="bare", runtime=Runtime(), images={}, mounts=())


def golden_record(profile: Profile) -> RunRecord:
    """The golden recipe's run, planned without a look at this machine."""
    (recipe,) = load_recipes(GOLDEN / "recipe.yaml")
    model = External("/data/models/small", "hf", "0123456789abcdef0123", "llama")
    stages = build_plan(recipe, Inputs({model.path: model}, {}), profile.limits, profile.runtime)
    return RunRecord(recipe.name, "recipe.yaml", (), profile.name, recipe.resolved, stages, 0.0, {})


#: The full-scale recipes with their base models, rendered as if both were on this machine.
PRISM = {
    "llama-3.1-8b": External("/scratch/datasets/models/Llama-3.1-8B", "hf", "0123456789abcdef0123", "llama"),
    "nemotron-h-8b": External("/scratch/datasets/models/Nemotron-H-8B-Base-8K", "hf", "0123456789abcdef0123", None),
    "granite-3.3-8b-long-context": External(
        "/scratch/datasets/models/granite-3.3-8b-base", "hf", "0123456789abcdef0123", "granite"
    ),
}


def prism_record(name: str, profile: Profile, *sets: str) -> RunRecord:
    """A full-scale recipe's run, planned without a look at this machine."""
    (recipe,) = load_recipes(CHECKOUT / "recipes" / "prism" / f"{name}.yaml", sets, f"prism-{name}")
    stages = build_plan(recipe, Inputs({PRISM[name].path: PRISM[name]}, {}), profile.limits, profile.runtime)
    assert check_recipe(recipe, stages, profile) == []
    return RunRecord(recipe.name, f"prism/{name}.yaml", sets, profile.name, recipe.resolved, stages, 0.0, {})


def prism_texts(name: str) -> dict[str, str]:
    texts = files(prism_record(name, PYXIS), PYXIS, ROOT)
    return {n: t for n, t in texts.items() if n.endswith((".sbatch", ".sh"))}


def golden_texts(cluster: str) -> dict[str, str]:
    profile = load_profile(cluster)
    texts = files(golden_record(profile), profile, ROOT)
    return {n: t for n, t in texts.items() if n.endswith((".sbatch", ".sh")) or n == "midtrain.stage.json"}


@pytest.mark.parametrize("cluster", SLURM)
def test_scripts_are_the_golden_ones(cluster: str) -> None:
    want = {path.name: path.read_text() for path in (GOLDEN / cluster).glob("*")}
    got = golden_texts(cluster)
    assert sorted(got) == sorted(want), "other files than before; if that is meant: make golden"
    for name, text in got.items():
        assert text == want[name], f"{cluster}/{name} has changed; if that is meant: make golden, and look at the diff"


@pytest.mark.parametrize("name", PRISM)
def test_scripts_of_the_paper_are_the_golden_ones(name: str) -> None:
    want = {path.name: path.read_text() for path in (GOLDEN / "prism" / name).glob("*")}
    got = prism_texts(name)
    assert sorted(got) == sorted(want), "other files than before; if that is meant: make golden"
    for file, text in got.items():
        assert text == want[file], f"{name}/{file} has changed; if that is meant: make golden, and look at the diff"


@pytest.mark.parametrize("placement", ["shared", "heterogeneous"])
@pytest.mark.parametrize("cluster", SLURM)
@pytest.mark.parametrize("name", PRISM)
def test_the_paper_renders_for_every_profile_in_scripts_that_bash_can_read(
    name: str, cluster: str, placement: str, tmp_path: Path
) -> None:
    if placement == "heterogeneous" and name != "llama-3.1-8b":
        return  # no component, and Ray's nodes are of one kind: tests/rl/test_nemo_rl.py
    partition = load_profile(cluster).partition
    own = f"{{nodes: 1, partition: {partition}}}" if placement == "heterogeneous" else "{nodes: 0}"
    sets = [f"rl.resources.placement={placement}", f"rl.resources.components.reward-server={own}"]
    record = prism_record(name, load_profile(cluster), *(sets if name == "llama-3.1-8b" else []))
    render_plan(record, load_profile(cluster), tmp_path / "out", ROOT)
    for script in [*(tmp_path / "out").glob("*.sbatch"), tmp_path / "out" / "submit.sh"]:
        done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), script
    done = subprocess.run([str(tmp_path / "out" / "submit.sh")], capture_output=True, text=True)
    first = "prepare" if name.endswith("long-context") else "rl"
    assert done.returncode == 2 and f"stage {first}: not built yet" in done.stderr and done.stdout == ""


# ------------------------------------------------------------------------------------------------- every profile, demo


def demo_record(cluster: str, *sets: str) -> RunRecord:
    profile = load_profile(cluster)
    (recipe,) = load_recipes(CHECKOUT / "recipes" / "demo.yaml", sets, "demo")
    stages = build_plan(recipe, resolve_inputs(recipe), profile.limits, profile.runtime)
    return RunRecord(recipe.name, recipe.path, sets, cluster, recipe.resolved, stages, 0.0, {})


@pytest.mark.parametrize("model", ["llama-tiny", "granite-tiny", "nemotron-h-tiny"])
@pytest.mark.parametrize("cluster", SLURM)
def test_the_demo_renders_for_every_profile_in_scripts_that_bash_can_read(
    cluster: str, model: str, tmp_path: Path
) -> None:
    record = demo_record(cluster, f"model={model}")
    render_plan(record, load_profile(cluster), tmp_path / "out", ROOT)
    scripts = [*(tmp_path / "out").glob("*.sbatch"), tmp_path / "out" / "submit.sh"]
    assert len(scripts) == len(record.stages) + 1 and len(record.stages) >= 9
    for script in scripts:
        done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), script
    for stage in record.stages:
        spec = read_stage(tmp_path / "out" / f"{stage.spec.stage}.stage.json")
        assert spec.fingerprint == stage.spec.fingerprint, "a cluster must not change what is computed"
        assert all(step.image for step in spec.steps)


def test_a_dry_run_shows_the_very_files_that_render_writes(tmp_path: Path) -> None:
    record, profile = golden_record(PYXIS), PYXIS
    shown = dry_run(record, profile, ROOT)
    render_plan(record, profile, tmp_path / "out", ROOT)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    parts = re.split(r"^# ---- (\S+)\n", shown, flags=re.MULTILINE)[1:]
    texts = dict(zip(parts[::2], parts[1::2], strict=True))
    assert set(texts) == names - {"run.json"}
    for name, text in texts.items():
        assert text.rstrip("\n") == (tmp_path / "out" / name).read_text().rstrip("\n")


# ------------------------------------------------------------------------------------------------------------- folder


def render(folder: Path, root: Path = ROOT, profile: Profile = PYXIS) -> None:
    render_plan(golden_record(profile), profile, folder, root)


def snapshot(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in folder.iterdir()}


def test_rendering_again_replaces_what_was_rendered(tmp_path: Path) -> None:
    render(tmp_path / "a" / "out", Path("/elsewhere"))
    (tmp_path / "a" / "out" / "gone.sbatch").write_text("a stage that the recipe had")
    render(tmp_path / "a" / "out")
    render(tmp_path / "fresh")
    assert snapshot(tmp_path / "a" / "out") == snapshot(tmp_path / "fresh")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["out"], "nothing may be left beside"
    assert os.access(tmp_path / "fresh" / "submit.sh", os.X_OK)
    assert (tmp_path / "fresh" / "midtrain.stage.json").stat().st_mode & 0o777 == 0o600


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    render(tmp_path)
    assert (tmp_path / "submit.sh").exists()


@pytest.mark.parametrize("name", ["notes.txt", "mine.sbatch", "submit.sh"])
def test_a_folder_that_render_did_not_make_is_refused_and_kept(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(UserError, match=re.escape(name)):
        render(tmp_path)
    assert snapshot(tmp_path) == {name: "precious"}


def test_a_file_of_the_user_in_a_rendered_folder_is_kept(tmp_path: Path) -> None:
    render(tmp_path)
    (tmp_path / "notes.txt").write_text("precious")
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=r"notes\.txt"):
        render(tmp_path, Path("/elsewhere"))
    assert snapshot(tmp_path) == before


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(UserError, match="is a file"):
        render(tmp_path / "out")


def test_a_plan_that_cannot_be_rendered_leaves_the_old_one(tmp_path: Path) -> None:
    render(tmp_path / "out")
    before = snapshot(tmp_path / "out")
    with pytest.raises(UserError, match="%"):
        render(tmp_path / "out", Path("/scratch/100%"))
    assert snapshot(tmp_path / "out") == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["../up", "a b", "-n", ".hidden", "a\nb", "$(touch x)", ""])
def test_names_that_cannot_name_files_are_refused(name: str) -> None:
    record = golden_record(PYXIS)
    with pytest.raises((UserError, SpecError), match="cannot name files|no name of a folder"):
        spec = replace(record.stages[0].spec, stage=name)
        files(replace(record, stages=(replace(record.stages[0], spec=spec),)), PYXIS, ROOT)
    with pytest.raises(UserError, match="cannot name files"):
        files(replace(record, run=name), PYXIS, ROOT)


# ---------------------------------------------------------------------------------------------------------- submit.sh


_SBATCH = """#!/bin/bash
# Records how it was called and answers as Slurm does; refuses the stage in $REFUSE.
printf '%s\\n' "$*" "partition=${SBATCH_PARTITION:-}" >> "$LOG"
case "${!#}" in */"$REFUSE".sbatch) echo "sbatch: error: Invalid account" >&2; exit 1;; esac
n=$(grep -c parsable "$LOG")
echo "${ANSWER:-$((100 + n));cluster}"
"""


class Login:
    """A login node: a folder with a recording sbatch, first on the PATH."""

    def __init__(self, folder: Path):
        self.log = folder / "log"
        self.bin = folder / "bin"
        self.bin.mkdir()
        (self.bin / "sbatch").write_text(_SBATCH)
        (self.bin / "sbatch").chmod(0o755)

    def submit(self, script: Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
        everything = {"PATH": f"{self.bin}:/usr/bin:/bin", "LOG": str(self.log), "REFUSE": "-", **env}
        return subprocess.run([str(script)], capture_output=True, text=True, cwd=cwd, env=everything)

    @property
    def calls(self) -> list[list[str]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line.split(" ") for line in lines if "parsable" in line]


@pytest.fixture
def login(tmp_path: Path) -> Login:
    return Login(tmp_path)


def test_submit_sends_stages_in_order_with_their_dependencies(login: Login, tmp_path: Path) -> None:
    root = tmp_path / "the $root's"
    render(tmp_path / "out", root, BARE)
    away = tmp_path / "moved"
    shutil.move(tmp_path / "out", away)
    done = login.submit(away / "submit.sh", Path("/"), SBATCH_PARTITION="nowhere")
    assert (done.returncode, done.stderr) == (0, "")
    calls = {Path(call[-1]).stem: call for call in login.calls}
    jobs = {script: str(101 + i) for i, script in enumerate(calls)}
    sweep = [s.spec.stage for s in golden_record(PYXIS).stages if s.part_of]
    ids = {**{name: job for name, job in jobs.items() if name != "sweep"}}
    ids |= {name: f"{jobs['sweep']}_{i}" for i, name in enumerate(sweep)}
    assert done.stdout.splitlines() == [f"{stage}: job {job}" for stage, job in ids.items()]
    written = [json.loads(line) for line in (root / "runs" / "golden" / "jobs.jsonl").read_text().splitlines()]
    assert {w["stage"]: w["job"] for w in written} == ids
    for stage in golden_record(PYXIS).stages:
        call = calls[stage.part_of or stage.spec.stage]
        depends = [w for w in call if w.startswith("--dependency")]
        wanted = "--dependency=afterok:" + ":".join(ids[d] for d in stage.depends)
        assert depends == ([wanted] if stage.depends else [])
        assert "--kill-on-invalid-dep=yes" in call
        assert call[-1] == str(away / f"{stage.part_of or stage.spec.stage}.sbatch")
        placed = root / "runs" / "golden" / "stages" / stage.spec.stage / "stage.json"
        assert placed.read_text() == (away / f"{stage.spec.stage}.stage.json").read_text()
        assert placed.stat().st_mode & 0o777 == 0o600
    assert "nowhere" not in login.log.read_text(), "SBATCH_PARTITION would win over the script"
    assert {s.spec.stage for s in read_run(root, "golden").stages} == set(ids)
    assert root.stat().st_mode & 0o777 == 0o700
    assert (root / "runs" / "golden" / "stages" / "sweep").is_dir(), "Slurm makes no folder for an array's logs"


def test_submit_stops_at_the_first_refusal_and_names_what_it_submitted(login: Login, tmp_path: Path) -> None:
    render(tmp_path / "out", tmp_path / "root")
    done = login.submit(tmp_path / "out" / "submit.sh", tmp_path, REFUSE="midtrain")
    assert done.returncode == 1
    assert "stage midtrain" in done.stderr and "Invalid account" in done.stderr
    assert "prepare: job 101" in done.stderr and "scancel" in done.stderr and "101" in done.stderr.split("scancel")[1]
    assert [Path(call[-1]).stem for call in login.calls][-1] == "midtrain"
    assert "evaluate" not in done.stdout


def chained(record: RunRecord, stage: str, jobs: int) -> RunRecord:
    """The same run, one stage in a chain of jobs."""
    limits = Limits(continuation="chain", chain_jobs=jobs)
    stages = (replace(s, spec=replace(s.spec, limits=limits)) if s.spec.stage == stage else s for s in record.stages)
    return replace(record, stages=tuple(stages))


def test_submit_sends_a_chain_job_after_job(login: Login, tmp_path: Path) -> None:
    record = chained(golden_record(PYXIS), "midtrain", 3)
    render_plan(record, PYXIS, tmp_path / "out", tmp_path / "root")
    done = login.submit(tmp_path / "out" / "submit.sh", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    path = tmp_path / "root" / "runs" / "golden" / "jobs.jsonl"
    written = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line for line in written if line["stage"] == "midtrain"]
    jobs = [line["job"] for line in lines]
    assert len(jobs) == 3 and {line["chain"] for line in lines} == {jobs[0]} and all(line["user"] for line in lines)
    assert f"midtrain: jobs {jobs[0]} to {jobs[2]}" in done.stdout
    after = [next((w for w in call if w.startswith("--dependency")), "") for call in login.calls]
    made = {line["stage"]: line["job"] for line in written}
    inputs = "--dependency=afterok:" + ":".join(made[d] for d in record.stage("midtrain").depends)
    reader = next(s.spec.stage for s in record.stages if "midtrain" in s.depends)
    assert any(a.endswith(f":{jobs[2]}") for a in after), f"{reader} waits for the last job"
    of_chain = [a for a, call in zip(after, login.calls, strict=True) if Path(call[-1]).stem == "midtrain"]
    assert of_chain == [inputs, f"{inputs},afterany:{jobs[0]}", f"{inputs},afterany:{jobs[1]}"]


def test_half_a_chain_is_named_when_it_is_refused(login: Login, tmp_path: Path) -> None:
    record = golden_record(PYXIS)
    first = record.stages[0].spec.stage
    render_plan(chained(record, first, 3), PYXIS, tmp_path / "out", tmp_path / "root")
    (login.bin / "sbatch").write_text(_SBATCH + '[ "$n" -lt 2 ]\n')
    done = login.submit(tmp_path / "out" / "submit.sh", tmp_path)
    assert done.returncode == 1 and "nothing has been submitted" not in done.stderr
    assert f"{first}: job 101" in done.stderr and "101" in done.stderr.split("scancel")[1]


def test_submit_stops_at_an_answer_that_is_no_job(login: Login, tmp_path: Path) -> None:
    render(tmp_path / "out", tmp_path / "root")
    done = login.submit(tmp_path / "out" / "submit.sh", tmp_path, ANSWER="welcome to the cluster")
    assert done.returncode == 1 and "no job id" in done.stderr and "nothing has been submitted" in done.stderr
    assert len(login.calls) == 1


def test_submit_without_slurm_or_without_a_root_says_so(login: Login, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    render(tmp_path / "out", tmp_path / "file" / "root")
    done = login.submit(tmp_path / "out" / "submit.sh", tmp_path)
    assert done.returncode == 1 and "cannot write under" in done.stderr and login.calls == []
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    done = login.submit(tmp_path / "out" / "submit.sh", tmp_path, PATH=str(tools))
    assert done.returncode == 1 and "no sbatch here" in done.stderr


def test_run_json_says_what_the_jobs_run(tmp_path: Path) -> None:
    render(tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    for stage in record["stages"]:
        name = stage["spec"]["stage"]
        assert stage["spec"] == json.loads((tmp_path / f"{name}.stage.json").read_text())


def accept() -> None:
    """Write the golden files anew."""
    for cluster in SLURM:
        shutil.rmtree(GOLDEN / cluster, ignore_errors=True)
        (GOLDEN / cluster).mkdir()
        for name, text in golden_texts(cluster).items():
            (GOLDEN / cluster / name).write_text(text)
    for recipe in PRISM:
        shutil.rmtree(GOLDEN / "prism" / recipe, ignore_errors=True)
        (GOLDEN / "prism" / recipe).mkdir(parents=True)
        for name, text in prism_texts(recipe).items():
            (GOLDEN / "prism" / recipe / name).write_text(text)
    print(f"{GOLDEN}: written; look at the difference before you commit it")


if __name__ == "__main__":
    sys.exit(accept())
