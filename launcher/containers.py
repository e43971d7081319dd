"""A step's command inside a container: one function a runtime. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.errors import UserError
from launcher.spec import Runtime, Step


def wrap(step: Step, argv: tuple[str, ...], environment: Mapping[str, str], runtime: Runtime) -> tuple[str, ...]:
    """What follows srun's own options: the container's options or command, then the step's command."""
    if runtime.container == "none":
        return argv
    raise UserError(f"container runtime {runtime.container} is not built yet; there is none")
