"""What a site tells of itself: Slurm's own answers and `sbatch --test-only`, which queues nothing. Changes nothing.

Tried with Slurm 22.05; keys and columns read here are the same in the manual pages of 23.11 and 24.05.
"""

from __future__ import annotations

import contextlib
import grp
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.containers import RUNTIMES
from launcher.errors import WorldError
from launcher.slurm import call
from launcher.users import user_name

_FIELD = re.compile(r"(\w+)=(\S*)")
_GRES = re.compile(r"(?:^|,)gpu:(?:([^:,()]+):)?(\d+)(?:\([^)]*\))?(?=,|$)")
_SILENT = re.compile("Unable to contact|Socket timed out|Connection refused|Could not establish", re.IGNORECASE)
_NONE = ("", "UNLIMITED", "NONE", "N/A", "(null)")


#: States of nodes that start nothing for now, in sinfo's words; flags: * does not respond, $ reserved for maintenance.
_AWAY = re.compile(r"(down|drain|fail|maint|inval|unknown|reserved|reboot|err).*|.*[*$]", re.IGNORECASE)
#: What sbatch --test-only has against jobs that a submission would queue all the same: always so; where nodes are out
#: of service or a partition is down (22.05 says it of what no node has, too); where the job waits for a reservation.
_BUSY = re.compile(r"down, drained or reserved|nodes are busy|not available now|not usable now", re.IGNORECASE)
_NO_NODE_NOW = "Requested node configuration is not available"
_NOT_YET = "Invalid time specified"


def is_away(state: str) -> bool:
    """Whether a node in this state, in sinfo's words, starts nothing for now, and may again some day."""
    return bool(_AWAY.fullmatch(state))


def may_start_later(said: str, away: bool, reserved: bool) -> bool:
    """Whether what `sbatch --test-only` has against a job holds for now alone.

    `away`: nodes that it needs are out of service, or its partition is; `reserved`: it asks for a reservation.
    """
    return bool(_BUSY.search(said)) or (away and _NO_NODE_NOW in said) or (reserved and _NOT_YET in said)


@dataclass(frozen=True)
class Queue:
    """A partition: what one job may ask for, and why this user may not, where that is so.

    `types` is the most GPUs of each type on a node ("" where a type is not named), `slices` the same of parts of GPUs
    (MIG); `away` how many of its nodes are out of service.
    """

    name: str
    nodes: int
    is_default: bool = False
    max_nodes: int | None = None
    max_time: str | None = None
    default_time: str | None = None
    types: Mapping[str, int] = field(default_factory=dict)
    slices: Mapping[str, int] = field(default_factory=dict)
    away: int = 0
    cpus: int | None = None
    features: tuple[str, ...] = ()
    whole_nodes: bool = False
    preempted: str = ""
    closed: str = ""

    @property
    def gpus(self) -> int:
        """The most GPUs of one type on a node; slices are none."""
        return max(self.types.values(), default=0)

    def gpus_of(self, kind: str | None) -> int:
        """The most GPUs on a node that a request with this type, or with none, can get."""
        return {**self.slices, **self.types}.get(kind, 0) if kind else self.gpus

    @property
    def gpu_types(self) -> tuple[str, ...]:
        """Types that a request can name: those with most GPUs first, and no slices."""
        return tuple(sorted(filter(None, self.types), key=lambda kind: (-self.types[kind], kind)))


@dataclass(frozen=True)
class Facts:
    """One look at a site. `refused` maps options that were tried to what sbatch said, None where it took them."""

    user: str
    python: str
    code: str | None
    config: Mapping[str, str]
    queues: tuple[Queue, ...]
    partition: Queue | None = None
    cpu_partition: Queue | None = None
    account: str | None = None
    accounts: tuple[str, ...] = ()
    accounts_unseen: str = ""
    max_submit: int | None = None
    qos: tuple[str, ...] = ()
    mpi: tuple[str, ...] = ()
    containers: tuple[str, ...] = ()
    interfaces: tuple[str, ...] = ()
    fabric: tuple[str, ...] = ()
    slurm_conf: str | None = None
    refused: Mapping[str, str | None] = field(default_factory=dict)


