"""What this cluster would never start, found before anything is queued: Slurm's own limits against what stages ask.

Reads `scontrol show config` and `show partition`, `sinfo`, `sacctmgr show assoc` and `show qos`, each left out where it
does not answer, then `sbatch --test-only` of the scripts. Formats: the manual pages of Slurm 22.05 and 24.05.
"""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from launcher import slurm, store
from launcher.cluster import Profile, alternatives
from launcher.configs import Resources
from launcher.errors import UserError, WorldError, listed
from launcher.run_record import PlannedStage, RunRecord
from launcher.sbatch import scripts_of
from launcher.site.ask import is_away, may_start_later, parse_gres
from launcher.spec import Step, did_you_mean
from launcher.submit import stage_jobs
from launcher.units import format_duration, parse_duration
from launcher.users import user_name

Problems = Iterator[tuple[str, str]]


@dataclass(frozen=True)
class Node:
    """A node of a partition: cores, MB of memory, GPUs by type; "" counts those of all types.

    `state` is sinfo's, "" where it was not told.
    """

    name: str
    cpus: int
    memory_mb: int
    gpus: Mapping[str, int]
    state: str = ""


@dataclass(frozen=True)
class SlurmPartition:
    """A partition as Slurm has it; None: no limit. `allowed` and `denied` are by `account` and `qos`."""

    name: str
    is_default: bool
    state: str
    max_nodes: int | None
    min_nodes: int
    max_seconds: int | None
    max_cpus: int | None
    allowed: Mapping[str, frozenset[str]]
    denied: Mapping[str, frozenset[str]]
    qos: str | None


@dataclass(frozen=True)
class Bounds:
    """Limits of an association or a QOS: seconds of one job, and counts of `cpu`, `node`, `mem` (MB), `gres/gpu`.

    `group` is for all jobs of the association or QOS together: one job that asks for more waits for ever.
    """

    max_seconds: int | None = None
    job: Mapping[str, float] = field(default_factory=dict)
    group: Mapping[str, float] = field(default_factory=dict)
    flags: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Association:
    """A user's place in an account, or the account's own (user ""); `qos` are those that may be asked for."""

    account: str
    user: str
    qos: frozenset[str]
    bounds: Bounds


@dataclass(frozen=True)
class Site:
    """What Slurm says of a cluster; empty where it does not answer."""

    partitions: Mapping[str, SlurmPartition] = field(default_factory=dict)
    nodes: Mapping[str, tuple[Node, ...]] = field(default_factory=dict)
    associations: tuple[Association, ...] = ()
    qos: Mapping[str, Bounds] = field(default_factory=dict)
    enforced: frozenset[str] = frozenset()
    name: str = ""


@dataclass(frozen=True)
class Request:
    """What one job asks for; memory in MB of a node, 0 for all of it, None: not asked.

    `partition` and `qos` may be lists, `a,b`: Slurm takes the one that lets the job start.
    """

    partition: str | None
    nodes: int
    cpus: int
    memory_mb: int | None
    gpus: int
    gpu_type: str | None
    seconds: int
    account: str | None
    qos: str | None


# ------------------------------------------------------------------------------------------------------------ parsing


def parse_partitions(text: str) -> dict[str, SlurmPartition]:
    """`scontrol show partition --oneliner`."""
    rows = [dict(word.partition("=")[::2] for word in line.split()) for line in text.splitlines()]
    return {row["PartitionName"]: _partition(row) for row in rows if "PartitionName" in row}


def _partition(row: Mapping[str, str]) -> SlurmPartition:
    time = row.get("MaxTime", "UNLIMITED")
    allowed = {"account": row.get("AllowAccounts", "ALL"), "qos": row.get("AllowQos", "ALL")}
    denied = {"account": row.get("DenyAccounts", ""), "qos": row.get("DenyQos", "")}
    return SlurmPartition(
        name=row["PartitionName"],
        is_default=row.get("Default") == "YES",
        state=row.get("State", "UP"),
        max_nodes=_count(row.get("MaxNodes")),
        min_nodes=_count(row.get("MinNodes")) or 0,
        max_seconds=None if time in ("UNLIMITED", "NONE", "INFINITE") else parse_duration(time),
        max_cpus=_count(row.get("MaxCPUsPerNode")),
        allowed={k: frozenset(v.split(",")) for k, v in allowed.items() if v not in ("ALL", "", "(null)")},
        denied={k: frozenset(v.split(",")) for k, v in denied.items() if v not in ("", "NONE", "(null)")},
        qos=None if row.get("QoS", "N/A") in ("N/A", "(null)", "") else row["QoS"],
    )


