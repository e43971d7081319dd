"""What a test job left, as checks: passed, failed with the mend, or worth knowing. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from launcher.site.trial import Outcome
from launcher.units import format_duration

#: Below this, registering memory for InfiniBand fails.
_MEMLOCK = 16 * 2**30
_NEEDED = ("torch", "megatron.core")


@dataclass(frozen=True)
class Check:
    """One thing looked at. `mend` says which key of the profile to set; `note`: no failure, but worth knowing."""

    name: str
    result: Literal["pass", "fail", "note"]
    found: str
    mend: str = ""


def judge(outcome: Outcome) -> list[Check]:
    """Every check, in the order in which they build on one another."""
    first = next((life for life in outcome.lives if "steps" in life), None)
    if first is None:
        return [_not_begun(outcome)]
    nodes = _of(outcome, "nodes")
    checks = [*_begun(outcome, first), *_steps(first)]
    if nodes:
        checks += [*_files(outcome, nodes), *_hardware(outcome, nodes), *_network(outcome, nodes)]
    checks += [*_all_reduce(outcome, first), *_imports(outcome), *_signals(first), _requeue(outcome, first)]
    return [*checks, _from_nodes(first), *_unfinished(outcome, first)]


def _of(outcome: Outcome, step: str) -> dict[int, Mapping[str, Any]]:
    """A step's reports by rank."""
    named = {name: r for name, r in outcome.reports.items() if name.rpartition(".")[0] == step}
    return {int(name.rpartition(".")[2]): report for name, report in sorted(named.items())}


# --------------------------------------------------------------------------------------------------------- beginning


def _not_begun(outcome: Outcome) -> Check:
    """Why the batch step did not get as far as to write down that it runs, from the job's log."""
    log = outcome.log.strip()
    last = log.splitlines()[-1] if log else ""
    found = f"job {outcome.trial.job} ended {outcome.state}: {last}"
    if "3.10 or newer" in log:
        return Check("interpreter", "fail", last, "host_python: name a Python of at least 3.10 on the nodes")
    if re.search(r"No module named '?launcher", log):
        mend = "code: a folder with this version's `launcher` that every node sees; or install it for host_python"
        return Check("launcher importable", "fail", found, mend)
    if not log or re.search(r"line \d+: cd: ", log):
        root = outcome.trial.asked["root"]
        found = f"job {outcome.trial.job} ended {outcome.state} and left no word in {root}: its node does not see that"
        return Check("root", "fail", found, "choose a --root on a file system that every node sees and may write")
    if re.search(r"line \d+: .*: (No such file or directory|Permission denied|not found|cannot execute)", log):
        mend = "host_python (else python): the full path of a Python 3.10 or newer, as the nodes see it"
        return Check("interpreter", "fail", found, mend)
    return Check("start", "fail", found, f"read {outcome.trial.folder}; see setup, env, runtime")


def _begun(outcome: Outcome, life: Mapping[str, Any]) -> Iterator[Check]:
    host = f"Python {life['python'][1]}, {life['python'][0]}"
    inside = {f"Python {version}, {path}" for path, version in (r["python"] for r in _of(outcome, "nodes").values())}
    same = inside <= {host}
    found = host if same else f"batch step: {host}\nworkers: {'; '.join(sorted(inside))}"
    yield Check("interpreter", "pass", found)
    if inside:
        yield Check(
            "launcher importable", "pass", f"in the batch step and in the workers of {len(_of(outcome, 'nodes'))} nodes"
        )


_REASONS = (
    (
        r"No module named '?launcher",
        "code: a folder with the `launcher` package that every node and image sees",
    ),
    (
        r"execve\(\)|executable file not found|can not execute|cannot execute|No such file or directory",
        "python: the interpreter inside the image (or on the node), or images: one that has it",
    ),
    (r"could not open|couldn't chdir|Unable to open|could not connect IO", "choose a --root that every node sees"),
    (r"3\.10 or newer", "python: name a Python of at least 3.10"),
    (r"mpi|pmix|PMI", "runtime.mpi: none"),
    (r"import.*image|container|pyxis|FATAL", "images, mounts and runtime.container: the container did not start"),
)


