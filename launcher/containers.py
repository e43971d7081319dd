"""A step's command inside a container: one function a runtime. Standard library only.

Variables reach the step by `env NAME=VALUE` inside the container: that beats the image's own under every runtime, takes
any value, and `env` is a bare name that the host has too, which some sites' srun looks for before the container starts.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from launcher.errors import UserError
from launcher.spec import Runtime, Step

_PYTHON = ("PYTHONPATH", "PYTHONHOME")
_DETACHED_UNDER_SLURM = (
    "{}'s containers are no children of the job: outside its cgroup, and untouched by scancel; under Slurm use pyxis, "
    "apptainer or charliecloud"
)
_REGISTRY = re.compile(r"[a-z][a-z0-9+.-]*://")
_LABEL = "prism-launch.artifact"


@dataclass(frozen=True)
class Here:
    """What a container of this machine needs that one inside a job does not.

    `name` is its own, `artifact` the folder that it works on (by which what a dead supervisor left is found), `user`
    is UID:GID, and `passed` names variables of this process that enter without their values being written anywhere.
    """

    name: str
    artifact: str
    user: str
    passed: tuple[str, ...] = ()


def wrap(
    step: Step,
    argv: tuple[str, ...],
    environment: Mapping[str, str],
    workdir: str,
    runtime: Runtime,
    here: Here | None = None,
) -> tuple[str, ...]:
    """The container's options or command, then the step's command: what follows srun's own options, or runs here.

    `here` is given outside Slurm alone. Raises UserError for a runtime that does not go there, a step without image,
    and what a runtime cannot quote.
    """
    problems = step_problems(step, runtime, "slurm" if here is None else "local")
    problems += [
        f"{name!r} is no name of a variable" for name in environment if not re.fullmatch(r"[A-Za-z_]\w*", name)
    ]
    if "=" in argv[0]:
        problems.append(f"{argv[0]!r}: a program whose path holds = cannot be started by env")
    if problems:
        raise UserError(f"step {step.name}: {problem}" for problem in problems)
    words = (f"{name}={value}" for name, value in environment.items())
    return (*RUNTIMES[runtime.container].words(step, workdir, here), "env", *words, *argv)


def step_problems(step: Step, runtime: Runtime, scheduler: str) -> list[str]:
    """What is wrong with a step's runtime, image and mounts, under `local` or `slurm`."""
    problems = [*filter(None, [runtime_problem(runtime.container, scheduler)]), *image_problems(step.image, runtime)]
    if runtime.container != "none":
        problems += [p for p in (mount_problem(m, runtime.container) for m in step.mounts) if p]
    return problems


def runtime_problem(container: str, scheduler: str) -> str | None:
    """Why a runtime does not go with a scheduler."""
    if RUNTIMES[container].is_detached and scheduler == "slurm":
        return _DETACHED_UNDER_SLURM.format(container)
    if container == "pyxis" and scheduler == "local":
        return "pyxis is a plug-in of Slurm; without Slurm use docker, podman, apptainer or charliecloud"
    return None


def _none(step: Step, workdir: str, here: Here | None) -> tuple[str, ...]:
    return ()


def _pyxis(step: Step, workdir: str, here: Here | None) -> tuple[str, ...]:
    """Options of NVIDIA's srun plugin. Home and entrypoint are stated because sites change their defaults."""
    mounts = ",".join(map(_full_mount, step.mounts))
    return (
        f"--container-image={step.image}",
        *([f"--container-mounts={mounts}"] if mounts else []),
        f"--container-workdir={workdir}",
        "--no-container-mount-home",
        "--no-container-entrypoint",
    )


def _apptainer(step: Step, workdir: str, here: Here | None) -> tuple[str, ...]:
    """`apptainer exec`: skips the image's runscript; every host variable but the leaks enters, srun's among them."""
    return (
        "apptainer",
        "exec",
        *(["--nv"] if step.gpus else []),
        "--no-home",
        *(f"--bind={_full_mount(m)}" for m in step.mounts),
        f"--pwd={workdir}",
        str(step.image),
    )


def _charliecloud(step: Step, workdir: str, here: Here | None) -> tuple[str, ...]:
    """`ch-run`: every host variable enters, none of the image's. It has no read-only mounts, and makes no mount points
    in an image that it may not write: they have to be there (ch-run(1) of 0.31).
    """
    binds = (_full_mount(m).split(":") for m in step.mounts)
    return (
        "ch-run",
        *(f"--bind={source}:{target}" for source, target, *_ in binds),
        f"--cd={workdir}",
        str(step.image),
        "--",
    )