def _count(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


def parse_nodes(text: str) -> dict[str, tuple[Node, ...]]:
    """Nodes by partition from `sinfo --Node --format=%R|%N|%c|%m|%G|%T`; the state may be missing."""
    found: dict[str, dict[str, Node]] = {}
    for line in text.splitlines():
        words = line.strip().split("|")
        if len(words) in (5, 6) and words[2].isdigit() and words[3].isdigit():
            partition, name, cpus, memory, gres, *state = words
            found.setdefault(partition, {})[name] = Node(name, int(cpus), int(memory), _gpus(gres), *state)
    return {partition: tuple(nodes.values()) for partition, nodes in found.items()}


def _gpus(gres: str) -> dict[str, int]:
    """`gpu:8`, `gpu:a100:4(S:0-1),gpu:v100:2,shard:8`: GPUs by type, and all of them under ""."""
    found = {"": 0}
    for kind, count in parse_gres(gres):
        found[""] += count
        if kind:
            found[kind] = found.get(kind, 0) + count
    return found


def parse_tres(text: str) -> dict[str, float]:
    """`cpu=64,gres/gpu=8,mem=2T,node=4`; memory in MB."""
    found = {}
    for word in text.split(","):
        name, _, value = word.partition("=")
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGTP]?)", value)
        if match:
            scale = 1024.0 ** ("KMGTP".index(match[2]) - 1) if match[2] else 1.0
            found[name] = float(match[1]) * scale
    return found


def parse_associations(text: str) -> tuple[Association, ...]:
    """`sacctmgr --parsable2 show assoc format=account,user,qos,maxwall,maxtres,grptres`."""
    rows = (line.split("|") for line in text.splitlines() if line.count("|") >= 5)
    return tuple(Association(r[0], r[1], frozenset(filter(None, r[2].split(","))), _bounds(*r[3:6])) for r in rows)


def parse_qos(text: str) -> dict[str, Bounds]:
    """`sacctmgr --parsable2 show qos format=name,maxwall,maxtres,grptres,maxtrespu,flags`."""
    rows = (line.split("|") for line in text.splitlines() if line.count("|") >= 5)
    return {r[0]: _bounds(r[1], r[2], r[3], r[4], r[5]) for r in rows}


def _bounds(wall: str, job: str, group: str, user: str = "", flags: str = "") -> Bounds:
    together, alone = parse_tres(group), parse_tres(user)
    least = {name: min(b.get(name, float("inf")) for b in (together, alone)) for name in {*together, *alone}}
    return Bounds(parse_duration(wall) if wall else None, parse_tres(job), least, frozenset(flags.split(",")))


# ------------------------------------------------------------------------------------------------------------ judging


def request_problems(request: Request, site: Site) -> Problems:
    """Why a request can never start, as (key of the stage's resources, message).

    Of several partitions or QOS one that would start it is enough; where there is none, each says why not.
    """
    if not site.partitions:
        return
    names = _partitions_of(request, site)
    unknown = [name for name in names if name not in site.partitions]  # Slurm refuses the list for one of these
    known = ", ".join(site.partitions)
    for name in unknown:
        yield "partition", f"Slurm has no partition {name}{did_you_mean(name, site.partitions)}; there is {known}"
    if not names:
        yield "partition", f"no default partition; there is {known}"
    if unknown:
        return
    chances = itertools.product(names, alternatives(request.qos) or (None,))
    found = [list(_chance_problems(replace(request, partition=name, qos=qos), site)) for name, qos in chances]
    if all(found):
        yield from dict.fromkeys(itertools.chain(*found))


def _partitions_of(request: Request, site: Site) -> tuple[str, ...]:
    """The partitions that would do: those asked for, else the site's default."""
    return alternatives(request.partition) or tuple(p.name for p in site.partitions.values() if p.is_default)[:1]


