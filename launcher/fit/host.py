"""What training needs of a node beside its GPUs: memory of the host, and time to save before a limit. Pure.

Both rest on what one save writes (`launcher.fit.saving`). A run that goes on reads as much, in pieces no larger.
"""

from __future__ import annotations

from typing import Literal

from launcher.fit.layers import Architecture
from launcher.fit.memory import Layout
from launcher.fit.saving import Saving, saving_of

#: Bytes of a process before it saves: Python, the libraries of torch and CUDA, batches. Taken; not measured on a GPU.
_PROCESS = 3e9
#: Bytes a second that a node is taken to write; a shared file system may give less.
NODE_RATE = 1e9


def node_bytes(a: Architecture, layout: Layout, ranks: int, *, trainable: Literal["all", "attention"] = "all") -> float:
    """What `ranks` processes of a node hold on the host from their first save on."""
    return ranks * _PROCESS + saving_of(a, layout, gpus_per_node=ranks, trainable=trainable).host_bytes


def stop_seconds(saving: Saving, nodes: int, step_seconds: float) -> float:
    """Seconds from a request to stop to a whole checkpoint.

    The step that runs ends first, and so does the checkpoint that is being written.
    """
    return step_seconds + 2 * saving.seconds(nodes * NODE_RATE)
