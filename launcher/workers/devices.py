"""Which GPU a rank works on, by one rule for every worker; and the end of a stage that has GPUs and no CUDA.

Standard library only; torch where it is asked.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from launcher.errors import WorldError

#: How many GPUs of a node the step was given; not set where none.
GPUS = "PRISM_GPUS"


def given(environment: Mapping[str, str] = os.environ) -> int:
    """GPUs that the step has on each node; 0 where the stage asks for none."""
    return int(environment.get(GPUS) or 0)


def ordinal(count: int, environment: Mapping[str, str] = os.environ) -> int:
    """The number of this rank's GPU among the `count` that it sees; a task that Slurm binds to one sees that alone.

    Raises WorldError where there is none for it: two ranks on one GPU wait for each other for ever.
    """
    local = int(environment.get("LOCAL_RANK") or environment.get("SLURM_LOCALID") or 0)
    if count == 1:
        return 0
    if local < count:
        return local
    raise WorldError(f"{_node(environment)} {_UNUSABLE}: {count} GPUs are seen, and none is for local rank {local}")


#: What `launcher.supervisor.faults` knows as the fault of a node.
_UNUSABLE = "cannot use CUDA"


def require_cuda() -> bool:
    """Whether CUDA is here. Raises WorldError, with the node and the driver's reason, where GPUs were given without."""
    if not given():
        import torch

        return bool(torch.cuda.is_available())
    reason = without_cuda()
    if reason is None:
        return True
    raise WorldError(
        f"{_node(os.environ)} {_UNUSABLE}, though the stage has {given()} GPUs a node: {reason}; look at the driver, "
        "at the GPUs that the container is given, and at CUDA_VISIBLE_DEVICES"
    )


def without_cuda() -> str | None:
    """Why CUDA cannot be used here, in the driver's words; None where it can."""
    import torch

    if torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().split("\n", 1)[0].removesuffix(".")
    return "torch sees no GPU"


def _node(environment: Mapping[str, str]) -> str:
    return f"node {environment.get('SLURMD_NODENAME') or socket.gethostname()}"