def _steps(life: Mapping[str, Any]) -> Iterator[Check]:
    """Steps that ended badly, those for the same reason at once; the all-reduce and the signals tell for themselves."""
    alike: dict[tuple[str, str], list[str]] = {}
    for name, end in life["steps"].items():
        if end["code"] != 0 and name not in ("all-reduce", "signals"):
            said = str(end["said"])
            mend = next((mend for pattern, mend in _REASONS if re.search(pattern, said, re.I)), "read the step's log")
            lines = list(dict.fromkeys(line for line in said.splitlines() if line.strip()))
            code = f"exit code {end['code']}" if isinstance(end["code"], int) else str(end["code"])
            alike.setdefault((mend, "\n".join([code, *lines[-3:]])), []).append(name)
    for (mend, found), names in alike.items():
        yield Check(f"step{'' if len(names) == 1 else 's'} {', '.join(names)}", "fail", found, mend)


# ------------------------------------------------------------------------------------------------------ files, nodes


def _files(outcome: Outcome, nodes: Mapping[int, Mapping[str, Any]]) -> Iterator[Check]:
    asked = outcome.trial.asked
    bad = [
        f"{path.removeprefix('+')} is {what} on {report['node']}"
        for report in nodes.values()
        for path, what in report["paths"].items()
        if what
    ]
    missing = [str(rank) for rank in range(asked["nodes"]) if rank not in nodes]
    if missing:
        bad.append(f"rank {', '.join(missing)} left no word: its node does not see the root, or it did not start")
    kinds = ", ".join(sorted({str(r["filesystem"]) for r in nodes.values()}))
    mend = "choose a --root, and set code and mounts to folders, that every node sees"
    seen = f"root{', code' if len(asked['paths']) > 1 else ''} seen on each node ({kinds})"
    yield Check("root and mounts", "fail" if bad else "pass", "; ".join(bad) or seen, mend if bad else "")
    pairs = [(r["node"], r["pair"]) for r in nodes.values() if "sees_first_after_s" in r.get("pair", {})]
    delays = [p[key] for _, p in pairs for key in ("sees_first_after_s", "seen_by_first_after_s")]
    if not delays:
        return
    never = [node for node, p in pairs if None in (p["sees_first_after_s"], p["seen_by_first_after_s"])]
    if never:
        found = f"files of the first node and of {', '.join(never)} are not seen by each other within 90 s"
        yield Check("files across nodes", "fail", found, mend)
        return
    yield Check("files across nodes", "pass", f"what one node writes, another sees within {_seconds(max(delays))}")


def _hardware(outcome: Outcome, nodes: Mapping[int, Mapping[str, Any]]) -> Iterator[Check]:
    kinds = sorted({_kind(r) for r in nodes.values()})
    if len(kinds) > 1:
        mend = "constraint: features that name one kind of node"
        yield Check("architecture", "note", f"nodes differ: {'; '.join(kinds)}", mend)
    else:
        yield Check("architecture", "pass", kinds[0])
    asked = outcome.trial.asked["gpus"]
    if not asked:
        yield Check("GPUs", "note", "none asked: the partition has none, or the profile does not say")
        return
    wrong = [f"{r['node']}: {problem}" for r in nodes.values() if (problem := _gpu_problem(r["gpus"], asked))]
    if wrong:
        mend = "gpu_request, gpu_type, partitions: as sinfo -o '%P %G' says; without cgroups Slurm hides none"
        yield Check("GPUs", "fail", "; ".join(wrong), mend)
        return
    driver = "" if all(r["gpus"]["real"] for r in nodes.values()) else "; no driver, so nothing behind them was seen"
    yield Check("GPUs", "pass", f"{asked} asked and seen on each node{driver}")


def _kind(report: Mapping[str, Any]) -> str:
    gpus = report["gpus"]
    driver = f"driver {gpus['driver']}" if gpus.get("driver") else "no GPU driver"
    return ", ".join([report["machine"], driver, *sorted(set(gpus["real"] or ()))])


def _gpu_problem(gpus: Mapping[str, Any], asked: int) -> str:
    real = gpus["real"]
    if gpus.get("error"):
        return f"nvidia-smi: {gpus['error']}"
    if gpus["shown"] is not None and gpus["shown"] != asked:
        return f"{asked} asked, {gpus['shown']} in CUDA_VISIBLE_DEVICES"
    if real is not None and len(real) < asked:
        return f"{asked} asked, {len(real)} by nvidia-smi"
    if real is None and gpus["shown"] is None:
        return f"{asked} asked, none seen: no nvidia-smi, CUDA_VISIBLE_DEVICES is not set"
    return ""


