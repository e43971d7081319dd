"""Steps as commands: for processes of this machine, and for srun."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.errors import UserError
from launcher.spec import Runtime, StageSpec, Step, read_stage
from launcher.steps import REFERENCE, Place, SlurmAttempt, fill, local_commands, slurm_place, srun_argv

SPEC = read_stage(Path(__file__).parent / "data" / "stage.json")
STEP = Step(
    name="train",
    argv=("{python}", "-m", "w", "{stage_json}", "--to={host:server}:{port:server}", "{attempt_dir}/x", "{unknown}"),
    nodes=2,
    ntasks=16,
    gpus=8,
    cpus=7,
    env={"MINE": "{python}"},
)
PLACE = Place("/r", "/r/s/stage.json", "/r/s/9.0", "py", {"train": "h0", "server": "h1"}, {"train": "1", "server": "2"})


def test_placeholders_are_filled_and_other_braces_are_text() -> None:
    want = ("py", "-m", "w", "/r/s/stage.json", "--to=h1:2", "/r/s/9.0/x", "{unknown}")
    assert fill(STEP.argv, PLACE) == want


def test_a_port_of_no_step_is_an_error() -> None:
    with pytest.raises(KeyError, match="nobody"):
        fill(("{port:nobody}",), PLACE)


def test_local_ranks_differ_in_rank_alone() -> None:
    commands = local_commands(SPEC, STEP, PLACE, "7:8")
    assert [env["RANK"] for _, env in commands] == [str(i) for i in range(16)]
    assert len({argv for argv, _ in commands}) == 1
    for _, env in commands:
        assert (env["WORLD_SIZE"], env["OMP_NUM_THREADS"], env["MASTER_ADDR"], env["MASTER_PORT"]) == (
            "16",
            "7",
            "h0",
            "1",
        )
        assert env["PRISM_STEP"] == "train" and env["MINE"] == "{python}"


def test_every_local_rank_gets_a_container_of_its_own() -> None:
    spec = replace(SPEC, runtime=Runtime(container="docker"), secrets=("TOKEN",))
    step = replace(STEP, image="cpu:1", ntasks=2)
    commands = local_commands(spec, step, PLACE, "7:8")
    assert [env for _, env in commands] == [{}, {}]
    names = [next(w for w in argv if w.startswith("--name=")) for argv, _ in commands]
    assert len(set(names)) == 2 and names[0].endswith("-train-0")
    for rank, (argv, _) in enumerate(commands):
        assert {"--user=7:8", "--env=TOKEN", "--workdir=/r/s/9.0", f"RANK={rank}", "MINE={python}"} < set(argv)
        assert f"--label=prism-launch.artifact=/r/{spec.artifact}" in argv
        assert argv[-7:] == fill(step.argv, PLACE)


def test_srun_states_every_count() -> None:
    argv = srun_argv(STEP, PLACE, Runtime(mpi="none"))
    options = [w for w in argv if w.startswith("--") and not w.startswith("--to=")]
    assert argv[0] == "srun" and set(options) == {
        "--overlap",
        "--unbuffered",
        "--job-name=train",
        "--nodes=2",
        "--ntasks=16",
        "--ntasks-per-node=8",
        "--cpus-per-task=7",
        "--gpus-per-node=8",
        "--kill-on-bad-exit=0",
        "--output=/r/s/9.0/train.%t.log",
        "--mpi=none",
        "--distribution=block:block",
    }
    bound = srun_argv(STEP, PLACE, Runtime(distribution="cyclic:block", cpu_bind="cores"))
    assert {"--distribution=cyclic:block", "--cpu-bind=cores"} < set(bound)
    unsaid = srun_argv(STEP, PLACE, Runtime(distribution=None))
    assert not any(word.startswith(("--distribution", "--cpu-bind")) for word in unsaid)
    assert argv[-len(STEP.argv) :] == fill(STEP.argv, PLACE)
    assert "MASTER_PORT=1" in argv and not any(w.startswith(("RANK=", "WORLD_SIZE=")) for w in argv)


def test_without_gpus_none_are_asked_for_in_so_many_words() -> None:
    argv = srun_argv(
        Step(name="prepare", argv=("x",)),
        Place("/r", "/r/s", "/r/a", "p", {"prepare": "h"}, {"prepare": "1"}),
        Runtime(),
    )
    assert "--gpus-per-node=0" in argv and not any(w.startswith("--mpi") for w in argv)


def two_steps() -> StageSpec:
    return replace(SPEC, steps=(Step(name="server", argv=("x",)), Step(name="main", argv=("y",))))


def test_an_attempt_is_named_by_job_and_restart_and_its_steps_have_ports_of_their_own() -> None:
    places = [
        slurm_place(two_steps(), Path("/r"), "py", SlurmAttempt(job, restarts, "n1"))
        for job, restarts in (("41", "0"), ("41", "1"), ("42", "0"))
    ]
    assert len({p.attempt_dir for p in places}) == 3
    assert places[1].attempt_dir == "/r/runs/demo/stages/midtrain/41.1"
    ports = [p.ports[step] for p in (places[0], places[2]) for step in ("server", "main")]
    assert len(set(ports)) == 4 and places[0].ports == places[1].ports
    assert places[0].hosts == {"server": "n1", "main": "n1"}


@pytest.mark.parametrize("job", [1, 1199, 1200, 123456789, 2**31 - 1])
def test_ports_stay_below_those_that_linux_hands_out(job: int) -> None:
    assert all(20000 <= int(SlurmAttempt(str(job)).port(i)) < 32768 for i in range(10))


def test_a_step_starts_where_it_is_planned() -> None:
    steps = {
        "main": Step(name="main", argv=("x",), nodes=2, ntasks=2),
        "beside": Step(name="beside", argv=("x",), role="server"),
        "behind": Step(name="behind", argv=("x",), role="server", first_node=2),
        "part": Step(name="part", argv=("x",), role="server", het_group=1),
        "first": Step(name="first", argv=("x",), het_group=0),
    }
    place = Place("/r", "/r/s", "/r/a", "p", dict.fromkeys(steps, "n7"), dict.fromkeys(steps, "1"))
    where = ("--relative", "--nodelist", "--het-group")
    got = {n: [w for w in srun_argv(s, place, Runtime()) if w.startswith(where)] for n, s in steps.items()}
    assert got == {
        "main": [],
        "beside": ["--nodelist=n7"],
        "behind": ["--relative=2"],
        "part": ["--het-group=1"],
        "first": ["--het-group=0"],
    }


def scattered() -> StageSpec:
    """Steps on the job's first node, on its third, and on the first of another part of a heterogeneous job."""
    steps = (
        Step(name="here", argv=("{host:third}",)),
        Step(name="third", argv=("{host:part}",), first_node=2),
        Step(name="part", argv=("{host:here}",), het_group=2),
    )
    return replace(SPEC, steps=steps)