def _docker(step: Step, workdir: str, here: Here | None) -> tuple[str, ...]:
    """`docker run` as the calling user, on this machine's network; the daemon must be root's."""
    return _run(step, workdir, here, "docker", gpu="--gpus=all")


def _podman(step: Step, workdir: str, here: Here | None) -> tuple[str, ...]:
    """`podman run`; an ordinary user keeps their own id in it. GPUs by the Container Device Interface."""
    keep_id = () if here is not None and here.user.startswith("0:") else ("--userns=keep-id",)
    return _run(step, workdir, here, "podman", *keep_id, gpu="--device=nvidia.com/gpu=all")


def _run(step: Step, workdir: str, here: Here | None, program: str, *options: str, gpu: str) -> tuple[str, ...]:
    assert here is not None  # wrap has refused the rest
    # Asked for with GPUs alone: pinned memory needs them, and a daemon without the right to raise limits refuses.
    gpus = (gpu, "--ulimit=memlock=-1", "--ulimit=stack=67108864") if step.gpus else ()
    return (
        program,
        "run",
        f"--name={here.name}",
        f"--label={_LABEL}={here.artifact}",
        "--rm",
        "--init",  # the first process of a container ignores signals that it has no handler for
        "--pull=never",
        "--log-driver=none",  # what is printed goes to the step's own log
        "--network=host",
        "--ipc=host",
        "--security-opt=label=disable",
        f"--user={here.user}",
        *options,
        *gpus,
        *(f"--env={name}" for name in here.passed),
        *(f"--mount={_mount_words(m)}" for m in step.mounts),
        f"--workdir={workdir}",
        "--entrypoint=",
        str(step.image),
    )


def _mount_words(mount: str) -> str:
    """The value of `--mount`, one line of comma-separated values."""
    source, target, *mode = _full_mount(mount).split(":")
    fields = ("type=bind", f"source={source}", f"target={target}", *(["readonly"] if mode == ["ro"] else []))
    return ",".join(f'"{field}"' if "," in field else field for field in fields)


@dataclass(frozen=True)
class ContainerRuntime:
    """One way to start containers, with all that is its own.

    `words`: options or command before the step's; `programs`: those that start it, any of which will do; `leaks`:
    patterns of variables that would put something into a container which no script shows; `files`: endings of images
    that are files; `refused`: what a mount's path cannot hold; `is_detached`: its containers are children of another
    process than the one that asks for them; `is_child`: its processes are those that were started; `wants_user`: USER
    must be set.
    """

    words: Callable[[Step, str, Here | None], tuple[str, ...]]
    programs: tuple[str, ...] = ()
    leaks: tuple[str, ...] = _PYTHON
    files: tuple[str, ...] = ()
    refused: str = ""
    is_detached: bool = False
    is_child: bool = False
    wants_user: bool = False


#: What Apptainer cannot quote was not tried, so it takes no more than pyxis, which puts paths between double quotes.
_SHELL = """ ,"'$`\\"""
RUNTIMES: Mapping[str, ContainerRuntime] = {
    "none": ContainerRuntime(_none, leaks=(), is_child=True),
    "pyxis": ContainerRuntime(_pyxis, leaks=("PYXIS_*", *_PYTHON), files=(".sqsh",), refused=_SHELL),
    "apptainer": ContainerRuntime(
        _apptainer,
        ("apptainer", "singularity"),
        leaks=("APPTAINER_BIND*", "SINGULARITY_BIND*", "APPTAINERENV_*", "SINGULARITYENV_*", *_PYTHON),
        files=(".sif",),
        refused=_SHELL,
    ),
    "charliecloud": ContainerRuntime(
        _charliecloud, ("ch-run",), files=(".sqsh", ".squashfs", ".sqfs"), refused="\\", is_child=True, wants_user=True
    ),
    "podman": ContainerRuntime(_podman, ("podman",), refused='",', is_detached=True),
    "docker": ContainerRuntime(_docker, ("docker",), refused='"', is_detached=True),
}
_ALL_FILES = tuple(dict.fromkeys(ending for runtime in RUNTIMES.values() for ending in runtime.files))


# ------------------------------------------------------------------------------------------ containers of a daemon's


def container_name(attempt_dir: str, step: str, rank: int) -> str:
    """The name of one process's container."""
    return f"{name_prefix(attempt_dir)}{step}-{rank}"


def name_prefix(attempt_dir: str) -> str:
    """What the names of an attempt's containers begin with."""
    return f"prism-{hashlib.sha256(attempt_dir.encode()).hexdigest()[:12]}-"


