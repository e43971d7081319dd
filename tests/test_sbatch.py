"""The script of a stage: what stands in its header, what bash makes of it, and that its steps are those that run."""

from __future__ import annotations

import os
import pwd
import shlex
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from launcher.cluster import Profile, place_stage
from launcher.configs import Component, Resources
from launcher.errors import UserError
from launcher.run_record import PlannedStage
from launcher.sbatch import sbatch_text
from launcher.spec import AllReduce, Limits, Preflight, Runtime, SpecError, Step, read_stage
from launcher.steps import SlurmAttempt, preflight_argv, preflight_place, preflight_steps, slurm_place, srun_argv

SPEC = read_stage(Path(__file__).parent / "data" / "stage.json")
PROFILE = Profile(name="site", scheduler="slurm", partition="gpu", account="me")
IMAGES = {"none": {}, "pyxis": {"train": "/i.sqsh"}, "apptainer": {"train": "/i.sif"}, "charliecloud": {"train": "/i"}}
ROOT = Path("/scratch/prism")
HOSTILE = (
    "a b",
    "it's",
    '"q"',
    "$(touch hacked)",
    "`touch hacked`",
    "$HOME",
    ";touch hacked;",
    "a&b|c>d",
    "#x",
    "-n",
    "é",
)
ATTEMPT = SlurmAttempt("4711", "2", "node7")


def planned(profile: Profile = PROFILE, root: Path = ROOT, **resources: Any) -> PlannedStage:
    """The train stage of tests/data/stage.json, placed on a cluster."""
    asked = Resources(**resources)
    ntasks = asked.nodes * asked.ntasks_per_node
    step = replace(SPEC.steps[0], nodes=asked.nodes, ntasks=ntasks, gpus=asked.gpus_per_node, cpus=asked.cpus_per_task)
    spec = replace(SPEC, runtime=profile.runtime, limits=profile.limits, steps=(step,))
    return place_stage(PlannedStage(spec, (), asked), profile, root)


def text(profile: Profile = PROFILE, root: Path = ROOT, **resources: Any) -> str:
    return sbatch_text(planned(profile, root, **resources), profile, root)


def header(script: str) -> dict[str, str]:
    """The options as sbatch reads them: up to the first command, quotes as in a shell."""
    options = {}
    for line in script.split("\n"):
        if line and not line.startswith("#"):
            break
        if line.startswith("#SBATCH "):
            (word,) = shlex.split(line[len("#SBATCH ") :])
            name, _, value = word.removeprefix("--").partition("=")
            options[name] = value
    return options


# ------------------------------------------------------------------------------------------------------------ header


def test_the_header_says_what_the_supervisor_needs_of_slurm() -> None:
    options = header(text(replace(PROFILE, limits=Limits(save_s=300.5))))
    assert options["signal"] == "B:USR2@331", "B: the batch script alone, when there is still time to save"
    assert options["requeue"] == "" and options["open-mode"] == "append" and options["kill-on-invalid-dep"] == "yes"
    stage = planned(PROFILE, ROOT)
    chained = replace(stage, spec=replace(stage.spec, limits=Limits(continuation="chain")))
    chain = header(sbatch_text(chained, PROFILE, ROOT))
    assert chain["no-requeue"] == "" and "requeue" not in chain
    assert options["output"] == "/scratch/prism/runs/demo/stages/midtrain/%j_0_log.out"
    assert options["job-name"] == "demo.midtrain"
    assert "wckey" not in options and "error" not in options


def test_resources_win_over_the_profile() -> None:
    profile = replace(PROFILE, cpu_partition="cpu", mem="8G", time="30:00", qos="normal", constraint="big&fast")
    options = header(text(profile))
    assert (options["partition"], options["mem"], options["time"]) == ("cpu", "8G", "00:30:00")
    assert (options["account"], options["qos"], options["constraint"]) == ("me", "normal", "big&fast")
    mine = {"partition": "debug", "mem": "9G", "time": "1-12", "qos": "high", "account": "you", "gpus_per_node": 4}
    options = header(text(profile, nodes=2, ntasks_per_node=4, cpus_per_task=3, **mine))
    assert (options["partition"], options["mem"], options["time"]) == ("debug", "9G", "1-12:00:00")
    assert (options["account"], options["qos"], options["gpus-per-node"]) == ("you", "high", "4")
    assert (options["nodes"], options["ntasks-per-node"], options["cpus-per-task"]) == ("2", "4", "3")