def _chance_problems(request: Request, site: Site) -> Problems:
    """The same for one partition and one QOS, which both are there or not named."""
    partition = site.partitions[request.partition or ""]
    yield from _partition_problems(request, partition, site.qos.get(request.qos or "", Bounds()).flags)
    yield from _node_problems(request, partition, site.nodes.get(partition.name, ()))
    if "associations" in site.enforced:
        yield from _account_problems(request, partition, site)


def waits_because(request: Request, site: Site) -> str | None:
    """Why a request that can start some day cannot now; None where it can, or that is not seen."""
    reasons = []
    for name in _partitions_of(request, site) if site.partitions else ():
        partition, nodes = site.partitions[name], site.nodes.get(name, ())
        away = [node.name for node in nodes if is_away(node.state)]
        fitting = [node for node in _fitting(request, nodes) if not is_away(node.state)]
        if partition.state == "DOWN":
            reasons.append(f"partition {name} is DOWN")
        elif away and len(fitting) < request.nodes:
            reasons.append(f"of partition {name}, {listed(away)} {'is' if len(away) == 1 else 'are'} out of service")
        else:
            return None
    return "; ".join(reasons) or None


def _partition_problems(request: Request, partition: SlurmPartition, flags: frozenset[str]) -> Problems:
    where = f"partition {partition.name}"
    if partition.state not in ("UP", "DOWN"):  # what is DOWN queues jobs for later
        yield "partition", f"{where} is {partition.state} and takes no jobs"
    most = partition.max_nodes
    if most is not None and request.nodes > most and "PartitionMaxNodes" not in flags:
        yield "nodes", f"asks for {request.nodes} nodes, but {where} allows {most} a job"
    if request.nodes < partition.min_nodes and "PartitionMinNodes" not in flags:
        yield "nodes", f"asks for {request.nodes} nodes, but {where} wants at least {partition.min_nodes}"
    seconds = partition.max_seconds
    if seconds is not None and request.seconds > seconds and "PartitionTimeLimit" not in flags:
        yield "time", _too_long(request.seconds, seconds, where)
    if partition.max_cpus is not None and request.cpus > partition.max_cpus:
        yield "cpus_per_task", f"asks for {request.cpus} cores a node, but {where} allows {partition.max_cpus}"
    for key, asked in (("account", request.account), ("qos", request.qos)):
        allowed, denied = partition.allowed.get(key), partition.denied.get(key, frozenset())
        if asked and (asked in denied or (allowed is not None and asked not in allowed)):
            mend = f"; it takes {', '.join(sorted(allowed))}" if allowed else ""
            yield key, f"{where} refuses {key} {asked}{mend}"


def _too_long(asked: int, most: int, where: str) -> str:
    return f"{format_duration(asked)} is beyond the {format_duration(most)} of {where}"


def _node_problems(request: Request, partition: SlurmPartition, nodes: Sequence[Node]) -> Problems:
    """What no node has; else, whether enough nodes have all of it. Nodes out of service count: they come back."""
    if not nodes:
        return
    where, one = f"partition {partition.name}", False
    for key, (count, what) in _asked_of_a_node(request).items():
        most = max(_has(node, request)[key] for node in nodes)
        if count > most:
            one = True
            yield key, f"asks for {count} {what} on a node, but no node of {where} has more than {most}"
    fitting = _fitting(request, nodes)
    if not one and request.nodes > len(fitting):
        having = " with all that it asks for" if len(fitting) < len(nodes) else ""
        yield "nodes", f"asks for {request.nodes} nodes, but {where} has {len(fitting)}{having}"


def _asked_of_a_node(request: Request) -> dict[str, tuple[int, str]]:
    """What a request wants of each node, by the key of the stage's resources, and how that is called."""
    return {
        "gpus_per_node": (request.gpus, f"{request.gpu_type} GPUs" if request.gpu_type else "GPUs"),
        "cpus_per_task": (request.cpus, "cores"),
        "mem": (request.memory_mb or 0, "MB of memory"),
    }


def _has(node: Node, request: Request) -> dict[str, int]:
    return {
        "gpus_per_node": node.gpus.get(request.gpu_type or "", 0),
        "cpus_per_task": node.cpus,
        "mem": node.memory_mb,
    }


def _fitting(request: Request, nodes: Iterable[Node]) -> list[Node]:
    """The nodes that have all that the request wants of one."""
    asked = _asked_of_a_node(request)
    return [node for node in nodes if all(have >= asked[key][0] for key, have in _has(node, request).items())]


