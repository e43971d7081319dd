"""A step's command inside a container, and what a runtime cannot quote."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launcher.containers import image_problems, mount_problem, order_mounts, wrap
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


@pytest.mark.parametrize("container", ["docker", "podman", "charliecloud"])
def test_runtimes_that_are_not_built_are_refused_by_name(container: str) -> None:
    with pytest.raises(UserError, match=f"{container} is not built yet; there is none, pyxis, apptainer"):
        wrapped(container)


@pytest.mark.parametrize("container", ["pyxis", "apptainer"])
@pytest.mark.parametrize(
    "mount", ["/a,b", "/a b", '/a"b', "/a$b", "/a`b`", "/a'b", "/a\\b", "/a\nb", "/a:/b:c", "/a:b"]
)
def test_mounts_that_cannot_be_quoted_are_refused(container: str, mount: str) -> None:
    image = {"pyxis": "/a.sqsh", "apptainer": "/a.sif"}[container]
    with pytest.raises(UserError, match="mount"):
        wrapped(container, replace(STEP, image=image, mounts=(mount,)))


@pytest.mark.parametrize("mount", ["", "rel", "/a:rel", "/a:/b:rx", "/a:/b:ro:rw", "/a/../etc", "/a:/../b"])
def test_malformed_mounts_are_problems(mount: str) -> None:
    assert mount_problem(mount)


@pytest.mark.parametrize("mount", ["/a", "/a:/b", "/a:/b:ro", "/a-b_c.d/e+f=g:/x:rw", "/..a"])
def test_plain_mounts_are_fine(mount: str) -> None:
    assert mount_problem(mount) is None


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
    ],
)
def test_images_that_a_runtime_would_take_for_something_else(container: str, image: str | None, message: str) -> None:
    (problem,) = image_problems(image, Runtime(container=container))  # type: ignore[arg-type]
    assert message in problem


@pytest.mark.parametrize(
    ("container", "image"),
    [("pyxis", "/a.sqsh"), ("pyxis", "reg.io#org/image:tag"), ("apptainer", "docker://reg.io/i:t"), ("none", None)],
)
def test_good_images(container: str, image: str | None) -> None:
    assert image_problems(image, Runtime(container=container)) == []  # type: ignore[arg-type]


def test_mounts_are_ordered_with_parents_first_and_one_a_target() -> None:
    mounts = ("/s/a/b", "/x:/s/a:ro", "/s", "/other:/s/a/b", "/s/")
    assert order_mounts(mounts) == ("/s", "/x:/s/a:ro", "/s/a/b")