def test_hosts_of_an_attempt_are_its_own_and_others_are_references_that_bash_resolves(tmp_path: Path) -> None:
    known = SlurmAttempt("4", "0", "n1", hosts={"third": "n3", "part": "m1"})
    assert slurm_place(scattered(), tmp_path, "py", known).hosts == {"here": "n1", "third": "n3", "part": "m1"}
    (tmp_path / "scontrol").write_text('#!/bin/sh\n[ "$1 $2" = "show hostnames" ] && printf "%s\\n" $3\n')
    (tmp_path / "scontrol").chmod(0o755)
    lists = {"SLURM_JOB_NODELIST": "n1 n2 n3", "SLURM_JOB_NODELIST_HET_GROUP_2": "m1 m2", "SLURMD_NODENAME": "n1"}
    env = {**os.environ, **lists, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for step, host in slurm_place(scattered(), tmp_path, "py").hosts.items():
        done = subprocess.run(["bash", "-c", f"echo {host}"], capture_output=True, text=True, env=env)
        assert done.stdout.strip() == {"here": "n1", "third": "n3", "part": "m1"}[step]


def test_ports_of_a_stage_are_folders_and_progress_is_kept() -> None:
    place = slurm_place(SPEC, Path("/r"), "py")
    argv = ("{input:checkpoint}/x", "{output:checkpoint}", "{progress}/y", "--seed={seed}")
    assert fill(argv, place) == (
        f"/r/{SPEC.inputs['checkpoint'].path}/x",
        f"/r/{SPEC.artifact}.partial/checkpoint",
        f"/r/{SPEC.artifact}.partial/progress/y",
        f"--seed={SPEC.seed}",
    )


@pytest.mark.parametrize("root", ["/a$b", '/a"b', "/a\\b"])
def test_a_path_that_another_programs_quotes_cannot_hold_is_refused(root: str) -> None:
    place = slurm_place(SPEC, Path(root), "py")
    assert fill(("{progress}",), place)
    with pytest.raises(UserError, match="cannot be quoted in model.path"):
        fill(('model.path="{progress}/y"',), place)


def test_references_are_all_known_as_such() -> None:
    for spec in (two_steps(), scattered()):
        all_are_known(spec)


def all_are_known(spec: StageSpec) -> None:
    place = slurm_place(spec, Path("/r"), "py")
    late = [place.attempt_dir, *place.hosts.values(), *place.ports.values()]
    assert not any("$" in REFERENCE.sub("", text) for text in late)
    assert all(REFERENCE.search(text) for text in late)


@pytest.mark.parametrize(
    ("environment", "want"),
    [
        ({}, "0 1 None"),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1"}, "5 16 1"),
        ({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "9"}, "2 4 2"),
    ],
)
def test_a_worker_takes_its_rank_from_srun_where_nobody_else_says(
    environment: dict[str, str], want: str, tmp_path: Path
) -> None:
    program = (
        "import os; from launcher.progress import run_worker\n"
        "run_worker(lambda job: print(job.rank, job.world_size, os.environ.get('LOCAL_RANK')))"
    )
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    base = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith("SLURM")}
    env = {**base, "PRISM_ROOT": str(tmp_path), "PRISM_ATTEMPT_DIR": str(tmp_path), **environment}
    stage = str(Path(__file__).parent / "data" / "stage.json")
    done = subprocess.run([sys.executable, "-c", program, stage], capture_output=True, text=True, env=env)
    assert (done.stdout.strip(), done.returncode) == (want, 0), done.stderr