def _account_problems(request: Request, partition: SlurmPartition, site: Site) -> Problems:
    mine = [a for a in site.associations if a.user]
    if not mine:
        return
    accounts = sorted({a.account for a in mine})
    if request.account and request.account not in accounts:
        yield "account", f"you are not in account {request.account}; yours are {', '.join(accounts)}"
        return
    account = request.account or (accounts[0] if len(accounts) == 1 else None)
    chosen = [a for a in site.associations if a.account == account]
    allowed = {name for a in chosen if a.user for name in a.qos}
    if request.qos and "qos" in site.enforced and allowed and request.qos not in allowed:
        names = ", ".join(sorted(allowed))
        yield "qos", f"account {account} may not use QOS {request.qos}; it has {names}"
        return
    if "limits" in site.enforced:
        for a in chosen:
            yield from _bound_problems(
                request, a.bounds, f"your association with account {account}" if a.user else f"account {account}"
            )
        for name in dict.fromkeys((request.qos, partition.qos)):
            if name and name in site.qos:
                yield from _bound_problems(request, site.qos[name], f"QOS {name}")


_KEYS = {"cpu": "cpus_per_task", "node": "nodes", "mem": "mem", "gres/gpu": "gpus_per_node"}
_NOUNS = {"cpu": "cores", "node": "nodes", "mem": "MB of memory", "gres/gpu": "GPUs"}


def _bound_problems(request: Request, bounds: Bounds, where: str) -> Problems:
    if bounds.max_seconds is not None and request.seconds > bounds.max_seconds:
        yield "time", _too_long(request.seconds, bounds.max_seconds, where)
    asked = {
        "cpu": request.nodes * request.cpus,
        "node": request.nodes,
        "mem": request.nodes * (request.memory_mb or 0),
        "gres/gpu": request.nodes * request.gpus,
    }
    for name, count in asked.items():
        most, together = bounds.job.get(name), bounds.group.get(name)
        if most is not None and count > most:
            yield _KEYS[name], f"asks for {count} {_NOUNS[name]} in all, but {where} allows {most:.0f} a job"
        elif together is not None and count > together:
            yield (
                _KEYS[name],
                f"asks for {count} {_NOUNS[name]} in all, but {where} allows {together:.0f} for all jobs together: "
                "it would wait for ever",
            )


# ------------------------------------------------------------------------------------------------------------- asking

_SACCTMGR = ("sacctmgr", "--noheader", "--parsable2", "--readonly", "show")


def read_site(user: str, accounts: Iterable[str]) -> Site | None:
    """What Slurm says now; None where the controller does not answer.

    The limits of `accounts` themselves count besides the user's; those of accounts above them are not looked at.
    """
    config = dict(re.findall(r"^(\w+)\s+= (.*)$", _said("scontrol", "show", "config"), re.MULTILINE))
    if not config:
        return None
    name, wanted = config.get("ClusterName", "").strip(), "format=account,user,qos,maxwall,maxtres,grptres"
    cluster = f"cluster={name}"
    names = ",".join(sorted(set(accounts)))
    questions = {
        "partitions": ("scontrol", "show", "partition", "--oneliner", "--all"),
        "nodes": ("sinfo", "--noheader", "--Node", "--all", "--format=%R|%N|%c|%m|%G|%T"),
        "mine": (*_SACCTMGR, "assoc", cluster, f"user={user}", wanted),
        "whole": (*_SACCTMGR, "assoc", cluster, f"account={names}", "user=", wanted) if names else (),
        "qos": (*_SACCTMGR, "qos", "format=name,maxwall,maxtres,grptres,maxtrespu,flags"),
    }
    with ThreadPoolExecutor() as pool:  # slurmdbd takes its time over each
        said = dict(
            zip(questions, pool.map(lambda words: _said(*words) if words else "", questions.values()), strict=True)
        )
    return Site(
        partitions=parse_partitions(said["partitions"]),
        nodes=parse_nodes(said["nodes"]),
        associations=(
            *parse_associations(said["mine"]),
            *(a for a in parse_associations(said["whole"]) if not a.user),
        ),
        qos=parse_qos(said["qos"]),
        enforced=frozenset(config.get("AccountingStorageEnforce", "").strip().split(",")),
        name=name,
    )