def remove_argv(container: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """The command that kills and removes containers and ends when they are gone; they may be gone already."""
    # podman would wait for ten seconds after a polite signal.
    options = {"docker": ("rm", "--force"), "podman": ("rm", "--force", "--ignore", "--time=0")}.get(container)
    return (container, *options, *names) if options else ("true",)


def list_argv(container: str, artifact: str) -> tuple[str, ...]:
    """The command that prints the name of every container that works on an artifact."""
    return (container, "ps", "--all", f"--filter=label={_LABEL}={artifact}", "--format={{.Names}}")


# -------------------------------------------------------------------------------------------------- images and mounts


def image_problems(image: str | None, runtime: Runtime) -> list[str]:
    """What is wrong with an image's name under a runtime. A bare `x.sqsh` would be looked for on Docker Hub."""
    container = runtime.container
    if container == "none":
        return [f"image {image} can not be used: the cluster starts no containers"] if image else []
    if not image:
        return ["no container image"]
    if re.search(r"[\s\x00-\x1f\x7f]", image) or image.startswith("-"):
        return [f"image {image!r} holds blanks or starts with a dash"]
    if RUNTIMES[container].is_detached:
        return _named_image_problems(image, container)
    if image.endswith(_ALL_FILES) and not image.startswith("/"):
        return [f"image {image} is a file: give its full path"]
    if image.endswith(_ALL_FILES) and not image.endswith(RUNTIMES[container].files):
        return [f"image {image} is not one that {container} can start"]
    if container == "apptainer" and not image.startswith("/") and not _REGISTRY.match(image):
        return [f"image {image}: give a full path or docker://REGISTRY/IMAGE:TAG"]
    if container == "apptainer" and image.startswith("docker://") and "#" in image:
        return [f"image {image}: # is for pyxis; apptainer takes {image.replace('#', '/', 1)}"]
    if container == "charliecloud" and not image.startswith("/"):
        return [f"image {image}: give the full path of a folder or a .sqsh file"]
    return []


#: `[docker://][USER@]REGISTRY/…`: what Docker would take for a registry is a host, with a dot or a port.
_SLASHED = re.compile(r"(docker://)?([^@/#]+@)?(?P<registry>localhost|[^@/#]*[.:][^@/#]*)/(?P<image>[^#]+)")


def image_warning(image: str | None, runtime: Runtime) -> str | None:
    """What is most likely not meant by an image's name under a runtime, with the mend."""
    found = _SLASHED.fullmatch(image or "") if runtime.container == "pyxis" else None
    if found is None:
        return None
    meant = f"{found[2] or ''}{found['registry']}#{found['image']}"
    return f"image {image}: pyxis looks for this on Docker Hub; if {found['registry']} is the registry, write {meant}"


def _named_image_problems(image: str, container: str) -> list[str]:
    if "#" in image:
        return [f"image {image}: # is for pyxis; {container} takes {image.replace('#', '/', 1)}"]
    if image.endswith(_ALL_FILES) or image.startswith("/") or _REGISTRY.match(image):
        return [f"image {image}: {container} takes NAME:TAG, as `{container} image ls` shows it"]
    return []


def mount_problem(mount: str, container: str) -> str | None:
    """What is wrong with a mount, `SRC[:DST[:ro|rw]]`, under a runtime."""
    parts = mount.split(":")
    if len(parts) > 3 or (len(parts) == 3 and parts[2] not in ("ro", "rw")):
        return f"mount {mount!r}: write SRC, SRC:DST or SRC:DST:ro"
    refused = RUNTIMES[container].refused
    for path in parts[:2]:
        if not path.startswith("/"):
            return f"mount {mount!r}: give full paths"
        if re.search(rf"[{re.escape(refused)}\x00-\x1f\x7f]", path):
            shown = " ".join(refused.replace(" ", "") + ":")
            blanks = "blanks, " if " " in refused else ""
            unquotable = f"{container} cannot quote {blanks}control characters and {shown}"
            return f"mount {mount!r}: {unquotable} in a mount; rename the folder"
        if ".." in path.split("/"):
            return f"mount {mount!r}: `..` is not allowed"
    return None


def _full_mount(mount: str) -> str:
    """The mount as SRC:DST[:ro|rw]."""
    source, *rest = mount.split(":")
    return ":".join([source, *(rest or [source])])


def order_mounts(mounts: tuple[str, ...]) -> tuple[str, ...]:
    """One mount a target, the first given, with parents before what lies in them: runtimes mount in this order."""
    by_target: dict[str, str] = {}
    for mount in mounts:
        by_target.setdefault(_full_mount(mount).split(":")[1].rstrip("/"), mount)
    return tuple(by_target[target] for target in sorted(by_target))