@pytest.mark.parametrize(
    ("change", "want"),
    [
        ({}, {"gpus-per-node": "8"}),
        ({"gpu_type": "h100"}, {"gpus-per-node": "h100:8"}),
        ({"gpu_request": "gres"}, {"gres": "gpu:8"}),
        ({"gpu_request": "gres", "gpu_type": "h100"}, {"gres": "gpu:h100:8"}),
    ],
)
def test_gpus_are_asked_for_as_the_site_wants(change: dict[str, Any], want: dict[str, str]) -> None:
    profile = replace(PROFILE, **change)
    with_gpus = header(text(profile, gpus_per_node=8))
    assert {k: v for k, v in with_gpus.items() if "gpu" in k or k == "gres"} == want
    assert not any("gpu" in k or k == "gres" for k in header(text(profile)))


def test_further_options_and_whole_nodes() -> None:
    options = header(
        text(replace(PROFILE, sbatch={"nice": 10, "mail_type": "FAIL", "contiguous": True}, exclusive=True))
    )
    assert (options["nice"], options["mail-type"], options["contiguous"], options["exclusive"]) == (
        "10",
        "FAIL",
        "",
        "",
    )
    assert "exclusive" not in header(text())


@pytest.mark.parametrize("value", HOSTILE)
def test_values_reach_sbatch_as_they_are(value: str) -> None:
    profile = replace(PROFILE, partition=value, sbatch={"comment": value})
    options = header(text(profile, Path("/scratch") / value, account=value, qos=value))
    assert {options[k] for k in ("partition", "comment", "account", "qos")} == {value}
    assert options["output"].startswith(f"/scratch/{value}/runs/")


@pytest.mark.parametrize("value", ["a\nb", "a\n#SBATCH --uid=0", "x'\ntouch hacked #", "a\\b", "a\rb", "\0"])
def test_what_a_directive_cannot_hold_is_refused(value: str) -> None:
    for change in ({"partition": value}, {"constraint": value}, {"sbatch": {"comment": value}}):
        with pytest.raises(UserError, match="cannot stand in an sbatch script"):
            text(replace(PROFILE, **change))
    with pytest.raises(UserError, match="cannot stand in an sbatch script"):
        text(root=Path("/scratch") / value.replace("\0", "\1"))


def test_a_percent_sign_in_a_path_is_refused() -> None:
    with pytest.raises(UserError, match="%"):
        text(root=Path("/scratch/%u"))


# -------------------------------------------------------------------------------------------------------- what it runs

_RECORDER = '#!/bin/bash\nprintf "%s\\0" "$PWD" "$#" "$@" > "$RECORD"\nenv -0 >> "$RECORD"\n'
_WORDS = st.one_of(
    st.sampled_from(HOSTILE),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12),
)


def execute(script: str, folder: Path, **environment: str) -> tuple[str, list[str], dict[str, str]]:
    """Run a script whose interpreter is `recorder`: its working directory, arguments and environment."""
    tools = folder / "tools"
    tools.mkdir()
    (tools / "recorder").write_text(_RECORDER)
    (tools / "recorder").chmod(0o755)
    record = folder / "record"
    env = {"PATH": f"{tools}:/usr/bin:/bin", "RECORD": str(record), "LC_ALL": "C.UTF-8", **environment}
    done = subprocess.run(["bash"], input=script.encode(), capture_output=True, cwd=folder, env=env, timeout=60)
    assert (done.returncode, done.stderr) == (0, b""), done.stderr.decode()
    cwd, count, *rest = record.read_bytes().decode().split("\0")
    pairs = (entry.partition("=") for entry in rest[int(count) : -1])
    return cwd, rest[: int(count)], {name: value for name, _, value in pairs}