def _network(outcome: Outcome, nodes: Mapping[int, Mapping[str, Any]]) -> Iterator[Check]:
    limited = [r["node"] for r in nodes.values() if r["infiniband"] and 0 <= r["memlock"] < _MEMLOCK]
    if limited:
        mend = "ask the site for an unlimited memlock in jobs"
        yield Check("locked memory", "fail", f"under 16 GiB on {', '.join(limited)}, with InfiniBand there", mend)
    shown, asked_nodes = _interfaces(nodes), outcome.trial.asked["nodes"]
    for variable, pattern in outcome.trial.asked.get("interfaces", {}).items():
        without = [r["node"] for r in nodes.values() if not any(_fits(i["name"], pattern) for i in r["interfaces"])]
        if without:
            found = f"{pattern} fits no interface of {', '.join(without)}; there: {shown}"
            yield Check(variable, "fail", found, f"env.{variable}: one of those")
    pairs = {r["node"]: r.get("pair", {}) for r in nodes.values()}
    if asked_nodes == 1:
        yield Check("network", "note", f"one node alone; there: {shown}")
        return
    if len(nodes) < 2:
        yield Check("network", "note", f"not tried: not all nodes started; there: {shown}")
        return
    errors = [f"{node}: {pair['error']}" for node, pair in pairs.items() if "error" in pair]
    if errors:
        mend = "env: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME; ask whether nodes may open ports to each other"
        yield Check("network", "fail", f"no TCP between the nodes: {'; '.join(errors)}; there: {shown}", mend)
        return
    rates = [pair["tcp_gbit_s"] for pair in pairs.values() if "tcp_gbit_s" in pair]
    used = sorted({_interface(r) for r in nodes.values() if "address" in r.get("pair", {})})
    found = f"{min(rates, default=0):.1f} Gbit/s by one TCP stream over {', '.join(used)}; there: {shown}"
    yield Check("network", "pass", found)


def _interfaces(nodes: Mapping[int, Mapping[str, Any]]) -> str:
    """The interfaces of the nodes, said once where all have the same."""
    by_list: dict[str, list[str]] = {}
    for report in nodes.values():
        names = [i["name"] + (f" ({i['mbit'] // 1000}G)" if i["mbit"] else "") for i in report["interfaces"]]
        by_list.setdefault(", ".join(names) or "none", []).append(report["node"])
    if len(by_list) == 1:
        return next(iter(by_list))
    return "; ".join(f"{names} on {', '.join(where)}" for names, where in by_list.items())


def _fits(interface: str, pattern: str) -> bool:
    """Whether an interface is meant by NCCL_SOCKET_IFNAME: prefixes, `=` exact names, `^` all but these prefixes."""
    words = pattern.lstrip("^=").split(",")
    if pattern.startswith("="):
        return interface in words
    return any(interface.startswith(w) for w in words) is not pattern.startswith("^")


def _interface(report: Mapping[str, Any]) -> str:
    address = report["pair"]["address"]
    return next((str(i["name"]) for i in report["interfaces"] if i["address"] == address), str(address))


# ------------------------------------------------------------------------------------------------------------ programs


def _all_reduce(outcome: Outcome, life: Mapping[str, Any]) -> Iterator[Check]:
    report = _of(outcome, "all-reduce").get(0)
    end = life["steps"].get("all-reduce")
    mend = "env: NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME or NCCL_IB_HCA: the network between the nodes"
    if end is None and outcome.trial.asked["nodes"] == 1:
        yield Check("all-reduce", "note", "not tried: one rank alone")
    elif end is None and life["steps"]["nodes"]["code"] != 0:
        yield Check("all-reduce", "note", "not tried: not all nodes started")
    elif end is None:
        yield Check("all-reduce", "note", "not tried: no torch to import; the TCP stream is all that was measured")
    elif report is None or end["code"] != 0:
        said = str(end["said"]).splitlines()[-3:]
        yield Check("all-reduce", "fail", "\n".join([f"exit code {end['code']}", *said]), mend)
    elif not report["right"]:
        yield Check("all-reduce", "fail", f"wrong sums by {report['backend']}", mend)
    else:
        size, ranks = report["bytes"] // 2**20, report["ranks"]
        found = f"{report['bus_gb_s']:.2f} GB/s on the bus, torch {report['backend']}, {ranks} ranks, {size} MiB"
        yield Check("all-reduce", "pass", found)
        yield from _transport(outcome, report.get("nccl", {}))


