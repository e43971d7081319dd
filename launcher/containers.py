"""A step's command inside a container: one function a runtime. Standard library only.

Variables reach the step by `env NAME=VALUE` inside the container: that beats the image's own under every runtime, takes
any value, and `env` is a bare name that the host has too, which some sites' srun looks for before the container starts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from launcher.errors import UserError
from launcher.spec import Runtime, Step

#: Patterns of variables that would put something into a container which no script shows.
LEAKS = {
    "none": (),
    "pyxis": ("PYXIS_*", "PYTHONPATH", "PYTHONHOME"),
    "apptainer": (
        "APPTAINER_BIND*",
        "SINGULARITY_BIND*",
        "APPTAINERENV_*",
        "SINGULARITYENV_*",
        "PYTHONPATH",
        "PYTHONHOME",
    ),
}
_REFUSED = re.compile(r"""[\s,:"'$`\\\x00-\x1f\x7f]""")
_REGISTRY = re.compile(r"[a-z][a-z0-9+.-]*://")


def wrap(
    step: Step, argv: tuple[str, ...], environment: Mapping[str, str], workdir: str, runtime: Runtime
) -> tuple[str, ...]:
    """What follows srun's own options: the container's options or command, then the step's command.

    Raises UserError for a runtime that is not built, a step without image, and what a runtime cannot quote.
    """
    command = ("env", *(f"{name}={value}" for name, value in environment.items()), *argv)
    return (*_prefix(step, workdir, runtime), *command)


def _prefix(step: Step, workdir: str, runtime: Runtime) -> tuple[str, ...]:
    if runtime.container not in RUNTIMES:
        raise UserError(not_built(runtime.container))
    problems = image_problems(step.image, runtime)
    if runtime.container != "none":
        problems += [m for m in map(mount_problem, step.mounts) if m]
    if problems:
        raise UserError(f"step {step.name}: {problem}" for problem in problems)
    return RUNTIMES[runtime.container](step, workdir)


def not_built(container: str) -> str:
    """The message for a runtime that this version cannot start."""
    return f"container runtime {container} is not built yet; there is {', '.join(RUNTIMES)}"


def _none(step: Step, workdir: str) -> tuple[str, ...]:
    return ()


def _pyxis(step: Step, workdir: str) -> tuple[str, ...]:
    """Options of NVIDIA's srun plugin. Home and entrypoint are stated because sites change their defaults."""
    mounts = ",".join(map(_full_mount, step.mounts))
    return (
        f"--container-image={step.image}",
        *([f"--container-mounts={mounts}"] if mounts else []),
        f"--container-workdir={workdir}",
        "--no-container-mount-home",
        "--no-container-entrypoint",
    )


def _apptainer(step: Step, workdir: str) -> tuple[str, ...]:
    """`apptainer exec`: skips the image's runscript; every host variable but the LEAKS enters, srun's among them."""
    return (
        "apptainer",
        "exec",
        *(["--nv"] if step.gpus else []),
        "--no-home",
        *(f"--bind={_full_mount(m)}" for m in step.mounts),
        f"--pwd={workdir}",
        str(step.image),
    )


RUNTIMES: Mapping[str, Callable[[Step, str], tuple[str, ...]]] = {
    "none": _none,
    "pyxis": _pyxis,
    "apptainer": _apptainer,
}


# -------------------------------------------------------------------------------------------------- images and mounts


def image_problems(image: str | None, runtime: Runtime) -> list[str]:
    """What is wrong with an image's name under a runtime. A bare `x.sqsh` would be looked for on Docker Hub."""
    if runtime.container == "none":
        return [f"image {image} can not be used: the cluster starts no containers"] if image else []
    if not image:
        return ["no container image"]
    if re.search(r"[\s\x00-\x1f\x7f]", image) or image.startswith("-"):
        return [f"image {image!r} holds blanks or starts with a dash"]
    is_file = image.endswith((".sqsh", ".sif"))
    if is_file and not image.startswith("/"):
        return [f"image {image} is a file: give its full path"]
    other = {"pyxis": ".sif", "apptainer": ".sqsh"}.get(runtime.container, "")
    if is_file and image.endswith(other):
        return [f"image {image} is not one that {runtime.container} can start"]
    if runtime.container == "apptainer" and not image.startswith("/") and not _REGISTRY.match(image):
        return [f"image {image}: give a full path or docker://REGISTRY/IMAGE:TAG"]
    return []


def mount_problem(mount: str) -> str | None:
    """What is wrong with a mount, `SRC[:DST[:ro|rw]]`. pyxis has no way to quote what is refused here."""
    parts = mount.split(":")
    if len(parts) > 3 or (len(parts) == 3 and parts[2] not in ("ro", "rw")):
        return f"mount {mount!r}: write SRC, SRC:DST or SRC:DST:ro"
    for path in parts[:2]:
        if not path.startswith("/"):
            return f"mount {mount!r}: give full paths"
        if _REFUSED.search(path):
            return f"mount {mount!r}: blanks and , : \" ' $ ` \\ cannot be quoted in a mount; rename the folder"
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