def commented(script: str) -> str:
    """The steps' commands in a script's comments, as shell."""
    lines = script.split("# The supervisor starts on the first node and runs:\n")[1].split("\n\n")[0].split("\n")
    assert all(line.startswith("#") for line in lines)
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines)


def words_of(shell: str, folder: Path) -> list[str]:
    """What srun would get as its arguments, were the text run in the attempt ATTEMPT."""
    stub = 'srun() { printf "%s\\0" "$@"; }\nscontrol() { printf "%s\\n" $3; }\n'
    lists = {"SLURM_JOB_NODELIST": "n1 n2 n3", "SLURM_JOB_NODELIST_HET_GROUP_1": "m1 m2"}
    late = {
        **lists,
        "SLURM_JOB_ID": ATTEMPT.job,
        "SLURM_RESTART_COUNT": ATTEMPT.restarts,
        "SLURMD_NODENAME": ATTEMPT.node,
    }
    env = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", **late}
    done = subprocess.run(["bash"], input=(stub + shell).encode(), capture_output=True, cwd=folder, env=env, timeout=60)
    assert (done.returncode, done.stderr) == (0, b""), done.stderr.decode()
    return done.stdout.decode().split("\0")[:-1]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(values=st.dictionaries(st.sampled_from(["A", "B_2", "C"]), _WORDS), part=_WORDS)