def look(code: str | None) -> Facts:
    """Look at the site of this login node. Raises WorldError where there is no Slurm or it does not answer."""
    config = _config()
    user = user_name()
    account, accounts, max_submit, qos, unseen = _associations(user, config.get("ClusterName", ""))
    queues = show_queues(accounts)
    base = [f"--account={account}"] if account else []
    refused: dict[str, str | None] = {}
    gpu, cpu = _choose(queues, base, refused)
    if gpu or cpu:
        _try_options(gpu or cpu, base, refused)
    return Facts(
        user=user,
        python=sys.executable,
        code=code,
        config=config,
        queues=queues,
        partition=gpu or cpu,
        cpu_partition=cpu if gpu and cpu != gpu else None,
        account=account,
        accounts=accounts,
        accounts_unseen=unseen,
        max_submit=max_submit,
        qos=qos,
        mpi=parse_mpi(_mpi()),
        containers=tuple(_containers()),
        interfaces=tuple(_interfaces()),
        fabric=tuple(sorted(p.name for p in Path("/sys/class/infiniband").glob("*"))),
        slurm_conf=os.environ.get("SLURM_CONF"),
        refused=refused,
    )


def refusal(*argv: str) -> str | None:
    """What `sbatch --test-only` has against a job; None where it would take it. Raises WorldError without an answer."""
    answer = call("sbatch", "--test-only", *argv, timeout=30.0)
    if answer.code is None or _SILENT.search(answer.err):
        raise WorldError(f"Slurm's controller does not answer: {answer.err.splitlines()[-1]}")
    if answer.ok:
        return None
    lines = (answer.err or answer.out).strip().splitlines() or ["no answer"]
    told = [line for line in lines if not line.startswith("Try ")]
    return re.sub(r"^(sbatch: (error: )?)?(allocation failure: )?(Batch job submission failed: )?", "", told[-1])


def _must(*argv: str) -> str:
    answer = call(*argv, timeout=30.0)
    if not answer.ok:
        said = answer.err.splitlines()[-1] if answer.err else "no answer"
        raise WorldError(f"Slurm's controller does not answer: {' '.join(argv[:3])}: {said}")
    return answer.out


def _config() -> dict[str, str]:
    pairs = re.findall(r"^(\S+)\s*= (.*)$", _must("scontrol", "show", "config"), re.MULTILINE)
    return {key: value.strip() for key, value in pairs}


def _mpi() -> str:
    answer = call("srun", "--mpi=list")
    return answer.out + answer.err  # which of them it is differs between versions


def parse_mpi(text: str) -> tuple[str, ...]:
    """Flavours in the answer of `srun --mpi=list`; 22.05 lists one a line, older ones `srun: pmix`."""
    words = (line.removeprefix("srun:").strip() for line in text.splitlines())
    listed = {w for w in words if re.fullmatch(r"[a-z][a-z0-9_]*", w)}
    return tuple(sorted(listed | set(re.findall(r"pmix_v\d+", text))))


# -------------------------------------------------------------------------------------------------------- partitions

_SINFO = ("sinfo", "--noheader", "--exact", "--format=%R|%D|%c|%G|%f|%T")


def show_queues(accounts: tuple[str, ...] = ()) -> tuple[Queue, ...]:
    """The site's partitions."""
    return parse_queues(_must("scontrol", "--oneliner", "show", "partition"), _must(*_SINFO), accounts)


def parse_queues(partitions: str, nodes: str, accounts: tuple[str, ...]) -> tuple[Queue, ...]:
    """Partitions, from `scontrol --oneliner show partition` and `sinfo --exact --format=%R|%D|%c|%G|%f|%T`.

    The state may be missing.
    """
    rows: dict[str, list[list[str]]] = {}
    for line in nodes.splitlines():
        name, _, rest = line.partition("|")
        rows.setdefault(name, []).append([*rest.split("|", 4), ""])
    lines = (dict(_FIELD.findall(line)) for line in partitions.splitlines())
    return tuple(_queue(f, rows.get(f["PartitionName"], []), accounts) for f in lines if "PartitionName" in f)


