"""What a stage kind's module says, and what the kinds share.

Every module has `VERSION` (raised when the same config gives another artifact), `outputs(config)` (port to format),
`needs(config)`, `steps(config, resources)` and `not_built(config)`, which says why this version can plan and render a
stage but not run it (None: it can); one whose stages may fan out also `parts(config, seed)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from launcher.configs import Resources
from launcher.references import port_of
from launcher.spec import Format, Step


@dataclass(frozen=True)
class Need:
    """One thing a stage reads.

    `ref` is the reference as the recipe wrote it, `where` the config key it stands at (for messages), `port` the
    input's name in `stage.json`. A checkpoint in a format outside `accepts` is converted to the first of them.
    """

    port: str
    ref: str
    where: str
    what: Literal["checkpoint", "tokens", "prompts", "tokenizer"]
    accepts: tuple[Format, ...]


def item_need(ref: str, where: str, what: Literal["tokens", "prompts"]) -> Need:
    """The need for a source or problem set of a prepare stage."""
    return Need(port_of(ref, what), ref, where, what, (what,))


def worker_step(kind: str, resources: Resources) -> Step:
    """The one step of a stage that runs `launcher.workers.KIND` on everything the stage asked for."""
    return Step(
        name=kind,
        argv=("{python}", "-m", f"launcher.workers.{kind}", "{stage_json}"),
        nodes=resources.nodes,
        ntasks=resources.nodes * resources.ntasks_per_node,
        gpus=resources.gpus_per_node,
        cpus=resources.cpus_per_task,
        image=resources.image,
    )
