"""Slurm's limits as its commands print them, and requests judged by them: without a Slurm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher import limits, slurm
from launcher.cluster import load_profile, place_record
from launcher.configs import Component, Resources
from launcher.errors import UserError
from launcher.limits import (
    Association,
    Bounds,
    Request,
    Site,
    parse_associations,
    parse_nodes,
    parse_partitions,
    parse_qos,
    parse_tres,
    refuse_impossible,
    request_problems,
)
from launcher.spec import Step
from tests.supervisor.counting import asking, counting_run

# As `scontrol show partition --oneliner` prints them (scontrol(1) of 22.05 and 24.05); the last has keys of 24.05.
PARTITIONS = """\
PartitionName=gpu AllowGroups=ALL AllowAccounts=phys,chem AllowQos=ALL AllocNodes=ALL Default=YES QoS=N/A \
DefaultTime=00:30:00 Hidden=NO MaxNodes=8 MaxTime=2-00:00:00 MinNodes=1 MaxCPUsPerNode=UNLIMITED Nodes=g[1-10] State=UP
PartitionName=debug AllowGroups=ALL DenyAccounts=guest AllowQos=short,debug Default=NO QoS=debug MaxNodes=UNLIMITED \
MaxTime=30:00 MinNodes=2 MaxCPUsPerNode=32 Nodes=g[1-10] State=DRAIN
PartitionName=long AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL Default=NO QoS=N/A MaxNodes=UNLIMITED \
MaxTime=UNLIMITED MinNodes=0 MaxCPUsPerNode=UNLIMITED MaxCPUsPerSocket=UNLIMITED Nodes=g[1-10] State=UP
"""
NODES = """\
gpu|g1|64|512000|gpu:a100:4(S:0-1)
gpu|g2|64|512000|gpu:a100:4(S:0-1),gpu:v100:2
gpu|c1|128|1024000|(null)
long|c1|128|1024000|(null)
"""


def test_partitions_are_read() -> None:
    found = parse_partitions(PARTITIONS)
    gpu, debug, long = found["gpu"], found["debug"], found["long"]
    assert (gpu.is_default, gpu.max_nodes, gpu.max_seconds, gpu.max_cpus) == (True, 8, 172800, None)
    assert gpu.allowed == {"account": {"phys", "chem"}} and gpu.denied == {} and gpu.qos is None
    assert (debug.state, debug.min_nodes, debug.max_cpus, debug.qos) == ("DRAIN", 2, 32, "debug")
    assert debug.allowed == {"qos": {"short", "debug"}} and debug.denied == {"account": {"guest"}}
    assert long.max_seconds is None and long.max_nodes is None


def test_nodes_are_read_with_their_gpus() -> None:
    found = parse_nodes(NODES + "half a line|g3\n")
    assert [n.gpus for n in found["gpu"]] == [{"": 4, "a100": 4}, {"": 6, "a100": 4, "v100": 2}, {"": 0}]
    assert [(n.cpus, n.memory_mb) for n in found["long"]] == [(128, 1024000)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("cpu=64,gres/gpu=8,mem=2T,node=4", {"cpu": 64, "gres/gpu": 8, "mem": 2 * 1024**2, "node": 4}),
        ("mem=1.50G", {"mem": 1536}),
        ("mem=200M,gres/gpu:a100=2", {"mem": 200, "gres/gpu:a100": 2}),
        ("", {}),
    ],
)
def test_counts_are_read(text: str, found: dict[str, float]) -> None:
    assert parse_tres(text) == found


def test_associations_and_qos_are_read() -> None:
    mine, account = parse_associations("phys|me|normal,short|1-00:00:00|node=4|\nphys||normal|||gres/gpu=16\n")
    assert mine == Association(
        "phys", "me", frozenset({"normal", "short"}), Bounds(86400, {"node": 4}, {}, frozenset({""}))
    )
    assert account.user == "" and account.bounds.group == {"gres/gpu": 16}
    qos = parse_qos(
        "normal||||gres/gpu=8|\nshort|00:30:00|cpu=32|gres/gpu=4|gres/gpu=2|DenyOnLimit,PartitionTimeLimit\n"
    )
    assert qos["normal"].group == {"gres/gpu": 8} and qos["normal"].max_seconds is None
    assert qos["short"].group == {"gres/gpu": 2}, "the tighter of the two"
    assert qos["short"].flags == {"DenyOnLimit", "PartitionTimeLimit"} and qos["short"].job == {"cpu": 32}


# ------------------------------------------------------------------------------------------------------------ judging

FITS = Request("gpu", nodes=2, cpus=16, memory_mb=1000, gpus=4, gpu_type=None, seconds=3600, account="phys", qos=None)
SITE = Site(
    partitions=parse_partitions(PARTITIONS),
    nodes=parse_nodes(NODES),
    associations=parse_associations("phys|me|normal,short|1-00:00:00|node=4|\nphys||normal|||gres/gpu=6\n"),
    qos=parse_qos("short|00:30:00|cpu=32||gres/gpu=2|\nfree|||||PartitionTimeLimit,PartitionMaxNodes\n"),
    enforced=frozenset({"associations", "limits", "qos"}),
)
ROOMY = replace(SITE, associations=(), enforced=frozenset())


def keys(site: Site = ROOMY, **changes: Any) -> list[str]:
    return [key for key, _ in request_problems(replace(FITS, **changes), site)]


def test_what_fits_has_no_problem() -> None:
    assert keys() == []
    assert keys(Site(), nodes=10**6) == [], "where Slurm says nothing, nothing is refused"


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"partition": "nowhere"}, ["partition"]),
        ({"partition": None}, []),
        ({"nodes": 9, "gpus": 0, "cpus": 1}, ["nodes", "nodes"]),
        ({"nodes": 3}, ["nodes"]),  # two nodes have four GPUs
        ({"nodes": 3, "gpus": 0}, []),
        ({"gpus": 5}, ["nodes"]),  # one node has six
        ({"gpus": 7}, ["gpus_per_node"]),
        ({"gpu_type": "v100", "gpus": 3}, ["gpus_per_node"]),
        ({"nodes": 2, "cpus": 100, "gpus": 1}, ["nodes"]),  # nobody has both
        ({"cpus": 129}, ["cpus_per_task"]),
        ({"memory_mb": 10**7}, ["mem"]),
        ({"seconds": 172801}, ["time"]),
        ({"account": "bio"}, ["account"]),
        ({"partition": "debug", "nodes": 1, "gpus": 0, "seconds": 60}, ["partition", "nodes"]),
        ({"partition": "debug", "seconds": 60, "account": "guest", "qos": "long"}, ["partition", "account", "qos"]),
    ],
)
def test_partitions_and_nodes_are_looked_at(changes: dict[str, Any], found: list[str]) -> None:
    assert keys(**changes) == found


def test_a_qos_may_lift_a_partitions_limits() -> None:
    assert keys(replace(SITE, enforced=frozenset()), seconds=10**6, qos="free") == []


def test_accounts_count_where_they_are_enforced() -> None:
    assert keys(SITE, nodes=1) == []
    assert keys(SITE) == ["gpus_per_node"], "eight GPUs, and the account has six: it would wait for ever"
    assert keys(SITE, account="other") == ["account", "account"], "neither the partition's nor the user's"
    assert keys(SITE, nodes=1, qos="gold") == ["qos"]
    assert keys(SITE, nodes=1, seconds=100_000) == ["time"]
    assert keys(SITE, nodes=1, gpus=1, cpus=40, seconds=2400, qos="short") == ["time", "cpus_per_task"]
    unlimited = replace(SITE, enforced=frozenset({"associations"}))
    assert keys(unlimited, seconds=100_000) == [], "limits that Slurm does not enforce are none"


# ------------------------------------------------------------------------------------------------------------- asking


def answering(monkeypatch: pytest.MonkeyPatch, answers: dict[tuple[str, ...], str]) -> list[tuple[str, ...]]:
    """Slurm's commands answer by their first words; those that are not listed do not answer. Returns the calls."""
    calls: list[tuple[str, ...]] = []

    def call(*argv: str, timeout: float = 10.0) -> slurm.Answer:
        calls.append(argv)
        found = [text for words, text in answers.items() if set(words) <= set(argv)]
        return slurm.Answer(0, found[0], "") if found else slurm.Answer(None, "", "did not answer in 10 s")

    monkeypatch.setattr(slurm, "call", call)
    return calls


