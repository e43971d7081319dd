"""What a site tells of itself: Slurm's own answers and `sbatch --test-only`, which queues nothing. Changes nothing.

Tried with Slurm 22.05; keys and columns read here are the same in the manual pages of 23.11 and 24.05.
"""

from __future__ import annotations

import contextlib
import getpass
import grp
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from launcher.errors import WorldError
from launcher.slurm import call

#: Programs that start containers, by the name that a profile gives them.
CONTAINER_PROGRAMS = {
    "apptainer": ("apptainer", "singularity"),
    "charliecloud": ("ch-run",),
    "podman": ("podman",),
    "docker": ("docker",),
}
_FIELD = re.compile(r"(\w+)=(\S*)")
_GRES = re.compile(r"(?:^|,)gpu:(?:([^:,()]+):)?(\d+)(?:\([^)]*\))?(?=,|$)")
_SILENT = re.compile("Unable to contact|Socket timed out|Connection refused|Could not establish", re.IGNORECASE)
_NONE = ("", "UNLIMITED", "NONE", "N/A", "(null)")


@dataclass(frozen=True)
class Queue:
    """A partition: what one job may ask for, and why this user may not, where that is so."""

    name: str
    nodes: int
    is_default: bool = False
    max_nodes: int | None = None
    max_time: str | None = None
    default_time: str | None = None
    gpus: int = 0
    gpu_types: tuple[str, ...] = ()
    cpus: int | None = None
    features: tuple[str, ...] = ()
    whole_nodes: bool = False
    preempted: str = ""
    closed: str = ""


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
    user = getpass.getuser()
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

_SINFO = ("sinfo", "--noheader", "--exact", "--format=%R|%D|%c|%G|%f")


def show_queues(accounts: tuple[str, ...] = ()) -> tuple[Queue, ...]:
    """The site's partitions."""
    return parse_queues(_must("scontrol", "--oneliner", "show", "partition"), _must(*_SINFO), accounts)


def parse_queues(partitions: str, nodes: str, accounts: tuple[str, ...]) -> tuple[Queue, ...]:
    """Partitions, from `scontrol --oneliner show partition` and `sinfo --exact --format=%R|%D|%c|%G|%f`."""
    rows: dict[str, list[list[str]]] = {}
    for line in nodes.splitlines():
        name, _, rest = line.partition("|")
        rows.setdefault(name, []).append(rest.split("|", 3))
    lines = (dict(_FIELD.findall(line)) for line in partitions.splitlines())
    return tuple(_queue(f, rows.get(f["PartitionName"], []), accounts) for f in lines if "PartitionName" in f)


def _queue(said: dict[str, str], rows: list[list[str]], accounts: tuple[str, ...]) -> Queue:
    gpus = [gpu for row in rows for gpu in parse_gres(row[2])]
    nodes = int(said.get("TotalNodes", "0"))
    cpus = [int(row[1].rstrip("+")) for row in rows]
    if said.get("MaxCPUsPerNode", "").isdigit():
        cpus.append(min([int(said["MaxCPUsPerNode"]), *cpus]))
        cpus = cpus[-1:]
    return Queue(
        name=said["PartitionName"],
        nodes=nodes,
        is_default=said.get("Default") == "YES",
        max_nodes=min(nodes, int(said["MaxNodes"])) if said.get("MaxNodes", "").isdigit() else nodes,
        max_time=_limit(said.get("MaxTime", "")),
        default_time=_limit(said.get("DefaultTime", "")),
        gpus=max((count for _, count in gpus), default=0),
        gpu_types=tuple(sorted({kind for kind, _ in gpus if kind})),
        cpus=max(cpus, default=None),
        features=tuple(sorted({f for row in rows for f in row[3].split(",") if f not in _NONE})),
        whole_nodes=said.get("OverSubscribe") == "EXCLUSIVE",
        preempted=said.get("PreemptMode", "") if said.get("PreemptMode") not in (*_NONE, "OFF") else "",
        closed=_closed(said, accounts),
    )


def _limit(text: str) -> str | None:
    return None if text in _NONE else text


def parse_gres(text: str) -> list[tuple[str, int]]:
    """(type, count) of the GPUs in a gres string such as `gpu:h100:8(S:0-1),shard:4`; the type may be empty."""
    return [(kind, int(count)) for kind, count in _GRES.findall(text)]


def _closed(said: dict[str, str], accounts: tuple[str, ...]) -> str:
    """Why this user may not use a partition, as far as the partition says it."""

    def apart(key: str, mine: set[str]) -> bool:
        allowed = said.get(key, "ALL")
        return allowed != "ALL" and not mine & set(allowed.split(","))

    if said.get("State", "UP") != "UP":
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
    """The partitions for stages with and without GPUs: the site's default first, then one whose jobs are not preempted,
    then the largest that takes a job."""
    ranked = sorted(queues, key=lambda q: (q.is_default, not q.preempted, q.nodes * max(1, q.gpus)), reverse=True)
    usable = [q for q in ranked if not q.closed]
    gpu = _first_taken([q for q in usable if q.gpus], base, refused)
    without = [q for q in usable if not q.gpus]
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
    """Ways to ask for a node's GPUs, with a memory too where nothing is taken without."""
    counts = [str(queue.gpus), *(f"{kind}:{queue.gpus}" for kind in queue.gpu_types)]
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
    yield from (name for name, programs in CONTAINER_PROGRAMS.items() if any(map(shutil.which, programs)))


def _interfaces() -> Iterator[str]:
    """This node's network interfaces that are up; neither the loopback nor bridges and what is plugged into them."""
    for folder in sorted(Path("/sys/class/net").glob("*")):
        inner = folder.name == "lo" or (folder / "bridge").exists() or (folder / "brport").exists()
        with contextlib.suppress(OSError):
            if not inner and (folder / "operstate").read_text(encoding="utf-8").strip() == "up":
                yield folder.name