def _queue(said: dict[str, str], rows: list[list[str]], accounts: tuple[str, ...]) -> Queue:
    counts = [_by_type(row[2]) for row in rows]
    most = {kind: max(count.get(kind, 0) for count in counts) for count in counts for kind in count}
    nodes, down = int(said.get("TotalNodes", "0")), said.get("State") == "DOWN"
    cpus = max((int(row[1].rstrip("+")) for row in rows), default=None)
    if cpus is not None and said.get("MaxCPUsPerNode", "").isdigit():
        cpus = min(cpus, int(said["MaxCPUsPerNode"]))
    return Queue(
        name=said["PartitionName"],
        nodes=nodes,
        is_default=said.get("Default") == "YES",
        max_nodes=min(nodes, int(said["MaxNodes"])) if said.get("MaxNodes", "").isdigit() else nodes,
        max_time=_limit(said.get("MaxTime", "")),
        default_time=_limit(said.get("DefaultTime", "")),
        types={kind: count for kind, count in most.items() if not is_slice(kind)},
        slices={kind: count for kind, count in most.items() if is_slice(kind)},
        away=nodes if down else sum(int(row[0]) for row in rows if row[0].isdigit() and is_away(row[4])),
        cpus=cpus,
        features=tuple(sorted({f for row in rows for f in row[3].split(",") if f not in _NONE})),
        whole_nodes=said.get("OverSubscribe") == "EXCLUSIVE",
        preempted=said.get("PreemptMode", "") if said.get("PreemptMode") not in (*_NONE, "OFF") else "",
        closed=_closed(said, accounts),
    )


def _by_type(gres: str) -> dict[str, int]:
    """A node's GPUs by type."""
    found: dict[str, int] = {}
    for kind, count in parse_gres(gres):
        found[kind] = found.get(kind, 0) + count
    return found


def _limit(text: str) -> str | None:
    return None if text in _NONE else text


def parse_gres(text: str) -> list[tuple[str, int]]:
    """(type, count) of the GPUs in a gres string such as `gpu:h100:8(S:0-1),shard:4`; the type may be empty."""
    return [(kind, int(count)) for kind, count in _GRES.findall(text)]


#: `1g.10gb`, `h100_3g.40gb`, `a100-1g.5gb+me`, `mig`: as NVIDIA's profiles are called.
_SLICE = re.compile(r"\d+g[._-]?\d+gb|(^|[^a-z0-9])mig([^a-z0-9]|$)", re.IGNORECASE)


def is_slice(kind: str) -> bool:
    """Whether a type of GPU is a part of one (MIG): a program sees one of them at a time, so stages want none."""
    return bool(_SLICE.search(kind))


def _closed(said: dict[str, str], accounts: tuple[str, ...]) -> str:
    """Why this user may not use a partition, as far as the partition says it."""

    def apart(key: str, mine: set[str]) -> bool:
        allowed = said.get(key, "ALL")
        return allowed != "ALL" and not mine & set(allowed.split(","))

    if said.get("State", "UP") not in ("UP", "DOWN"):  # what is DOWN queues jobs for later
        return f"its state is {said['State']}"
    if said.get("RootOnly") == "YES" and os.geteuid():
        return "it is root's alone"
    if apart("AllowGroups", _groups()) and os.geteuid():
        return f"for groups {said['AllowGroups']} only"
    if accounts and apart("AllowAccounts", set(accounts)):
        return f"for accounts {said['AllowAccounts']} only"
    return ""


def _groups() -> set[str]:
    found = set()
    for gid in os.getgroups():
        with contextlib.suppress(KeyError):
            found.add(grp.getgrgid(gid).gr_name)
    return found


def _choose(queues: tuple[Queue, ...], base: list[str], refused: dict[str, str | None]) -> tuple[Queue | None, ...]:
    """The partitions for stages with and without GPUs: one in service, the site's default first, then one whose jobs
    are not preempted, then the largest that takes a job.

    One that has slices of GPUs alone is for neither, unless there is no other.
    """

    def rank(queue: Queue) -> tuple[Any, ...]:
        return queue.away < queue.nodes, queue.is_default, not queue.preempted, queue.nodes * max(1, queue.gpus)

    usable = [q for q in sorted(queues, key=rank, reverse=True) if not q.closed]
    gpu = _first_taken([q for q in usable if q.gpus], base, refused)
    without = sorted((q for q in usable if not q.gpus), key=lambda q: bool(q.slices))
    return gpu, gpu if gpu and gpu.is_default else _first_taken(without, base, refused)


def _first_taken(queues: list[Queue], base: list[str], refused: dict[str, str | None]) -> Queue | None:
    for queue in queues[:6]:
        option = f"--partition={queue.name}"
        refused[option] = _try(*base, option)
        # A job that lacks an option, such as --gres or --mem, may be refused for that; only a flat no counts.
        if refused[option] is None or not re.search("partition|account|permission|qos", refused[option] or "", re.I):
            return queue
    return None


def _try(*options: str) -> str | None:
    return refusal("--nodes=1", "--time=5", *options, "--wrap=true")