def big_run(root: Path) -> Any:
    run = counting_run(("a", (), {}), ("b", (), {}))
    stages = tuple(replace(asking(s, Resources(nodes=99)), part_of="sweep") for s in run.stages)
    profile = replace(load_profile("example-pyxis"), partition="gpu", cpu_partition=None, account="phys")
    return place_record(replace(run, stages=stages), profile, root), profile


def test_a_controller_that_does_not_answer_is_no_reason_to_refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, profile = big_run(tmp_path)
    calls = answering(monkeypatch, {})
    refuse_impossible(tmp_path, [record], profile)
    assert [words[0] for words in calls] == ["squeue"], "nothing else is asked of a controller that is silent"


def test_without_accounting_partitions_are_looked_at_and_parts_are_one_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, profile = big_run(tmp_path)
    config = "AccountingStorageEnforce = none\nClusterName             = here\n"
    answering(monkeypatch, {("scontrol", "config"): config, ("scontrol", "partition"): PARTITIONS, ("squeue",): ""})
    with pytest.raises(UserError) as caught:
        refuse_impossible(tmp_path, [record], profile)
    assert caught.value.problems == (
        "stages.sweep.resources.nodes: asks for 99 nodes, but partition gpu allows 8 a job",
    )


def test_nodes_of_components_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one allocation with the main program's; as a part of a heterogeneous job by themselves."""
    record, profile = big_run(tmp_path)
    shared = Resources(nodes=7, components={"server": Component(nodes=2)})
    server = Step("server", ("true",), role="server", nodes=2, first_node=7)
    apart = replace(shared, components={"server": Component(nodes=9)}, placement="heterogeneous")
    first, second = (replace(s, part_of=None) for s in record.stages)
    stages = (asking(first, shared, server), asking(second, apart, replace(server, nodes=9, first_node=0, het_group=1)))
    config = "ClusterName = here\n"
    answering(monkeypatch, {("scontrol", "config"): config, ("scontrol", "partition"): PARTITIONS, ("squeue",): ""})
    with pytest.raises(UserError) as caught:
        refuse_impossible(tmp_path, [replace(record, stages=stages)], profile)
    assert caught.value.problems == (
        "stages.a.resources.nodes: asks for 9 nodes, but partition gpu allows 8 a job",
        "stages.b.resources.components.server.nodes: asks for 9 nodes, but partition gpu allows 8 a job",
    )


def test_a_type_of_gpu_may_start_with_a_digit() -> None:
    found = limits._gpus("gpu:3090:2(S:0-1),gpu:a100:4,shard:8")
    assert found == {"": 6, "3090": 2, "a100": 4}