def _said(*argv: str) -> str:
    try:
        answer = slurm.call(*argv)
    except WorldError:  # no Slurm here; the submission says so
        return ""
    return answer.out if answer.ok else ""


def request_of(resources: Resources, profile: Profile) -> Request:
    """What a job, or a part of a heterogeneous one, asks for."""
    memory = resources.mem or profile.mem
    return Request(
        partition=profile.partition_of(resources),
        nodes=resources.nodes,
        cpus=resources.cpus_per_task * resources.ntasks_per_node,
        memory_mb=None if memory is None else int(parse_tres(f"mem={memory}").get("mem", 0)),
        gpus=resources.gpus_per_node,
        gpu_type=profile.gpu_type,
        seconds=parse_duration(profile.time_of(resources)),
        account=resources.account or profile.account,
        qos=resources.qos or profile.qos,
    )


def refuse_impossible(root: Path, records: Sequence[RunRecord], profile: Profile) -> tuple[str, ...]:
    """Raises UserError with everything that the cluster would refuse or never start; nothing is submitted.

    Returns what cannot start for now, and why. Stages are placed on the cluster; those that are done or in the queue
    are left out. Where the controller does not answer, nothing is said: the submission will.
    """
    try:
        stages = [stage for record in records for stage in _to_submit(root, record)]
    except slurm.NoAnswer:
        return ()
    if not stages:
        return ()
    asked = [
        (stage, part, request_of(resources, profile)) for stage in stages for part, resources in stage.job_parts.items()
    ]
    site = read_site(user_name(), {request.account for *_, request in asked if request.account})
    if site is None:
        return ()
    clusters = alternatives(str(profile.sbatch.get("clusters", "")))
    if set(clusters) - {site.name}:  # what this one would never start, another may
        site = Site()
    problems = [
        f"{stage.path_of(part, key)}: {message}"
        for stage, part, request in asked
        for key, message in request_problems(request, site)
    ]
    if problems:
        raise UserError(dict.fromkeys(problems))
    waiting: dict[str, str] = {}
    for stage, _, request in asked:
        why = waits_because(request, site)
        if why:
            waiting.setdefault(stage.part_of or stage.spec.stage, why)
    refused = dict(_refused(stages, profile, root))
    later = {name: why for name, why in refused.items() if may_start_later(why, name in waiting, _reserved(profile))}
    if len(later) < len(refused):
        problems = [f"stages.{n}: sbatch would refuse it: {why}" for n, why in refused.items() if n not in later]
        raise UserError(dict.fromkeys(problems))
    told = {**{name: f"sbatch --test-only: {why}" for name, why in later.items()}, **waiting}
    by_reason = {why: [f"stages.{name}" for name in told if told[name] == why] for why in told.values()}
    return tuple(f"{listed(names)}: waits in the queue, cannot start now: {why}" for why, names in by_reason.items())


def _reserved(profile: Profile) -> bool:
    return "reservation" in profile.sbatch


def _to_submit(root: Path, record: RunRecord) -> list[PlannedStage]:
    active = {name for name, job in stage_jobs(root, record).items() if job.is_active}
    return [
        s for s in record.stages if s.spec.stage not in active and store.read_receipt(root, s.spec.artifact) is None
    ]


def _refused(stages: Sequence[PlannedStage], profile: Profile, root: Path) -> Iterator[tuple[str, str]]:
    """Stages and what `sbatch --test-only` says against them; scripts that differ in names alone are tried once."""
    # The options follow from these alone; the rest of a script is not looked at.
    different = {
        repr(
            (s.is_array, s.stages[0].resources, s.stages[0].spec.limits, [_size(x) for x in s.stages[0].spec.steps])
        ): s
        for s in reversed(list(scripts_of(stages, profile)))
    }
    with tempfile.TemporaryDirectory(prefix="prism-launch.") as folder:
        for script in reversed(different.values()):
            path = Path(folder, "job.sbatch")
            path.write_text(script.text(profile, root), encoding="utf-8", errors="surrogateescape")
            why = slurm.test_only(str(path))
            if why is not None:
                yield script.name.partition(".")[0], why


def _size(step: Step) -> tuple[int | None, ...]:
    return (step.nodes, step.ntasks, step.gpus, step.cpus, step.het_group)
