"""What the module of an RL backend says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from launcher.configs import Resources
from launcher.spec import Family, Format, Step


class Backend(Protocol):
    """A module of `launcher.rl`; `config` is the backend's dataclass of `launcher.configs`.

    `ACCEPTS` and `MAKES` are formats of checkpoints; `ELSEWHERE` says why an algorithm is not among `ALGORITHMS`;
    `TRAINS` names model families, `UNTRAINED` says why one is not among them; `COMPONENTS` are programs beside the main
    one, which `resources.components` may size; `NOT_BUILT` says why this version only renders it (None: it runs).
    """

    @property
    def ACCEPTS(self) -> tuple[Format, ...]: ...
    @property
    def MAKES(self) -> Format: ...
    @property
    def ALGORITHMS(self) -> tuple[str, ...]: ...
    @property
    def ELSEWHERE(self) -> Mapping[str, str]: ...
    @property
    def TRAINS(self) -> tuple[Family, ...]: ...
    @property
    def UNTRAINED(self) -> Mapping[str, str]: ...
    @property
    def COMPONENTS(self) -> tuple[str, ...]: ...
    @property
    def NOT_BUILT(self) -> str | None: ...

    def problems(self, config: Any, resources: Resources) -> Iterable[tuple[str, str]]:
        """What the backend cannot do of a stage: (key, message)."""

    def components(self, config: Any, resources: Resources) -> tuple[Step, ...]:
        """The stage's programs."""
