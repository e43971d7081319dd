"""The stage kinds, one module each: what a config reads, the ports it fills, and the steps that do it.

Every module has `VERSION` (raised when the same config gives another artifact), `outputs(config)` (port to format),
`needs(config)`, `steps(config, resources)` and `not_built(config)`, which says why this version can plan and render a
stage but not run it (None: it can); one whose stages may fan out also `parts(config, seed)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

from launcher.configs import Resources
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


def split_ref(ref: str) -> tuple[str, str | None]:
    """`STAGE/ITEM` as its two parts; the item is None where there is none."""
    stage, slash, item = ref.partition("/")
    return stage, item if slash else None


def item_need(ref: str, where: str, what: Literal["tokens", "prompts"]) -> Need:
    """The need for a source or problem set of a prepare stage."""
    return Need(f"{split_ref(ref)[0]}.{what}", ref, where, what, (what,))


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


def kinds() -> Mapping[str, ModuleType]:
    """Every stage kind's module by name."""
    from launcher.stages import analyze, convert, evaluate, merge, prepare, rl, train

    modules = {"prepare": prepare, "train": train, "convert": convert, "merge": merge, "rl": rl}
    return {**modules, "evaluate": evaluate, "analyze": analyze}
