"""Cluster profiles: strict reading with every problem and its line, what a site can never run, placing of stages."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from launcher import cluster
from launcher.cluster import Profile, check_resources, list_profiles, load_profile, place_stage
from launcher.configs import Resources
from launcher.errors import UserError
from launcher.run_record import PlannedStage
from launcher.spec import Input, Limits, Preflight, SpecError, StageSpec, read_stage

SPEC = read_stage(Path(__file__).parent / "data" / "stage.json")
PYXIS = load_profile("example-pyxis")
SHIPPED = ["example-apptainer", "example-pyxis", "local", "local-apptainer", "local-docker"]
SMALLEST = "scheduler: slurm\n"


def load(folder: Path, text: str) -> Profile:
    (folder / "site.yaml").write_text(text)
    return load_profile(str(folder / "site.yaml"))


def problems(folder: Path, text: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(folder, text)
    return [p.partition("site.yaml")[2].lstrip(":") for p in caught.value.problems]


# ----------------------------------------------------------------------------------------------------------- reading


def test_the_shipped_profiles_are_read_and_say_what_they_are() -> None:
    profiles = {p.name: p for p in list_profiles()}
    assert list(profiles) == SHIPPED
    assert all(p.description for p in profiles.values())
    assert profiles["local"].scheduler == "local" and profiles["local"].slots == 2
    for name in ("pyxis", "apptainer"):
        assert profiles[f"example-{name}"].runtime.container == name


def test_profiles_of_the_users_own_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    own = tmp_path / "prism-launch" / "clusters"
    own.mkdir(parents=True)
    for name, slots in (("desk", 3), ("local", 5)):
        (own / f"{name}.yaml").write_text(f"scheduler: local\nslots: {slots}\n")
    (own / "gone.yaml").symlink_to(tmp_path / "nowhere")
    assert [p.name for p in list_profiles()] == [*SHIPPED, "desk"]
    assert load_profile("desk").slots == 3 and load_profile("local").slots == 5
    with pytest.raises(UserError, match="did you mean desk"):
        load_profile("dsek")


def test_every_key_is_documented() -> None:
    assert [f.name for f in fields(Profile) if not f.metadata.get("doc")] == []


def test_a_file_of_the_users_own_is_called_as_its_file(tmp_path: Path) -> None:
    profile = load(tmp_path, SMALLEST)
    assert (profile.name, profile.time, profile.runtime.container) == ("site", "1:00:00", "none")


def test_all_problems_at_once_each_with_its_line(tmp_path: Path) -> None:
    text = SMALLEST + "partitoin: gpu\nlimits:\n  save_s: soon\n  hang: 3\nmounts: [/a, 5]\nslots: on\n"
    assert sorted(problems(tmp_path, text)) == [
        "2: partitoin: unknown key, did you mean partition?",
        '4: limits.save_s: expected a number, got "soon"',
        "5: limits.hang: unknown key, did you mean hang_s?",
        '6: mounts[1]: expected a string, got 5; put it in quotes: "5"',
        '7: slots: expected a whole number, got "on"',
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("time: soon", "2: time: 'soon' is no time limit"),
        ("mem: lots", "2: mem: 'lots' is no amount of memory"),
        (
            "images: {trian: /a.sqsh}\nruntime: {container: pyxis}",
            "2: images.trian: no such kind of stage, did you mean train?",
        ),
        ("images: {train: /a.sqsh}", "2: images.train: image /a.sqsh can not be used"),
        ("env: {'A B': x}", "2: env: 'A B' is no name of a variable"),
        ("env: {A: 1}", '2: env.A: expected a string, got 1; put it in quotes: "1"'),
        ("env: {SLURM_HINT: compute_bound}", "2: env.SLURM_HINT: srun would take it for every step"),
        ("runtime: {distribution: 'block block'}", "2: runtime.distribution: 'block block' is no value of srun's"),
        ("partitions: {gpu: {}}\npartition: gpu,gpus", "3: partition: gpus is not under partitions"),
        ("runtime: {env_unset: [a-b]}", "2: runtime.env_unset: 'a-b' is no name of a variable"),
        ("runtime: {container: docker}", "2: runtime.container: docker's containers are no children of the job"),
        ("runtime: {container: podman}", "2: runtime.container: podman's containers are no children of the job"),
        ("limits: {continuation: chain, chain_jobs: 3}\nmax_submit: 2", "2: limits.chain_jobs: 3 jobs a stage"),
        ("mounts: ['/a b']\nruntime: {container: pyxis}", "2: mounts[0]: mount '/a b': pyxis cannot quote blanks"),
        ("code: src", "2: code: src: give the full path"),
        ("slurm_conf: slurm.conf", "2: slurm_conf: slurm.conf: give the full path"),
        ("submit_rate: 0", "2: submit_rate: must be at least 1, got 0"),
        ("max_submit: -5", "2: max_submit: must be at least 1, got -5"),
        ("max_array: 0", "2: max_array: must be at least 1, got 0"),
        ("max_array_running: 0", "2: max_array_running: must be at least 1, got 0"),
        ("setup: ['#SBATCH --nice']", "2: setup[0]: sbatch options go under sbatch:"),
        ("sbatch: {partition: gpu}", "2: sbatch.partition: is set by the key of that name"),
        ("sbatch: {job_name: x}", "2: sbatch.job_name: is set by the run and the store"),
        ("sbatch: {signal: USR1@9}", "2: sbatch.signal: is set by limits"),
        ("sbatch: {'nice=1 #': 3}", "2: sbatch.nice=1 #: is no long option"),
        ("sbatch: {contiguous: false}", "2: sbatch.contiguous: leave the line out"),
        ("partitions: {gpu: {max_time: ever}}", "2: partitions.gpu.max_time: 'ever' is no time limit"),
        ("partitions: {gpu: {}}\npartition: gpus", "3: partition: gpus is not under partitions, did you mean gpu?"),
        ("name: other", "2: name: remove it"),
        ("scheduler: pbs", "2: scheduler: given twice"),
    ],
)
def test_what_a_slurm_profile_cannot_say(tmp_path: Path, line: str, message: str) -> None:
    (problem,) = problems(tmp_path, f"{SMALLEST}{line}\n")
    assert message in problem


@pytest.mark.parametrize(
    "line",
    [
        "partition: gpu",
        "account: me",
        "env: {A: x}",
        "images: {train: /a.sqsh}",
        "python: py",
        "max_submit: 5",
        "submit_rate: 5",
        "share_group: team",
        "slurm_conf: /etc/slurm.conf",
    ],
)
def test_keys_without_effect_on_this_machine_are_refused(tmp_path: Path, line: str) -> None:
    (problem,) = problems(tmp_path, f"scheduler: local\n{line}\n")
    assert problem.startswith(f"2: {line.partition(':')[0]}: has no effect")


def test_containers_on_this_machine(tmp_path: Path) -> None:
    text = (
        "scheduler: local\nruntime: {container: %s}\nimages: {train: %s}\nenv: {A: x}\nmounts: ['/a b']\npython: py\n"
    )
    profile = load(tmp_path, text % ("docker", "cpu:1"))
    assert profile.images == {"train": "cpu:1"} and profile.python == "py"
    (problem,) = problems(tmp_path, text % ("docker", "/a.sif"))
    assert problem.startswith("3: images.train: image /a.sif: docker takes NAME:TAG")
    (problem,) = problems(tmp_path, "scheduler: local\nruntime: {container: pyxis}\n")
    assert "pyxis is a plug-in of Slurm" in problem


def test_a_stage_placed_in_a_container_of_this_machine_gets_this_package(tmp_path: Path) -> None:
    text = "scheduler: local\nruntime: {container: docker}\nimages: {train: cpu:1}\nmounts: ['/data:/data:ro']\n"
    step = placed(load(tmp_path, text)).steps[0]
    package = str(Path(cluster.__file__).parent)
    assert step.image == "cpu:1" and step.env["PYTHONPATH"] == "/opt/prism-launch"
    assert f"{package}:/opt/prism-launch/launcher:ro" in step.mounts and "/data:/data:ro" in step.mounts
    assert step.argv[0] == "python3" and "/scratch/prism" in step.mounts


def test_a_container_of_this_machine_needs_an_image(tmp_path: Path) -> None:
    profile = load(tmp_path, "scheduler: local\nruntime: {container: docker}\n")
    found = list(check_resources(Resources(), SPEC, profile))
    assert found == [("image", "no container image; set images.train in the profile of cluster site, or image here")]
    assert list(check_resources(Resources(image="cpu:1"), SPEC, profile)) == []


@pytest.mark.parametrize("name", ["example-pixys", "nowhere", "no/such.yaml", "no-such.yaml", "."])
def test_a_profile_that_is_not_there(name: str) -> None:
    with pytest.raises(UserError) as caught:
        load_profile(name)
    message = str(caught.value)
    assert name in message
    if "/" not in name and "." not in name:
        assert "example-apptainer, example-pyxis, local" in message
    assert ("did you mean example-pyxis?" in message) == (name == "example-pixys")


def test_the_signal_comes_when_there_is_still_time_to_save(tmp_path: Path) -> None:
    assert load(tmp_path, SMALLEST + "limits: {save_s: 300}\n").signal_lead_s == 330
    assert load(tmp_path, SMALLEST + "limits: {save_s: 0.5}\n").signal_lead_s == 31


# ----------------------------------------------------------------------------------------------------------- checking


def found(profile: Profile = PYXIS, spec: StageSpec = SPEC, **asked: Any) -> dict[str, str]:
    return dict(check_resources(Resources(**asked), spec, profile))


def test_what_fits_has_no_problem() -> None:
    assert found() == {}
    assert found(nodes=16, gpus_per_node=8, ntasks_per_node=8, cpus_per_task=16, time="1-00:00:00", mem="200G") == {}


@pytest.mark.parametrize(
    ("asked", "key", "message"),
    [
        (
            {"nodes": 17, "gpus_per_node": 8},
            "nodes",
            "asks for 17 nodes, but partition gpu of cluster example-pyxis has 16",
        ),
        ({"gpus_per_node": 9}, "gpus_per_node", "9 GPUs a node, but partition gpu"),
        ({"nodes": 2}, "nodes", "partition cpu of cluster example-pyxis has 1"),
        ({"gpus_per_node": 1, "partition": "cpu"}, "gpus_per_node", "partition cpu of cluster example-pyxis has 0"),
        ({"gpus_per_node": 8, "ntasks_per_node": 8, "cpus_per_task": 17}, "cpus_per_task", "136 cores a node"),
        ({"gpus_per_node": 8, "time": "1-00:00:01"}, "time", "beyond the 1-00:00:00 of partition gpu"),
        ({"time": "7:00"}, "time", "too short to save before it ends; ask for at least 7 min 30 s"),
        ({"time": "later"}, "time", "no time limit"),
        ({"mem": "many"}, "mem", "no amount of memory"),
        (
            {"partition": "gpus"},
            "partition",
            "no partition gpus, did you mean gpu?; cluster example-pyxis has gpu, cpu",
        ),
        ({"image": "mine.sqsh"}, "image", "full path"),
    ],
)
def test_what_a_cluster_can_never_run(asked: dict[str, Any], key: str, message: str) -> None:
    problems = found(**asked)
    assert list(problems) == [key] and message in problems[key]


def test_no_partition_where_one_must_be_named() -> None:
    problems = found(replace(PYXIS, partition=None, cpu_partition=None))
    assert problems == {"partition": "names no partition; cluster example-pyxis has gpu, cpu"}
    assert found(replace(PYXIS, partition=None, cpu_partition=None, partitions={})) == {}, "some sites want none named"


def test_a_stage_without_image_is_told_where_to_name_one() -> None:
    problems = found(replace(PYXIS, images={}))
    assert "set images.train in the profile of cluster example-pyxis" in problems["image"]
    assert found(replace(PYXIS, images={}), image="/mine.sqsh") == {}


def test_all_problems_of_a_stage_at_once() -> None:
    assert set(found(nodes=99, gpus_per_node=99, time="9-0", mem="?")) == {"nodes", "gpus_per_node", "time", "mem"}


def test_this_machine_is_one_node_and_takes_the_rest_as_it_comes() -> None:
    local = load_profile("local")
    assert "nodes" in found(local, nodes=2)
    assert found(local, partition="gpu", time="1", image="/a.sqsh", gpus_per_node=8) == {}


# ------------------------------------------------------------------------------------------------------------ placing


def placed(profile: Profile, spec: StageSpec = SPEC, **asked: Any) -> StageSpec:
    return place_stage(PlannedStage(spec, (), Resources(**asked)), profile, Path("/scratch/prism")).spec


def test_placing_changes_the_steps_and_nothing_else() -> None:
    spec = placed(replace(PYXIS, python="/opt/py", env={"A": "1", "B": "2"}, code="/code"))
    assert replace(spec, steps=SPEC.steps) == SPEC
    (step,) = spec.steps
    assert step.argv == ("/opt/py", "-m", "launcher.workers.train", "{stage_json}")
    assert step.env == {"A": "1", "B": "2", "PYTHONPATH": "/code"}
    assert step.image == "/scratch/images/prism-train.sqsh"


def test_a_stage_of_its_own_mind_keeps_image_and_variables() -> None:
    step = replace(SPEC.steps[0], image="/mine.sqsh", env={"A": "mine"})
    (got,) = placed(replace(PYXIS, env={"A": "1"}), replace(SPEC, steps=(step,))).steps
    assert (got.image, got.env) == ("/mine.sqsh", {"A": "mine"})


def test_containers_see_the_root_the_code_and_what_is_read_outside() -> None:
    outside = {"checkpoint": Input("/data/models/m", "megatron", "f"), "tokens": Input("artifacts/x", "tokens", "f")}
    profile = replace(PYXIS, code="/code", mounts=("/tmp",))
    (step,) = placed(profile, replace(SPEC, inputs=outside)).steps
    assert step.mounts == ("/code:/code:ro", "/data/models/m:/data/models/m:ro", "/scratch/prism", "/tmp")
    sources = {"a": {"kind": "files", "path": "/text"}, "b": {"kind": "python-stdlib"}}
    config = {"sources": sources, "tokenizer": {"path": "hf:org/name"}}
    (step,) = placed(profile, replace(SPEC, kind="prepare", config=config, inputs={})).steps
    assert step.mounts == ("/code:/code:ro", "/scratch/prism", "/text:/text:ro", "/tmp")


def test_without_containers_nothing_is_mounted() -> None:
    bare = Profile(name="bare", scheduler="slurm", code="/code")
    (step,) = placed(bare).steps
    assert (step.image, step.mounts) == (None, ())


def test_a_snapshot_wins_over_the_profiles_code() -> None:
    (step,) = placed(replace(PYXIS, code="/code"), replace(SPEC, snapshot="snapshots/1")).steps
    assert step.env["PYTHONPATH"] == "/scratch/prism/snapshots/1"


@pytest.mark.parametrize(
    ("resources", "looked_at"),
    [
        (Resources(), False),
        (Resources(nodes=2), True),
        (Resources(gpus_per_node=1), True),
    ],
)
def test_nodes_are_looked_at_for_gpus_or_several_of_them(resources: Resources, looked_at: bool) -> None:
    spec = read_stage(Path(__file__).parent / "data" / "stage.json")
    stage = PlannedStage(replace(spec, steps=(replace(spec.steps[0], nodes=resources.nodes),)), (), resources)
    profile = Profile(name="x", scheduler="slurm")
    assert place_stage(stage, profile, Path("/root")).spec.preflight == (Preflight() if looked_at else None)
    assert place_stage(stage, replace(profile, preflight=None), Path("/root")).spec.preflight is None
    assert place_stage(stage, Profile(name="x", scheduler="local"), Path("/root")).spec.preflight is None


def test_limits_that_make_no_sense_are_refused() -> None:
    with pytest.raises(SpecError) as refused:
        Limits(chain_jobs=0, max_excluded=-1, max_no_progress=-1)
    assert [key for key, _ in refused.value.problems] == ["max_no_progress", "chain_jobs", "max_excluded"]
