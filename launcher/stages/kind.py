"""What a stage kind says of its stages, and what the kinds share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from launcher.configs import ModelConfig, Resources
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


@dataclass(frozen=True)
class Outside:
    """A file or folder outside the store that a config names at `key`, a path of field and mapping names.

    `counts` is what of it decides the artifact: the names, sizes and times of the files, or a script's content.
    """

    key: tuple[str, ...]
    path: str
    counts: Literal["files", "content"] = "files"

    @property
    def where(self) -> str:
        """The key as messages show it."""
        return ".".join(self.key)


class StageKind(Protocol):
    """A kind of stage. `config` is its dataclass of `launcher.configs`.

    `VERSION` is raised when the same config gives another artifact. A kind says what it has and inherits the rest.
    """

    VERSION: int = 1

    def outputs(self, config: Any) -> Mapping[str, Format]:
        """The ports that a stage fills, with their formats; one that nothing fills is none."""

    def needs(self, config: Any) -> tuple[Need, ...]:
        """What a stage reads in the store or as a checkpoint. Raises UserError for an unknown backend."""

    def steps(self, config: Any, resources: Resources) -> tuple[Step, ...]:
        """The programs that do it."""

    def parts(self, config: Any, seed: int) -> Mapping[str, tuple[Any, int]]:
        """The stages that one fans out into, with their seeds, by the ends of their names; none: it does not."""
        return {}

    def not_built(self, config: Any) -> str | None:
        """Why this version can plan and render a stage but not run it; None: it can."""
        return None

    def outside(self, config: Any) -> tuple[Outside, ...]:
        """What a stage reads outside the store beside checkpoints."""
        return ()

    def what_counts(self, config: Any) -> Any:
        """The config that the fingerprint is taken of."""
        return config

    def model(self, config: Any) -> ModelConfig | None:
        """The model that a stage trains."""
        return None

    def lineage(self, config: Any) -> tuple[str, ...]:
        """References of the checkpoints whose model is that of what a stage makes."""
        return ()

    def components(self, config: Any) -> tuple[str, ...]:
        """Programs beside the main one, which `resources.components` may size."""
        return ()

    def engine(self, config: Mapping[str, Any]) -> str | None:
        """What does the work, in words, from the config in `stage.json`; None: as the receipt says."""
        return None


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
