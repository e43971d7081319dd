"""rl: reinforcement learning; the backend decides the checkpoint's format and the programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.configs import Resources, RLConfig
from launcher.rl import backend, backends
from launcher.spec import Format, Step
from launcher.stages.kind import Need, StageKind, item_need


class RL(StageKind):
    """rl: reinforcement learning; the backend decides the checkpoint's format and the programs."""

    def outputs(self, config: RLConfig) -> dict[str, Format]:
        """The policy, in the format that the backend writes; hf where the backend is unknown, which `needs` refuses."""
        module = backends().get(config.backend)
        return {"checkpoint": module.MAKES if module else "hf"}

    def needs(self, config: RLConfig) -> tuple[Need, ...]:
        """The policy, in the backend's format, and the problems."""
        accepts = backend(config.backend).ACCEPTS
        return (
            Need("checkpoint", config.checkpoint, "checkpoint", "checkpoint", accepts),
            item_need(config.prompts, "prompts", "prompts"),
        )

    def steps(self, config: RLConfig, resources: Resources) -> tuple[Step, ...]:
        """The backend's components."""
        return tuple(backend(config.backend).components(config, resources))

    def not_built(self, config: RLConfig) -> str | None:
        """As the backend says."""
        return backend(config.backend).NOT_BUILT

    def lineage(self, config: RLConfig) -> tuple[str, ...]:
        """The policy that it starts from."""
        return (config.checkpoint,)

    def components(self, config: RLConfig) -> tuple[str, ...]:
        """As the backend says."""
        return backend(config.backend).COMPONENTS if config.backend in backends() else ()

    def engine(self, config: Mapping[str, Any]) -> str:
        """The backend and its algorithm."""
        return f"{config['backend']} ({config.get('algorithm', 'grpo')})"
