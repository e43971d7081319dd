"""What a job left, and the checks and mends that follow."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.site.all_reduce import read_nccl
from launcher.site.judge import Check, judge
from launcher.site.trial import Outcome, Trial

ASKED = {"nodes": 2, "gpus": 8, "paths": ["+/root", "/code"], "root": "/root", "interfaces": {}}
PYTHON = ["/usr/bin/python3", "3.12.1"]


def node(number: int) -> dict[str, Any]:
    pair = {"sees_first_after_s": 0.1, "seen_by_first_after_s": 3.2, "tcp_gbit_s": 22.5, "address": f"10.0.0.{number}"}
    return {
        "node": f"n{number}",
        "python": PYTHON,
        "machine": "x86_64",
        "gpus": {"shown": 8, "real": ["H100"] * 8, "driver": "580.1", "error": ""},
        "paths": {"+/root": "", "/code": ""},
        "filesystem": "lustre",
        "interfaces": [{"name": "ib0", "address": f"10.0.0.{number}", "mbit": 400_000}],
        "infiniband": ["mlx5_0"],
        "memlock": -1,
        "pair": pair if number else {"absent": []},
    }


def left() -> dict[str, Any]:
    """A test that went well: lives and reports."""
    versions = {name: {"version": "1"} for name in ("torch", "megatron.core", "transformer_engine", "mamba_ssm")}
    life = {
        "python": PYTHON,
        "steps": {name: {"code": 0, "said": ""} for name in ("nodes", "imports-train", "all-reduce", "signals")},
        "batch_signal": {"delay_s": 0.2, "said": ""},
        "step_signals": {name: {"deaf": [], "delay_s": 0.1} for name in ("SIGUSR2", "SIGTERM")},
        "sbatch": "",
        "examined": 100.0,
        "requeue": "asked",
    }
    reduced = {"backend": "nccl", "ranks": 16, "bytes": 2**30, "right": True, "bus_gb_s": 301.0}
    return {
        "lives": [life, {"began": 112.0, "ended": True}],
        "reports": {
            "nodes.0": node(0),
            "nodes.1": node(1),
            "imports-train.0": {"kernels": versions},
            "all-reduce.0": reduced,
        },
        "asked": dict(ASKED),
        "state": "COMPLETED",
        "log": "",
    }


def checks(found: dict[str, Any]) -> dict[str, Check]:
    trial = Trial(Path("/root/runs/x"), "7", found["asked"])
    outcome = Outcome(trial, found["state"], "", found["log"], tuple(found["lives"]), found["reports"])
    return {check.name: check for check in judge(outcome)}


def failures(found: dict[str, Any]) -> dict[str, Check]:
    return {name: check for name, check in checks(found).items() if check.result == "fail"}


IB = """\
g1:410:410 [0] NCCL INFO Bootstrap: Using ib0:10.1.0.1<0>
g1:410:433 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/IB [RO]; OOB ib0:10.1.0.1<0>
g1:410:433 [0] NCCL INFO Using network IB
g1:410:440 [0] NCCL INFO Channel 00/0 : 15[7] -> 0[0] [receive] via NET/IB/0(8)/GDRDMA
g1:410:440 [0] NCCL INFO Channel 01/0 : 0[0] -> 8[0] [send] via NET/IB/1/GDRDMA
g1:410:440 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM/read
"""
TCP = """\
g1:410:433 [0] NCCL INFO NET/IB : No device found.
g1:410:433 [0] NCCL INFO NET/Socket : Using [0]eth0:10.0.0.1<0> [1]eth1:10.0.1.1<0>
g1:410:433 [0] NCCL INFO Using network Socket
g1:410:440 [0] NCCL INFO Channel 00/0 : 0[0] -> 8[0] [send] via NET/Socket/0
g1:410:440 [0] NCCL INFO Channel 00 : 0[0] -> 1[1] via SHM/direct/direct
"""
NEWER = """\
g1:1:9 [0] NCCL INFO NET/IB : Using [0]{0} mlx5_2:1/RoCE [1]{1} mlx5_3:1/RoCE [RO]; OOB bond0:10.1.0.1<0>
g1:1:9 [0] NCCL INFO Assigned NET plugin IB to comm
"""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (IB, {"network": "IB", "devices": ["mlx5_0", "mlx5_1"], "via": ["NET/IB/GDRDMA", "P2P/CUMEM/read"]}),
        (TCP, {"network": "Socket", "devices": ["eth0", "eth1"], "via": ["NET/Socket", "SHM/direct/direct"]}),
        (NEWER, {"network": "IB", "devices": ["mlx5_2", "mlx5_3"], "via": []}),
        ("x NCCL INFO Using network AWS Libfabric\n", {"network": "AWS Libfabric", "devices": [], "via": []}),
        ("nothing of NCCL's", {"network": "", "devices": [], "via": []}),
    ],
)
def test_the_transport_in_nccls_words(text: str, found: dict[str, Any]) -> None:
    assert read_nccl(text) == found


def test_the_transport_that_nccl_chose_is_shown() -> None:
    found = left()
    found["reports"]["all-reduce.0"]["nccl"] = read_nccl(IB)
    chosen = checks(found)["NCCL's network"]
    assert (chosen.result, chosen.found) == (
        "pass",
        "IB over mlx5_0, mlx5_1; channels by NET/IB/GDRDMA, P2P/CUMEM/read",
    )
    found["reports"]["all-reduce.0"]["nccl"] = read_nccl(TCP)
    for name in ("nodes.0", "nodes.1"):
        found["reports"][name]["infiniband"] = ["mlx5_0"]
    slow = checks(found)["NCCL's network"]
    assert slow.result == "fail" and "the nodes have mlx5_0" in slow.found and "MELLANOX_VISIBLE_DEVICES" in slow.mend
    for name in ("nodes.0", "nodes.1"):
        found["reports"][name]["infiniband"] = []
    assert checks(found)["NCCL's network"].result == "note"


def test_all_is_well() -> None:
    found = checks(left())
    assert {c.result for c in found.values()} == {"pass"} and not any(c.mend for c in found.values())
    assert "within 3.20 s" in found["files across nodes"].found
    assert "22.5 Gbit/s by one TCP stream over ib0; there: ib0 (400G)" in found["network"].found
    assert "301.00 GB/s on the bus, torch nccl, 16 ranks" in found["all-reduce"].found
    assert "after 12.0 s" in found["requeue"].found and "driver 580.1, H100" in found["architecture"].found


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(found: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        here: Any = found
        for key in parents:
            here = here[int(key)] if isinstance(here, list) else here[key]
        here[last] = value

    return apply


BROKEN = {"version": "2"} | {"error": "ImportError: undefined symbol"}


@pytest.mark.parametrize(
    ("what", "name", "said", "mend"),
    [
        (
            change("reports/nodes.1/paths", {"+/root": "not writable"}),
            "root and mounts",
            "/root is not writable on n1",
            "--root",
        ),
        (change("reports/nodes.1/pair/sees_first_after_s", None), "files across nodes", "not seen", "--root"),
        (change("reports/nodes.1/gpus/shown", 4), "GPUs", "8 asked, 4 in CUDA", "gpu_request"),
        (change("reports/nodes.0/gpus/real", ["H100"] * 7), "GPUs", "8 asked, 7 by nvidia-smi", "gpu_request"),
        (change("reports/nodes.0/gpus", {"shown": None, "real": None}), "GPUs", "none seen", "gpu_request"),
        (change("reports/nodes.0/gpus/error", "has failed"), "GPUs", "n0: nvidia-smi: has failed", "gpu_request"),
        (change("reports/nodes.1/pair", {"error": "n0:1: timed out"}), "network", "timed out", "NCCL_SOCKET_IFNAME"),
        (change("reports/nodes.1/memlock", 65536), "locked memory", "n1", "memlock"),
        (change("asked/interfaces", {"NCCL_SOCKET_IFNAME": "eth"}), "NCCL_SOCKET_IFNAME", "there: ib0", "env."),
        (change("reports/all-reduce.0/right", False), "all-reduce", "wrong sums", "NCCL"),
        (
            change("lives/0/steps/all-reduce", {"code": 1, "said": "Socket timeout"}),
            "all-reduce",
            "Socket timeout",
            "NCCL",
        ),
        (change("reports/imports-train.0/kernels/mamba_ssm", BROKEN), "imports, images.train", "undefined", "rebuild"),
        (
            change("reports/imports-train.0/kernels/torch", {"absent": True}),
            "imports, images.train",
            "absent: torch",
            "images",
        ),
        (change("lives/0/batch_signal/delay_s", None), "USR2 to the batch step", "not heard", "setup"),
        (change("lives/0/step_signals/SIGTERM/deaf", [1]), "TERM to a step", "rank [1]", "runtime.container"),
        (change("lives/0/requeue", "Requested operation is presently disabled"), "requeue", "disabled", "chain"),
        (change("lives", left()["lives"][:1]), "requeue", "no second life", "chain"),
    ],
)
def test_each_failure_names_its_mend(what: Any, name: str, said: str, mend: str) -> None:
    found = copy.deepcopy(left())
    what(found)
    failed = failures(found)
    assert list(failed) == [name]
    assert said in failed[name].found and mend in failed[name].mend


@pytest.mark.parametrize(
    ("step", "said", "mend"),
    [
        ("nodes", "srun: error: task 1 launch failed: Slurmd could not connect IO", "--root"),
        ("nodes", "env: '/x/python': No such file or directory", "python: "),
        ("nodes", "/usr/bin/python3: No module named 'launcher'", "code: "),
        ("nodes", "prism-launch: /usr/bin/python is Python 3.8.1; 3.10 or newer is needed", "python: "),
        ("imports-train", "pyxis: failed to import docker image", "images"),
    ],
)
def test_a_step_that_does_not_start(step: str, said: str, mend: str) -> None:
    found = left()
    found["lives"][0]["steps"][step] = {"code": 1, "said": said}
    failed = failures(found)[f"step {step}"]
    assert said in failed.found and mend in failed.mend


@pytest.mark.parametrize(
    ("log", "name", "mend"),
    [
        ("", "root", "--root"),
        ("/spool/slurm_script: line 90: cd: /root/runs: No such file or directory", "root", "--root"),
        ("/spool/slurm_script: line 9: /x/python: No such file or directory", "interpreter", "host_python"),
        ("/spool/slurm_script: line 9: exec: python9: not found", "interpreter", "host_python"),
        ("prism-launch: /usr/bin/python3 is Python 3.6.8; 3.10 or newer is needed", "interpreter", "host_python"),
        ("/usr/bin/python3: Error while finding module ... No module named 'launcher'", "launcher importable", "code"),
        ("Lmod has detected an error: no module cuda", "start", "setup"),
    ],
)
def test_a_job_that_never_began(log: str, name: str, mend: str) -> None:
    found = {**left(), "lives": [], "reports": {}, "state": "FAILED", "log": log}
    (check,) = checks(found).values()
    assert (check.name, check.result) == (name, "fail") and mend in check.mend


def test_a_job_that_ended_early_fails_with_what_is_known() -> None:
    found = left()
    life = found["lives"][0]
    for key in ("examined", "requeue", "sbatch", "step_signals", "batch_signal"):
        del life[key]
    found |= {
        "lives": [life],
        "state": "TIMEOUT",
        "log": "slurmstepd: error: *** JOB 7 CANCELLED DUE TO TIME LIMIT ***",
    }
    failed = failures(found)
    assert "TIME LIMIT" in failed["the job"].found and "requeue" in failed
    assert checks(found)["network"].result == "pass"


def test_one_node_alone_is_no_failure() -> None:
    found = left()
    found["asked"]["nodes"] = 1
    del found["reports"]["nodes.1"], found["reports"]["all-reduce.0"], found["lives"][0]["steps"]["all-reduce"]
    assert not failures(found)
    assert {n for n, c in checks(found).items() if c.result == "note"} == {"network", "all-reduce"}


def test_a_rank_that_left_no_word() -> None:
    found = left()
    del found["reports"]["nodes.1"]
    assert "rank 1 left no word" in failures(found)["root and mounts"].found
