"""A step's command inside a container, and what a runtime cannot quote."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest

from launcher.containers import (
    RUNTIMES,
    Here,
    container_name,
    image_problems,
    mount_problem,
    name_prefix,
    order_mounts,
    wrap,
)
from launcher.errors import UserError
from launcher.spec import Runtime, Step

STEP = Step(name="train", argv=("python3",), image="/images/a.sqsh", mounts=("/scratch", "/data:/mnt/data:ro"))
ENV = {"A": "1,2", "B": "$(touch x) 'q'"}


def wrapped(container: str, step: Step = STEP) -> tuple[str, ...]:
    return wrap(step, ("python3", "w.py"), ENV, "/scratch/work", Runtime(container=container))  # type: ignore[arg-type]


@pytest.mark.parametrize("container", ["none", "pyxis", "apptainer"])
def test_the_command_and_its_variables_come_last_and_whole(container: str) -> None:
    image = {"none": None, "pyxis": "/images/a.sqsh", "apptainer": "/images/a.sif"}[container]
    argv = wrapped(container, replace(STEP, image=image))
    assert argv[-5:] == ("env", "A=1,2", "B=$(touch x) 'q'", "python3", "w.py")


def test_pyxis_takes_options_of_srun() -> None:
    options = wrapped("pyxis")[:-5]
    assert options[:3] == (
        "--container-image=/images/a.sqsh",
        "--container-mounts=/scratch:/scratch,/data:/mnt/data:ro",
        "--container-workdir=/scratch/work",
    )
    assert {"--no-container-mount-home", "--no-container-entrypoint"} == set(options[3:])


def test_pyxis_without_mounts_has_no_empty_option() -> None:
    assert not [w for w in wrapped("pyxis", replace(STEP, mounts=())) if "mounts" in w]


@pytest.mark.parametrize("gpus", [0, 8])
def test_apptainer_is_a_command_that_sees_gpus_only_where_there_are_any(gpus: int) -> None:
    argv = wrapped("apptainer", replace(STEP, image="/images/a.sif", gpus=gpus))
    assert argv[:2] == ("apptainer", "exec") and ("--nv" in argv) == bool(gpus)
    assert [w for w in argv if w.startswith("--bind")] == ["--bind=/scratch:/scratch", "--bind=/data:/mnt/data:ro"]
    assert argv[argv.index("--pwd=/scratch/work") + 1 :][:2] == ("/images/a.sif", "env")


def test_charliecloud_is_a_command_whose_mounts_have_no_mode() -> None:
    argv = wrapped("charliecloud")
    binds = ("--bind=/scratch:/scratch", "--bind=/data:/mnt/data")
    assert argv[:-5] == ("ch-run", *binds, "--cd=/scratch/work", "/images/a.sqsh", "--")


HERE = Here("prism-x", "/root/artifacts/train/f", "7:8", ("TOKEN",))


def here(container: str, step: Step = STEP, here: Here = HERE) -> tuple[str, ...]:
    step = replace(step, image="reg.io/cpu:1") if step.image == STEP.image else step
    return wrap(step, ("python3", "w.py"), ENV, "/scratch/work", Runtime(container=container), here)  # type: ignore[arg-type]


@pytest.mark.parametrize("container", ["docker", "podman"])
def test_containers_of_a_daemon_are_named_and_run_as_the_user(container: str) -> None:
    argv = here(container)
    assert argv[:4] == (container, "run", "--name=prism-x", "--label=prism-launch.artifact=/root/artifacts/train/f")
    assert {"--rm", "--init", "--pull=never", "--network=host", "--ipc=host", "--user=7:8", "--env=TOKEN"} < set(argv)
    assert [w for w in argv if w.startswith("--mount")] == [
        "--mount=type=bind,source=/scratch,target=/scratch",
        "--mount=type=bind,source=/data,target=/mnt/data,readonly",
    ]
    assert argv[-8:-5] == ("--workdir=/scratch/work", "--entrypoint=", "reg.io/cpu:1")
    assert not [w for w in argv if "ulimit" in w or "gpu" in w]


def test_gpus_are_asked_for_in_each_runtimes_way() -> None:
    with_gpus = replace(STEP, gpus=2)
    assert {"--gpus=all", "--ulimit=memlock=-1"} < set(here("docker", with_gpus))
    assert {"--device=nvidia.com/gpu=all", "--ulimit=memlock=-1"} < set(here("podman", with_gpus))


@pytest.mark.parametrize(("user", "kept"), [("0:0", False), ("7:8", True)])
def test_podman_keeps_an_ordinary_users_id(user: str, kept: bool) -> None:
    assert ("--userns=keep-id" in here("podman", here=replace(HERE, user=user))) == kept
    assert "--userns=keep-id" not in here("docker", here=replace(HERE, user=user))


@pytest.mark.parametrize("container", ["docker", "podman"])
def test_containers_of_a_daemon_are_no_part_of_a_job(container: str) -> None:
    with pytest.raises(UserError, match=f"{container}'s containers are no children of the job"):
        wrapped(container, replace(STEP, image="cpu:1"))


def test_pyxis_is_slurms_alone() -> None:
    with pytest.raises(UserError, match="pyxis is a plug-in of Slurm"):
        here("pyxis", replace(STEP, image="/a.sqsh"))


@pytest.mark.parametrize("name", ["", "A B", "-S", "A=B", "1A"])
def test_what_env_would_take_for_something_else_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="no name of a variable"):
        wrap(STEP, ("python3",), {name: "x"}, "/w", Runtime(container="pyxis"))
    with pytest.raises(UserError, match="holds ="):
        wrap(STEP, ("/a=b/python3",), ENV, "/w", Runtime(container="pyxis"))


#: What each runtime can take in a mount, of all that might need quoting.
TAKES = {"pyxis": "", "apptainer": "", "docker": " ,'$`\\", "podman": " '$`\\", "charliecloud": " ,\"'$`"}


@pytest.mark.parametrize("container", TAKES)
@pytest.mark.parametrize("char", [*" ,\"'$`\\", "\n", "\t", "\x7f"])
def test_mounts_hold_what_a_runtime_can_quote_and_nothing_else(container: str, char: str) -> None:
    problem = mount_problem(f"/a{char}b:/b", container)
    assert (problem is None) == (char in TAKES[container])
    assert (mount_problem(f"/a:/a{char}b:ro", container) is None) == (char in TAKES[container])
    if problem:
        image = {"pyxis": "/a.sqsh", "apptainer": "/a.sif", "charliecloud": "/a"}.get(container, "cpu:1")
        with pytest.raises(UserError, match="cannot quote"):
            call = here if container in ("docker", "podman") else wrapped
            call(container, replace(STEP, image=image, mounts=(f"/a{char}b",)))


def test_a_comma_in_a_mount_is_quoted_for_docker() -> None:
    argv = here("docker", replace(STEP, mounts=("/a, b:/b:ro",)))
    assert '--mount=type=bind,"source=/a, b",target=/b,readonly' in argv


@pytest.mark.parametrize("container", TAKES)
@pytest.mark.parametrize("mount", ["", "rel", "/a:rel", "/a:/b:rx", "/a:/b:ro:rw", "/a/../etc", "/a:/../b", "/a:b"])
def test_malformed_mounts_are_problems(container: str, mount: str) -> None:
    assert mount_problem(mount, container)


@pytest.mark.parametrize("container", TAKES)
@pytest.mark.parametrize("mount", ["/a", "/a:/b", "/a:/b:ro", "/a-b_c.d/e+f=g:/x:rw", "/..a"])
def test_plain_mounts_are_fine(container: str, mount: str) -> None:
    assert mount_problem(mount, container) is None


def test_names_of_containers_tell_attempts_apart() -> None:
    names = {container_name(f"/r/{a}", step, rank) for a in "ab" for step in ("x", "y") for rank in (0, 1)}
    assert len(names) == 8 and all(re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+", name) for name in names)
    assert {name_prefix("/r/a"), name_prefix("/r/b")} == {name[: len(name_prefix("/r/a"))] for name in names}


@pytest.mark.parametrize(
    ("container", "image", "message"),
    [
        ("pyxis", None, "no container image"),
        ("pyxis", "a.sqsh", "full path"),
        ("pyxis", "./a.sqsh", "full path"),
        ("pyxis", "/a.sif", "not one that pyxis can start"),
        ("pyxis", "a b", "blanks"),
        ("pyxis", "/images/a\nb.sqsh", "blanks"),
        ("apptainer", "registry/image:tag", "docker://"),
        ("apptainer", "--nv", "dash"),
        ("apptainer", "/a.sqsh", "not one that apptainer can start"),
        ("none", "/a.sqsh", "no containers"),
        ("docker", "/a.sqsh", "NAME:TAG"),
        ("docker", "docker://cpu:1", "NAME:TAG"),
        ("podman", "-v", "dash"),
        ("charliecloud", "cpu:1", "full path of a folder"),
        ("charliecloud", "/a.sif", "not one that charliecloud can start"),
    ],
)
def test_images_that_a_runtime_would_take_for_something_else(container: str, image: str | None, message: str) -> None:
    (problem,) = image_problems(image, Runtime(container=container))  # type: ignore[arg-type]
    assert message in problem


@pytest.mark.parametrize(
    ("container", "image"),
    [
        ("pyxis", "/a.sqsh"),
        ("pyxis", "reg.io#org/image:tag"),
        ("apptainer", "docker://reg.io/i:t"),
        ("none", None),
        ("docker", "reg.io:5000/org/cpu:1"),
        ("podman", "localhost/cpu"),
        ("charliecloud", "/images/cpu"),
        ("charliecloud", "/a.sqsh"),
    ],
)
def test_good_images(container: str, image: str | None) -> None:
    assert image_problems(image, Runtime(container=container)) == []  # type: ignore[arg-type]


def test_mounts_are_ordered_with_parents_first_and_one_a_target() -> None:
    mounts = ("/s/a/b", "/x:/s/a:ro", "/s", "/other:/s/a/b", "/s/")
    assert order_mounts(mounts) == ("/s", "/x:/s/a:ro", "/s/a/b")


def test_every_runtime_of_the_contract_has_its_row() -> None:
    assert set(get_args(get_type_hints(Runtime)["container"])) == set(RUNTIMES)
