"""What a stage and the programs beside it ask of the cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from launcher.configs.option import option, refuse_wrong


@dataclass(frozen=True, kw_only=True)
class Component:
    """What a program beside a stage's main one asks for, such as a reward server. Never part of a fingerprint."""

    nodes: int = option(0, "Nodes of its own; 0: the stage's first node, beside the main program.", identity=False)
    gpus_per_node: int = option(0, "GPUs on each of its nodes.", identity=False)
    ntasks_per_node: int = option(1, "Processes on each node.", identity=False)
    cpus_per_task: int = option(1, "Cores of each process.", identity=False)
    mem: str | None = option(None, "heterogeneous: memory of a node; default: the profile's.", identity=False)
    partition: str | None = option(None, "heterogeneous: partition; default: the profile's.", identity=False)
    image: str | None = option(None, "Container image; default: the stage's.", identity=False)

    def __post_init__(self) -> None:
        counts = ("ntasks_per_node", "cpus_per_task")
        refuse_wrong(
            *((getattr(self, n) < 1, n, f"must be at least 1, got {getattr(self, n)}") for n in counts),
            (self.nodes < 0, "nodes", f"must not be negative, got {self.nodes}"),
            (self.gpus_per_node < 0, "gpus_per_node", f"must not be negative, got {self.gpus_per_node}"),
        )


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a stage asks of the cluster. Never part of a fingerprint."""

    nodes: int = option(1, "Nodes of the main program; components with nodes of their own come on top.", identity=False)
    gpus_per_node: int = option(0, "GPUs on each node.", identity=False)
    ntasks_per_node: int = option(1, "Processes on each node; one a GPU where there are GPUs.", identity=False)
    cpus_per_task: int = option(1, "Cores of each process.", identity=False)
    mem: str | None = option(None, "Memory of a node as sbatch takes it, such as 64G.", identity=False)
    time: str | None = option(None, "Time limit as sbatch takes it, such as 4:00:00.", identity=False)
    partition: str | None = option(None, "Partition; default: the profile's.", identity=False)
    account: str | None = option(None, "Account; default: the profile's.", identity=False)
    qos: str | None = option(None, "Quality of service; default: the profile's.", identity=False)
    image: str | None = option(None, "Container image; default: the profile's for this kind of stage.", identity=False)
    components: Mapping[str, Component] = option({}, "Programs beside the main one, by name.", identity=False)
    placement: Literal["shared", "heterogeneous"] = option(
        "shared",
        "shared: components are steps of one allocation; heterogeneous: each is a part of a heterogeneous job.",
        identity=False,
    )

    def __post_init__(self) -> None:
        counts = ("nodes", "ntasks_per_node", "cpus_per_task")
        refuse_wrong(
            *((getattr(self, n) < 1, n, f"must be at least 1, got {getattr(self, n)}") for n in counts),
            (self.gpus_per_node < 0, "gpus_per_node", f"must not be negative, got {self.gpus_per_node}"),
            *(
                (wrong, f"components.{name}.{key}", message)
                for name, component in self.components.items()
                for key, wrong, message in _component_checks(component, self.placement)
            ),
        )


def _component_checks(component: Component, placement: str) -> tuple[tuple[str, bool, str], ...]:
    apart = placement == "heterogeneous"
    beside = "needs placement: heterogeneous; within one allocation every node is of one kind"
    return (
        ("nodes", apart and component.nodes < 1, "a part of a heterogeneous job has at least 1 node of its own"),
        ("partition", not apart and component.partition is not None, beside),
        ("mem", not apart and component.mem is not None, beside),
    )