def _try_options(queue: Queue | None, base: list[str], refused: dict[str, str | None]) -> None:
    """Try on the chosen partition what sites differ in."""
    assert queue is not None
    with_account, base = base, [*base, f"--partition={queue.name}"]
    if with_account:
        refused["no --account"] = _try(base[-1])
    if queue.gpus:
        tried = _try_gpus(queue, base)
        refused |= tried
        base += [option for option, said in tried.items() if said is None][:1]
    refused["no --mem"] = _try(*base)
    for option in ("--mem=0", "--mem=1G"):
        refused[option] = _try(*base, option)
    base += [] if refused["no --mem"] is None else [o for o in ("--mem=0", "--mem=1G") if refused[o] is None][:1]
    refused["--requeue"] = _try(*base, "--requeue")


def _try_gpus(queue: Queue, base: list[str]) -> dict[str, str | None]:
    """Ways to ask for a node's GPUs, with a memory too where nothing is taken without.

    Each type is asked for with its own count. Where there are slices too, a request without a type might be given them.
    """
    typed, untyped = [f"{kind}:{queue.types[kind]}" for kind in queue.gpu_types], [str(queue.gpus)]
    counts = [*typed, *untyped] if queue.slices else [*untyped, *typed]
    options = [option for count in counts for option in (f"--gpus-per-node={count}", f"--gres=gpu:{count}")]
    tried: dict[str, str | None] = {}
    for memory in ([], ["--mem=1G"]):
        tried = {option: _try(*base, *memory, option) for option in options}
        if None in tried.values():
            break
    return tried


# ------------------------------------------------------------------------------------------------- accounts, machine


def _associations(user: str, cluster: str) -> tuple[str | None, tuple[str, ...], int | None, tuple[str, ...], str]:
    """Default account, all accounts, most submitted jobs, QOS with their limits; and why nothing is known."""
    try:
        told = call(
            "sacctmgr",
            *("--noheader", "--parsable2", "show", "assoc", f"user={user}", f"cluster={cluster}"),
            "format=account,qos,maxsubmit",
        )
    except WorldError as error:
        return None, (), None, (), str(error)
    rows = [line.split("|") for line in told.out.splitlines() if line.count("|") == 2]
    if not told.ok or not rows:
        return None, (), None, (), told.err or f"sacctmgr knows no association of {user}"
    default = call("sacctmgr", "--noheader", "--parsable2", "show", "user", user, "format=defaultaccount").out.strip()
    accounts = tuple(dict.fromkeys(row[0] for row in rows))
    account = default if default in accounts else accounts[0]
    mine = sorted({name for row in rows for name in row[1].split(",") if name})
    qos, caps = _qos(mine)
    caps += [int(row[2]) for row in rows if row[0] == account and row[2].isdigit()]
    return account, accounts, min(caps, default=None), qos, ""


def _qos(mine: list[str]) -> tuple[tuple[str, ...], list[int]]:
    """This user's QOS as `name (MaxWall=…)`, and their caps on submitted jobs."""
    columns = ("MaxWall", "MaxSubmitPU", "MaxJobsPU", "MaxTRESPU")
    told = call("sacctmgr", "--noheader", "--parsable2", "show", "qos", f"format=name,{','.join(columns)}").out
    shown, caps = [], []
    for row in (line.split("|") for line in told.splitlines()):
        if row[0] in mine:
            limits = [f"{key}={value}" for key, value in zip(columns, row[1:], strict=False) if value]
            shown.append(f"{row[0]} ({', '.join(limits)})" if limits else row[0])
            caps += [int(row[2])] if len(mine) == 1 and row[2].isdigit() else []
    return tuple(shown or mine), caps


def _containers() -> Iterator[str]:
    """Container runtimes: pyxis by srun's options, others by the programs on this node's PATH."""
    if "--container-image" in call("srun", "--help").out:
        yield "pyxis"
    yield from (name for name, runtime in RUNTIMES.items() if any(map(shutil.which, runtime.programs)))


def _interfaces() -> Iterator[str]:
    """This node's network interfaces that are up; neither the loopback nor bridges and what is plugged into them."""
    for folder in sorted(Path("/sys/class/net").glob("*")):
        inner = folder.name == "lo" or (folder / "bridge").exists() or (folder / "brport").exists()
        with contextlib.suppress(OSError):
            if not inner and (folder / "operstate").read_text(encoding="utf-8").strip() == "up":
                yield folder.name
