"""A look at a site as the text of its cluster profile, with where each value came from. Pure."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from launcher.cluster import Profile
from launcher.containers import RUNTIMES
from launcher.site.ask import Facts, Queue
from launcher.spec import SpecError, decode
from launcher.units import parse_duration

#: YAML reads these words as something else than text.
_SPECIAL = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}
_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./+-]*")


@dataclass(frozen=True)
class Entry:
    """A key of the profile and why it is so. What was not seen is written as a comment, with an example."""

    key: str
    value: Any
    why: str = ""
    seen: bool = True


def draft_profile(facts: Facts) -> str:
    """The profile's text."""
    lines = [f"# {line}" for line in _wrapped(_heading(facts))]
    for entry in entries(facts):
        lines += ["", *_shown(entry)]
    return "\n".join(lines) + "\n"


def entries(facts: Facts) -> Iterator[Entry]:
    """Every key that is written, in order: the one table from what was seen to keys."""
    config = facts.config
    yield Entry("description", f"{config.get('ClusterName', 'a Slurm cluster')}, as seen by {facts.user}")
    yield Entry("scheduler", "slurm")
    if facts.slurm_conf:
        yield Entry("slurm_conf", facts.slurm_conf, "SLURM_CONF of the shell that looked.")
    yield from _charging(facts)
    yield from _partitions(facts)
    yield from _gpus(facts)
    yield _memory(facts)
    yield from _caps(facts)
    yield from _runtime(facts)
    yield from _interpreter(facts)
    nics = ", ".join(facts.interfaces) or "none"
    fabric = f"; InfiniBand devices {', '.join(facts.fabric)}" if facts.fabric else ""
    why = f"Up on this login node: {nics}{fabric}. `cluster test` tells those of the nodes; name the one between them."
    yield Entry("env", {"NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "ib0"}, why, seen=False)
    yield from _continuation(facts)


def _heading(facts: Facts) -> str:
    config = facts.config
    shown = {
        "Slurm": config.get("SLURM_VERSION", "?"),
        "accounting": config.get("AccountingStorageType", "?").removeprefix("accounting_storage/"),
        "preemption": config.get("PreemptType", "?").removeprefix("preempt/"),
        **{key: config.get(key, "?") for key in ("KillWait", "SlurmdTimeout")},
    }
    return (
        "Written by `prism-launch cluster init` from what this site said. What could not be seen stands as a comment; "
        "`prism-launch cluster test` proves the rest by a short job. "
        + ", ".join(f"{name} {value}" for name, value in shown.items())
        + "."
    )


def _charging(facts: Facts) -> Iterator[Entry]:
    if facts.account:
        others = [a for a in facts.accounts if a != facts.account]
        needed = "" if facts.refused.get("no --account") else "; jobs that name none are taken too"
        also = f"; also yours: {', '.join(others)}" if others else ""
        yield Entry("account", facts.account, f"From sacctmgr{also}{needed}.")
    else:
        yield Entry("account", "my-account", f"Not seen: {facts.accounts_unseen}.", seen=False)
    if facts.qos:
        yield Entry(
            "qos",
            facts.qos[0].split()[0],
            f"None is named, which is your default. Yours: {'; '.join(facts.qos)}.",
            seen=False,
        )


def _partitions(facts: Facts) -> Iterator[Entry]:
    chosen = facts.partition
    if chosen is None:
        said = "; ".join(f"{k.removeprefix('--partition=')}: {v}" for k, v in facts.refused.items() if v)
        yield Entry("partition", "gpu", f"None takes a job of yours. {said}", seen=False)
    else:
        default = "The site's default" if chosen.is_default else "The largest that takes a job of yours"
        gave_way = f"; its jobs give way to others ({chosen.preempted})" if chosen.preempted else ""
        yield Entry("partition", chosen.name, f"{default}, {_size(chosen)}{gave_way}.")
    if facts.cpu_partition:
        yield Entry(
            "cpu_partition", facts.cpu_partition.name, f"For stages without GPUs: {_size(facts.cpu_partition)}."
        )
    kind = _needed_type(facts)
    usable = {q.name: _limits(q, kind) for q in facts.queues if not q.closed}
    closed = "".join(f" Left out: {q.name}, {q.closed}." for q in facts.queues if q.closed)
    if usable:
        yield Entry("partitions", usable, f"From scontrol show partition and sinfo.{closed}")
    if chosen:
        yield Entry("time", _time(chosen), "For stages that name none.")
        if chosen.features:
            yield Entry("constraint", chosen.features[0], f"Features here: {', '.join(chosen.features)}.", seen=False)


def _size(queue: Queue) -> str:
    gpus = f" with {queue.gpus} GPUs" if queue.gpus else " without GPUs"
    away = f", {queue.away} of them out of service now" if queue.away else ""
    return f"{queue.nodes} node{'' if queue.nodes == 1 else 's'}{gpus}{away}"


def _limits(queue: Queue, kind: str | None) -> dict[str, Any]:
    limits = {"max_nodes": queue.max_nodes, "max_time": queue.max_time}
    return {
        **{k: v for k, v in limits.items() if v is not None},
        "gpus_per_node": queue.gpus_of(kind),
        **({"cpus_per_node": queue.cpus} if queue.cpus else {}),
    }


def _time(queue: Queue) -> str:
    """The partition's own default where that is long enough to work in, else an hour or what is allowed."""
    if queue.default_time and parse_duration(queue.default_time) >= 600:
        return queue.default_time
    return queue.max_time if queue.max_time and parse_duration(queue.max_time) < 3600 else "1:00:00"


def _gpus(facts: Facts) -> Iterator[Entry]:
    queue = facts.partition
    if queue is None or not queue.gpus:
        return
    tried, taken = _gpu_requests(facts)
    if not taken:
        away = f" {queue.away} of its nodes are out of service: look again when they are back." if queue.away else ""
        why = f"Nothing was taken: {'; '.join(f'{k}: {v}' for k, v in tried.items())}.{away}"
        yield Entry("gpu_request", "gres", why, False)
        return
    refused = "".join(f"; {k} is refused: {v}" for k, v in tried.items() if v)
    how = "gpus_per_node" if taken[0].startswith("--gpus-per-node") else "gres"
    yield Entry("gpu_request", how, f"sbatch --test-only took {' and '.join(taken)}{refused}.")
    kind = _needed_type(facts)
    types = ", ".join(f"{kind} ({queue.types[kind]} a node)" for kind in queue.gpu_types)
    slices = ", ".join(f"{kind or 'untyped'} ({count} a node)" for kind, count in sorted(queue.slices.items()))
    if kind and slices:
        yield Entry("gpu_type", kind, f"Without a type a job might get slices, which are {slices}. GPUs: {types}.")
    elif kind:
        yield Entry("gpu_type", kind, f"A type has to be named. Here: {types}.")
    elif types:
        also = f" Slices, which no stage here counts on: {slices}." if slices else ""
        yield Entry("gpu_type", queue.gpu_types[0], f"Types here: {types}.{also}", seen=False)


def _gpu_requests(facts: Facts) -> tuple[dict[str, str | None], list[str]]:
    """The ways to ask for GPUs that were tried, and those that were taken, the one to use first."""
    tried = {k: v for k, v in facts.refused.items() if k.startswith(("--gpus-per-node", "--gres"))}
    return tried, [option for option, said in tried.items() if said is None]


def _needed_type(facts: Facts) -> str | None:
    """The type of GPU that requests name; None where none has to be."""
    _, taken = _gpu_requests(facts)
    kind = re.search(r"[=:]([^:=]+):\d+$", taken[0].replace("--gres=gpu:", "--gres=")) if taken else None
    return kind[1] if kind else None


def _memory(facts: Facts) -> Entry:
    config, tried = facts.config, facts.refused
    if "MEMORY" not in config.get("SelectTypeParameters", "").upper():
        return Entry("mem", "64G", "Slurm does not count memory here (SelectTypeParameters): not asked for.", False)
    defaults = [f"{k} {config[k]} MB" for k in ("DefMemPerCPU", "DefMemPerGPU", "DefMemPerNode") if k in config]
    default = ", ".join(d for d in defaults if "UNLIMITED" not in d) or "none set, a job gets the whole node's"
    if tried.get("no --mem") is None:
        return Entry("mem", "64G", f"Jobs that name none are taken; the default: {default}. Set it for more.", False)
    taken = [o.partition("=")[2] for o in ("--mem=0", "--mem=1G") if tried.get(o) is None]
    why = f"Jobs that name none are refused: {tried['no --mem']}."
    return Entry("mem", "64G" if taken == ["1G"] else "0", why, seen=bool(taken))


def _caps(facts: Facts) -> Iterator[Entry]:
    config = facts.config
    if config.get("MaxArraySize", "").isdigit():
        yield Entry("max_array", int(config["MaxArraySize"]), "MaxArraySize: most elements of a job array.")
    if facts.max_submit:
        yield Entry("max_submit", facts.max_submit, "From MaxSubmitJobs of your association or QOS.")
    why = f"Seconds between looks at the queue; sites ask for patience. MaxJobCount {config.get('MaxJobCount', '?')}."
    yield Entry("poll_s", 60, why, seen=False)


def _runtime(facts: Facts) -> Iterator[Entry]:
    default = facts.config.get("MpiDefault", "none")
    flavours = ", ".join(facts.mpi) or "not told"
    value: dict[str, Any] = {"container": "none"}
    if default not in ("none", "(null)") and "none" in facts.mpi:
        value["mpi"] = "none"
    seen = f"Containers: {', '.join(facts.containers) or 'none'} seen on this node; `none` until images are named"
    yield Entry("runtime", value, f"{seen}. MPI flavours: {flavours}; default {default}; our ranks meet over TCP.")
    if facts.containers:
        first = facts.containers[0]
        why = f"With images by kind of stage, set runtime.container to {first}."
        suffix = next(iter(RUNTIMES[first].files), "")
        yield Entry("images", {"train": f"/path/on/every/node/train{suffix}"}, why, seen=False)


def _interpreter(facts: Facts) -> Iterator[Entry]:
    yield Entry(
        "python", facts.python, "The one that runs this command; whether the nodes have it, `cluster test` tells."
    )
    if facts.code:
        yield Entry("code", facts.code, "This checkout; the nodes must see it.")
    else:
        yield Entry("code", "/path/to/checkout", f"Not needed where {facts.python} has prism-launch installed.", False)


def _continuation(facts: Facts) -> Iterator[Entry]:
    forbidden = facts.config.get("JobRequeue") == "0" or facts.refused.get("--requeue")
    said = facts.refused.get("--requeue") or f"JobRequeue={facts.config.get('JobRequeue', '?')}"
    if forbidden:
        yield Entry("limits", {"continuation": "chain"}, f"Requeue is not a matter of course here: {said}.")
    else:
        why = f"Requeue is allowed ({said}). For slow checkpoints and long silences:"
        yield Entry("limits", {"hang_s": 1800, "save_s": 300}, why, seen=False)


# ---------------------------------------------------------------------------------------------------------------- text


def _shown(entry: Entry) -> list[str]:
    problem = _problem(entry) if entry.seen else ""
    why = f"{entry.why} Not usable in this version: {problem}." if problem else entry.why
    mark = "" if entry.seen and not problem else "# "
    body = [f"{mark}{line}" for line in _yaml(entry.key, entry.value)]
    return [*(f"# {line}" for line in _wrapped(why)), *body]


def _problem(entry: Entry) -> str:
    """Why the profile of this version does not take an entry."""
    try:
        decode(Profile, {"name": "new", "scheduler": "slurm", entry.key: entry.value})
    except SpecError as error:
        return str(error)
    return ""


def _yaml(key: str, value: Any, depth: int = 0) -> Iterator[str]:
    indent = "  " * depth
    if isinstance(value, Mapping):
        yield f"{indent}{_word(key)}:"
        for name, inner in value.items():
            yield from _yaml(name, inner, depth + 1)
    else:
        yield f"{indent}{_word(key)}: {_word(value)}"


def _word(value: Any) -> str:
    if isinstance(value, str):
        plain = _PLAIN.fullmatch(value) and value.lower() not in _SPECIAL
        return value if plain else json.dumps(value, ensure_ascii=False)
    return json.dumps(value)


def _wrapped(text: str) -> list[str]:
    """A comment's lines; nothing in it can begin a line of its own."""
    plain = "".join(c if c.isprintable() else " " for c in text)
    return textwrap.wrap(" ".join(plain.split()), 116, break_long_words=False, break_on_hyphens=False)
