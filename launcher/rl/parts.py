"""What backends share: where a component's step runs, and values in Hydra's syntax."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from launcher.configs import Component, MegatronRL, Resources, RLConfig
from launcher.references import item_of, port_of
from launcher.spec import Probe, Step
from launcher.units import parse_duration

#: Programs with a clock of their own save and end this many seconds before the time limit.
SAVE_MARGIN_S = 1200
_UNQUOTABLE = re.compile(r'["\\$\x00-\x1f\x7f]')
#: What Hydra reads as this very string.
_PLAIN = re.compile(r"(?!(?:true|false|null|nan|inf)$)[A-Za-z]\w*", re.IGNORECASE)


def component_step(
    resources: Resources, names: Sequence[str], name: str, argv: tuple[str, ...], probe: Probe | None = None
) -> Step:
    """A server's step: on the main program's first node, on nodes after the main one's, or in a job part of its own.

    `names` are all components of the stage, in the order in which nodes are given to them.
    """
    asked = {n: resources.components.get(n, Component()) for n in names}
    own, apart = asked[name], resources.placement == "heterogeneous"
    before = sum(asked[n].nodes for n in names[: names.index(name)])
    nodes = max(1, own.nodes)
    return Step(
        name=name,
        role="server",
        argv=argv,
        nodes=nodes,
        ntasks=nodes * own.ntasks_per_node,
        gpus=own.gpus_per_node,
        cpus=own.cpus_per_task,
        image=own.image or resources.image,
        probe=probe,
        first_node=resources.nodes + before if own.nodes and not apart else 0,
        het_group=names.index(name) + 1 if apart else None,
    )


def prompts_file(config: RLConfig) -> str:
    """The file of the stage's prompts, with a placeholder for its folder."""
    return f"{{input:{port_of(config.prompts, 'prompts')}}}/{item_of(config.prompts)}.jsonl"


def data_parallel_size(config: MegatronRL, resources: Resources) -> int:
    """Copies of the policy; 0 where the layout does not divide the processes."""
    layout = config.parallelism
    ranks = layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size * layout.context_parallel_size
    copies, rest = divmod(resources.nodes * resources.ntasks_per_node, ranks)
    return 0 if rest else copies


def clock(resources: Resources) -> str:
    """The stage's time limit less the margin, as DD:HH:MM:SS."""
    seconds = int(parse_duration(resources.time or "0")) - SAVE_MARGIN_S
    days, rest = divmod(max(0, seconds), 86400)
    return f"{days:02}:{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}"


def overrides(values: dict[str, Any]) -> tuple[str, ...]:
    """Hydra overrides `key=value`: strings in double quotes, None as null; `~key` removes a key."""
    return tuple(key if key.startswith("~") else f"{key}={hydra(value)}" for key, value in values.items())


def hydra(value: Any) -> str:
    """A value in Hydra's override grammar; a string must hold nothing that `common_problems` refuses."""
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) else f'"{value}"'
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(hydra, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{hydra(v)}" for k, v in value.items()) + "}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


def common_problems(config: MegatronRL, resources: Resources) -> Iterator[tuple[str, str]]:
    """What keeps a program with GPUs, a Megatron policy and a clock of its own from running: (key, message)."""
    if resources.time is None:
        yield "resources.time", f"is required: backend {config.backend} saves by its own clock"
    elif _seconds(resources.time) <= 2 * SAVE_MARGIN_S:
        yield "resources.time", f"{resources.time} is too short: the policy is saved {SAVE_MARGIN_S} s before the end"
    if resources.gpus_per_node == 0:
        yield "resources.gpus_per_node", f"backend {config.backend} needs GPUs"
    elif resources.ntasks_per_node != resources.gpus_per_node:
        message = f"must be gpus_per_node, {resources.gpus_per_node}: one process a GPU"
        yield "resources.ntasks_per_node", message
    if any(_UNQUOTABLE.search(word) for word in config.end_strings):
        yield "end_strings", '" \\ $ and control characters cannot be quoted for Hydra'
    yield from _batch_problems(config, resources)


def _seconds(time: str) -> float:
    try:
        return parse_duration(time)
    except ValueError:
        return float("inf")  # named by the recipe's reader


def _batch_problems(config: MegatronRL, resources: Resources) -> Iterator[tuple[str, str]]:
    copies = data_parallel_size(config, resources)
    if not copies:
        processes = resources.nodes * resources.ntasks_per_node
        yield "parallelism", f"tensor x pipeline x context parallel size does not divide the {processes} processes"
        return
    if config.prompts_per_step % copies:
        yield "prompts_per_step", f"{config.prompts_per_step} is not a multiple of the {copies} copies of the policy"
    batch = config.prompts_per_step * config.num_generations
    if batch % (copies * config.micro_batch_size):
        unit = f"micro_batch_size {config.micro_batch_size} x {copies} copies of the policy"
        yield "micro_batch_size", f"{batch} samples a step are not a multiple of {unit}"
