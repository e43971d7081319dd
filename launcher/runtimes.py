"""Looks at the container runtimes of this machine before a run begins: programs, daemons, images."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

from launcher.containers import RUNTIMES, step_problems
from launcher.errors import UserError, WorldError
from launcher.spec import Runtime, Step

_TIMEOUT_S = 30


def check_containers(container: str, steps: Sequence[Step]) -> None:
    """Refuse a run whose containers cannot start here.

    Raises UserError for images that are not here and what the runtime cannot quote, WorldError for a runtime that is
    absent or does not answer.
    """
    runtime = Runtime(container=container)  # type: ignore[arg-type]
    problems = [f"step {step.name}: {problem}" for step in steps for problem in step_problems(step, runtime, "local")]
    if problems:
        raise UserError(dict.fromkeys(problems))
    program = RUNTIMES[container].programs[0]
    if shutil.which(program) is None:
        raise WorldError(f"{program}: not installed here; the cluster profile's `runtime` asks for it")
    if container == "docker":
        _check_docker()
    images = sorted({str(step.image) for step in steps})
    absent = [image for image in images if not _is_here(container, image)]
    if absent:
        raise UserError(f"image {image} is not here; pull or build it first: containers/README.md" for image in absent)


def _check_docker() -> None:
    done = _call("docker", "info", "--format={{.SecurityOptions}}")
    if done.returncode:
        raise WorldError(f"docker: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'no answer'}")
    if "name=rootless" in done.stdout or "name=userns" in done.stdout:
        # The caller's id inside is another one outside, which owns what is written and may read nothing.
        raise WorldError("docker: this daemon gives users other ids in containers, which is not supported; use podman")


def _is_here(container: str, image: str) -> bool:
    if RUNTIMES[container].is_detached:
        return _call(container, "image", "inspect", "--format={{.Id}}", image).returncode == 0
    return not image.startswith("/") or os.path.exists(image)


def _call(*argv: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            argv, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, encoding="utf-8", errors="replace"
        )
    except subprocess.TimeoutExpired:
        raise WorldError(f"{argv[0]}: no answer to `{' '.join(argv[:3])}` within {_TIMEOUT_S} s") from None