def _transport(outcome: Outcome, nccl: Mapping[str, Any]) -> Iterator[Check]:
    """The way that NCCL chose; TCP between nodes that have InfiniBand is ten times slower, and no error."""
    if not nccl.get("network") and not nccl.get("via"):
        return
    over = f" over {', '.join(nccl['devices'])}" if nccl["devices"] else ""
    ways = f"; channels by {', '.join(nccl['via'])}" if nccl["via"] else ""
    found = f"{nccl['network'] or 'none'}{over}{ways}"
    fabric = sorted({name for report in _of(outcome, "nodes").values() for name in report["infiniband"]})
    by_tcp = nccl["network"] == "Socket" and outcome.trial.asked["nodes"] > 1
    if by_tcp and fabric:
        mend = "env.MELLANOX_VISIBLE_DEVICES: all, for pyxis; else NCCL_IB_HCA, and /dev/infiniband in the container"
        yield Check("NCCL's network", "fail", f"{found}; the nodes have {', '.join(fabric)}", mend)
    else:
        yield Check("NCCL's network", "note" if by_tcp else "pass", found)


def _imports(outcome: Outcome) -> Iterator[Check]:
    for name in sorted({n.rpartition(".")[0] for n in outcome.reports if n.startswith("imports-")}):
        kernels = _of(outcome, name)[0]["kernels"]
        kind = name.removeprefix("imports-")
        where = "the nodes" if kind == "host" else f"images.{kind}"
        broken = [f"{k}: {v['error']}" for k, v in kernels.items() if "error" in v]
        absent = [k for k, v in kernels.items() if v.get("absent")]
        there = ", ".join(f"{k} {v['version']}" for k, v in kernels.items() if "version" in v) or "none"
        trains = kind in ("host", "train")
        found = there + (f"; absent: {', '.join(absent)}" if absent else "")
        target = "python" if kind == "host" else f"images.{kind}"
        mend = f"{target}: an environment with torch and megatron-core, as containers/train/Dockerfile installs them"
        if broken:
            yield Check(f"imports, {where}", "fail", "\n".join(broken), f"{target}: rebuild these against its torch")
        elif trains and set(_NEEDED) & set(absent):
            yield Check(f"imports, {where}", "fail", found, mend)
        else:
            yield Check(f"imports, {where}", "note" if absent and trains else "pass", found)


# ------------------------------------------------------------------------------------------------------------- Slurm


def _signals(life: Mapping[str, Any]) -> Iterator[Check]:
    batch = life.get("batch_signal")
    if batch is not None:
        heard = batch["delay_s"] is not None
        mend = "setup: it must not leave a shell in front; without USR2 nothing is saved at the time limit"
        found = f"heard within {_seconds(batch['delay_s'])}" if heard else f"not heard in 15 s {batch['said']}".strip()
        yield Check("USR2 to the batch step", "pass" if heard else "fail", found, "" if heard else mend)
    told = life.get("step_signals", {})
    for name, arrivals in ((name, told[name]) for name in ("SIGUSR2", "SIGTERM") if name in told):
        deaf, delay = arrivals["deaf"], arrivals["delay_s"]
        mend = "runtime.container: this one keeps signals from its processes, so nothing is saved at the time limit"
        found = f"heard by every rank within {_seconds(delay or 0)}" if not deaf else f"not heard by rank {deaf}"
        short = name.removeprefix("SIG")
        yield Check(f"{short} to a step", "fail" if deaf else "pass", found, mend if deaf else "")
    if "step_signals" not in life and "examined" in life:
        yield Check("USR2 to a step", "note", "not tried: not all nodes started")


def _requeue(outcome: Outcome, life: Mapping[str, Any]) -> Check:
    asked = life.get("requeue")
    if asked is None:
        return Check("requeue", "fail", "not tried: the job ended before", "see the failures above")
    if asked != "asked":
        return Check("requeue", "fail", f"refused: {asked}", "limits.continuation: chain")
    if not outcome.ended:
        why = f"asked and not refused, but no second life: {outcome.state}, {outcome.reason}"
        return Check("requeue", "fail", why, "limits.continuation: chain, or ask the site")
    waited = outcome.lives[-1]["began"] - life["examined"]
    return Check("requeue", "pass", f"done once: the job's second life began after {format_duration(waited)}")


def _seconds(delay: float) -> str:
    return f"{max(delay, 0.01):.2f} s"


def _from_nodes(life: Mapping[str, Any]) -> Check:
    said = life.get("sbatch")
    if said is None:
        return Check("sbatch on the nodes", "note", "not tried")
    if said:
        found = f"not possible: {said.splitlines()[-1]}; runs go on from the login node alone"
        return Check("sbatch on the nodes", "note", found)
    return Check("sbatch on the nodes", "pass", "would be taken")


def _unfinished(outcome: Outcome, life: Mapping[str, Any]) -> Iterator[Check]:
    if "examined" not in life:
        last = outcome.log.strip().splitlines()[-1:] or ["no word in its log"]
        yield Check("the job", "fail", f"ended early: {outcome.state}, {last[0]}", f"read {outcome.trial.folder}")