@example(
    values={"A": "$(touch hacked)\n#SBATCH --uid=0\ntouch hacked", "B_2": "$SLURM_JOB_ID"}, part="it's $(touch hacked)"
)
@example(values={"A": "x'\n\ttouch hacked\n'", "B_2": "=", "C": ""}, part="${SLURM_RESTART_COUNT:-0}a")
def test_whatever_values_hold_nothing_of_them_is_run_and_all_arrives(values: Mapping[str, str], part: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(os.path.realpath(name))
        root = folder / "root" / part.replace("/", "_").replace("%", "_").strip(".")
        profile = replace(PROFILE, env=values, host_python="recorder", python="py 3", code="/the code")
        stage = planned(profile, root)
        try:
            script = sbatch_text(stage, profile, root)
        except UserError:
            assert any(ord(c) < 32 or c in "\x7f\\" for c in part) or "${SLURM" in part
            return
        here = root / "runs" / "demo" / "stages" / "midtrain"
        here.mkdir(parents=True)
        cwd, argv, env = execute(script, folder, SLURM_NTASKS="9", PYTHONPATH="/old")
        assert (cwd, argv) == (str(here), ["-u", "-m", "launcher.supervisor", str(here / "stage.json")])
        assert {k: env[k] for k in values} == dict(values)
        assert (env["PRISM_ROOT"], env["PYTHONPATH"]) == (str(root), "/the code") and "SLURM_NTASKS" not in env
        place = slurm_place(stage.spec, root, "py 3", ATTEMPT)
        assert words_of(commented(script), folder) == list(
            srun_argv(stage.spec.steps[0], place, stage.spec.runtime)[1:]
        )
        assert sorted(p.name for p in folder.iterdir()) == ["record", "root", "tools"]
        assert not [p for p in here.iterdir()], "a value was run"


def test_the_supervisor_replaces_bash_so_that_it_gets_the_signal() -> None:
    last = [line for line in text().split("\n") if line][-1]
    assert last == "exec python3 -u -m launcher.supervisor /scratch/prism/runs/demo/stages/midtrain/stage.json"


def test_a_missing_stage_folder_ends_the_job_before_anything_runs(tmp_path: Path) -> None:
    script = text(replace(PROFILE, host_python="touch hacked"), tmp_path / "root")
    done = subprocess.run(["bash"], input=script, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "No such file" in done.stderr and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("container", "leaks"),
    [
        ("none", {"MINE"}),
        ("pyxis", {"PYXIS_CONTAINER_MOUNTS", "PYTHONPATH", "MINE"}),
        (
            "apptainer",
            {"APPTAINER_BIND", "APPTAINER_BINDPATH", "APPTAINERENV_X", "SINGULARITYENV_Y", "PYTHONHOME", "MINE"},
        ),
        ("charliecloud", {"PYTHONPATH", "PYTHONHOME", "MINE"}),
    ],
)
def test_what_a_shell_would_carry_in_unseen_is_removed(container: str, leaks: set[str], tmp_path: Path) -> None:
    runtime = Runtime(container=container, env_unset=("MINE",))  # type: ignore[arg-type]
    image = IMAGES[container]
    profile = replace(PROFILE, runtime=runtime, images=image, host_python="recorder")
    (tmp_path / "root" / "runs" / "demo" / "stages" / "midtrain").mkdir(parents=True)
    _, _, env = execute(text(profile, tmp_path / "root"), tmp_path, **dict.fromkeys(leaks | {"KEPT"}, "x"))
    assert "KEPT" in env and not leaks & set(env)


def test_lines_of_the_profile_run_first_and_its_variables_win(tmp_path: Path) -> None:
    profile = replace(PROFILE, setup=("export A=module B=module",), env={"A": "mine"}, host_python="recorder")
    (tmp_path / "root" / "runs" / "demo" / "stages" / "midtrain").mkdir(parents=True)
    _, _, env = execute(text(profile, tmp_path / "root"), tmp_path)
    assert (env["A"], env["B"]) == ("mine", "module")


def test_a_nul_in_a_variable_never_gets_into_a_profile() -> None:
    with pytest.raises(SpecError, match="NUL"):
        replace(PROFILE, env={"A": "x\0"})


@pytest.mark.parametrize(("name", "expected"), [("me", "me"), ("", pwd.getpwuid(os.getuid()).pw_name)])
def test_charliecloud_gets_the_users_name_where_the_shell_has_none(name: str, expected: str, tmp_path: Path) -> None:
    runtime = Runtime(container="charliecloud")
    profile = replace(PROFILE, runtime=runtime, images=IMAGES["charliecloud"], host_python="recorder")
    (tmp_path / "root" / "runs" / "demo" / "stages" / "midtrain").mkdir(parents=True)
    _, _, env = execute(text(profile, tmp_path / "root"), tmp_path, USER=name)
    assert env["USER"] == expected


@pytest.mark.parametrize("container", IMAGES)
def test_every_step_is_shown_as_it_runs(container: str, tmp_path: Path) -> None:
    image = IMAGES[container]
    runtime = Runtime(container=container, mpi="none")  # type: ignore[arg-type]
    preflight = Preflight(all_reduce=AllReduce(300.0))
    profile = replace(PROFILE, runtime=runtime, images=image, preflight=preflight, host_python="/usr/bin/python3.11")
    stage = planned(profile, nodes=2, ntasks_per_node=8, gpus_per_node=8)
    server = replace(
        stage.spec.steps[0], name="server", role="server", ntasks=1, nodes=1, argv=("serve", "{port:train}")
    )
    stage = replace(stage, spec=replace(stage.spec, steps=(server, *stage.spec.steps)))
    shown = commented(sbatch_text(stage, profile, ROOT))
    place = slurm_place(stage.spec, ROOT, profile.python, ATTEMPT)
    there = preflight_place(place, ATTEMPT.node, ATTEMPT)
    look = [preflight_argv(s, there, runtime) for s in preflight_steps(stage.spec, 2, "/usr/bin/python3.11")]
    run = [word for argv in (*look, *(srun_argv(s, place, runtime) for s in stage.spec.steps)) for word in argv[1:]]
    assert words_of(shown, tmp_path) == run and len(run) > 60
    # The nodes are looked at from outside the image, the network between them from inside.
    names = ("preflight", "cuda", "all-reduce")
    shown_image = [any(word.endswith(tuple(image.values())) for word in argv) for argv in look]
    assert [step[step.index("PRISM_STEP=" + name)] for step, name in zip(look, names, strict=True)]
    assert shown_image == [False, container != "none", container != "none"]
    assert max(map(len, shown.split("\n"))) < 200 and shown.count("srun \\") == 5


# -------------------------------------------------------------------------------------------------------- components


def with_server(placement: Literal["shared", "heterogeneous"], profile: Profile = PROFILE, **own: Any) -> PlannedStage:
    """The train stage on two nodes of four GPUs, with a server beside it that the main program knows by address."""
    component = Component(**own)
    asked = Resources(
        nodes=2, gpus_per_node=4, ntasks_per_node=4, components={"server": component}, placement=placement
    )
    apart = placement == "heterogeneous"
    main = replace(SPEC.steps[0], nodes=2, ntasks=8, gpus=4, het_group=0 if apart else None)
    main = replace(main, argv=(*main.argv, "--to={host:server}:{port:server}", "it's {host:server}"))
    server = Step(
        name="server",
        role="server",
        argv=("x", "{port:server}"),
        nodes=max(1, component.nodes),
        first_node=2 if component.nodes and not apart else 0,
        het_group=1 if apart else None,
    )
    stage = PlannedStage(replace(SPEC, steps=(server, main)), (), asked)
    return place_stage(stage, profile, ROOT)


@pytest.mark.parametrize(
    ("placement", "own", "host", "nodes"),
    [("shared", {}, "node7", 2), ("shared", {"nodes": 1}, "n3", 3), ("heterogeneous", {"nodes": 2}, "m1", 2)],
)
def test_steps_of_components_are_shown_as_they_run(
    placement: Literal["shared", "heterogeneous"], own: dict[str, Any], host: str, nodes: int, tmp_path: Path
) -> None:
    stage = with_server(placement, **own)
    shown = words_of(commented(sbatch_text(stage, PROFILE, ROOT)), tmp_path)
    attempt = replace(ATTEMPT, hosts={} if host == ATTEMPT.node else {"server": host})
    place = slurm_place(stage.spec, ROOT, PROFILE.python, attempt)
    look, cuda = preflight_steps(stage.spec, nodes, PROFILE.python)
    there = preflight_place(place, ATTEMPT.node, ATTEMPT)
    looking = (preflight_argv(step, there, stage.spec.runtime) for step in (look, cuda))
    steps = (srun_argv(step, place, stage.spec.runtime) for step in stage.spec.steps)
    assert shown == [w for argv in (*looking, *steps) for w in argv[1:]]
    assert f"it's {host}" in shown and look.gpus == cuda.gpus == 4


def test_nodes_of_components_come_on_top() -> None:
    assert header(sbatch_text(with_server("shared"), PROFILE, ROOT))["nodes"] == "2"
    assert header(sbatch_text(with_server("shared", nodes=3), PROFILE, ROOT))["nodes"] == "5"


def test_a_heterogeneous_job_states_everything_for_each_part() -> None:
    profile = replace(PROFILE, cpu_partition="cpu&more", gpu_request="gres", sbatch={"nice": 5})
    text = sbatch_text(with_server("heterogeneous", profile, nodes=2, mem="9G", cpus_per_task=3), profile, ROOT)
    first, second = (header(part) for part in text.split("#SBATCH hetjob\n"))
    assert (first["nodes"], first["gres"], first["partition"]) == ("2", "gpu:4", "gpu")
    assert second == {
        "nodes": "2",
        "ntasks-per-node": "1",
        "cpus-per-task": "3",
        "mem": "9G",
        "time": first["time"],
        "partition": "cpu&more",
        "account": "me",
        "nice": "5",
    }
    before = text.split("#SBATCH hetjob")[0].splitlines()
    assert all(line.startswith("#") or not line for line in before), "sbatch reads no options after a command"


def test_a_value_of_a_component_that_a_directive_cannot_hold_is_refused() -> None:
    with pytest.raises(UserError, match="cannot stand in an sbatch script"):
        sbatch_text(with_server("heterogeneous", nodes=1, partition="a\nb"), PROFILE, ROOT)


def test_what_cannot_be_run_says_so_at_its_top() -> None:
    stage = replace(planned(), not_built="the trainer", absent=("/data/a\nrm -r x", "/data/b", "/data/c"))
    lines = sbatch_text(stage, PROFILE, ROOT).split("\n")
    assert lines[0] == "#!/bin/bash" and "cannot be run" in lines[1] and "not built yet: the trainer" in lines[2]
    assert lines[3].startswith("# ") and "/data/b and 1 more" in lines[3] and lines[4] == ""
    assert "cannot be run" not in text()
