"""A value that Slurm reads as a list is looked up name by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from launcher.cluster import check_resources, load_profile
from launcher.configs import Resources
from launcher.errors import UserError
from launcher.limits import (
    Request,
    Site,
    parse_associations,
    parse_nodes,
    parse_partitions,
    parse_qos,
    request_problems,
    waits_because,
)
from launcher.submit import submit_run
from tests.faults.slurm_stand_in import StandIn
from tests.supervisor.counting import counting_run

PARTITIONS = """\
PartitionName=small Default=YES MaxNodes=2 MaxTime=1:00:00 MinNodes=1 State=UP
PartitionName=large Default=NO MaxNodes=8 MaxTime=4:00:00 MinNodes=3 AllowQos=long,normal State=UP
PartitionName=shut Default=NO MaxNodes=8 MaxTime=4:00:00 MinNodes=1 State=DOWN
"""
NODES = "".join(f"{p}|n{i}|64|200000|gpu:a100:4|idle\n" for p in ("small", "large", "shut") for i in range(8))
SITE = Site(
    parse_partitions(PARTITIONS),
    parse_nodes(NODES),
    parse_associations("phys|me|normal,long|||\n"),
    parse_qos("normal|00:30:00||||\nlong|2-00:00:00|node=4|||PartitionTimeLimit\n"),
    frozenset({"associations", "limits", "qos"}),
)
ASKED = Request("small", 1, 8, 1000, 0, None, 600, None, None)


def said(**changes: object) -> list[tuple[str, str]]:
    return list(request_problems(replace(ASKED, **changes), SITE))


def test_one_partition_that_would_start_it_is_enough() -> None:
    assert said(partition="small,large") == said(partition="large,small") == []
    assert said(partition="small,large", nodes=8, seconds=7200) == []
    assert said(partition="small", nodes=8) != []


def test_where_there_is_none_each_says_why_not() -> None:
    assert said(partition="small,large", nodes=9, gpus=5) == [
        ("nodes", "asks for 9 nodes, but partition small allows 2 a job"),
        ("gpus_per_node", "asks for 5 GPUs on a node, but no node of partition small has more than 4"),
        ("nodes", "asks for 9 nodes, but partition large allows 8 a job"),
        ("gpus_per_node", "asks for 5 GPUs on a node, but no node of partition large has more than 4"),
    ]


def test_slurm_refuses_a_list_for_one_name_that_it_does_not_know() -> None:
    assert [(key, message[:43]) for key, message in said(partition="small,larg,x")] == [
        ("partition", "Slurm has no partition larg, did you mean l"),
        ("partition", "Slurm has no partition x; there is small, l"),
    ]


def test_qos_lists_are_alternatives_too() -> None:
    assert said(qos="normal,long", seconds=3000) == []
    assert said(partition="large", nodes=3, qos="gold,long", seconds=10**5) == [], "long lifts the partition's limit"
    assert said(qos="normal,gold", seconds=3000) == [
        ("time", "50 min 00 s is beyond the 30 min 00 s of QOS normal"),
        ("qos", "account phys may not use QOS gold; it has long, normal"),
    ]


def test_a_list_waits_only_where_all_of_it_does() -> None:
    assert waits_because(replace(ASKED, partition="shut"), SITE) == "partition shut is DOWN"
    assert waits_because(replace(ASKED, partition="shut,small"), SITE) is None


def profile(tmp_path: Path, text: str) -> str:
    (tmp_path / "site.yaml").write_text(f"scheduler: slurm\ncpu_partition: a,b\n{text}")
    return str(tmp_path / "site.yaml")


LIMITS = "partitions: {a: {max_nodes: 2, max_time: '60'}, b: {max_nodes: 4, max_time: '30'}}\n"


@pytest.mark.parametrize(
    ("resources", "found"),
    [
        (Resources(nodes=4), []),
        (Resources(nodes=2, time="40"), []),
        (Resources(partition="b", time="40"), ["time: 40 is beyond the 30 of partition b"]),
        (
            Resources(nodes=4, time="40"),
            ["nodes: asks for 4 nodes, but partition a", "time: 40 is beyond the 30 of partition b"],
        ),
        (Resources(partition="b,c"), ["partition: no partition c; cluster site has a, b"]),
    ],
)
def test_a_profiles_own_limits(tmp_path: Path, resources: Resources, found: list[str]) -> None:
    site = load_profile(profile(tmp_path, f"partition: b,a\ntime: '20'\n{LIMITS}"))
    spec = counting_run(("a", (), {})).stages[0].spec
    problems = [f"{key}: {message}" for key, message in check_resources(resources, spec, site)]
    assert len(problems) == len(found)
    assert all(problem.startswith(start) for problem, start in zip(problems, found, strict=True))


def test_a_profile_names_each_partition_of_a_list(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"partition: c is not under partitions"):
        load_profile(profile(tmp_path, f"partition: b,c\n{LIMITS}"))


def test_no_blank_stands_beside_a_comma_in_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`check` reads names between commas; sbatch refuses `--partition='batch, low'`."""
    site = StandIn(tmp_path, monkeypatch)
    lists = 'partition: "batch, low "\nqos: "long ,normal"\nsbatch: {reservation: "r1, r2", comment: "one, two"}\n'
    site.site.write_text(site.site.read_text() + lists)
    submit_run(site.root, site.plan(), site.profile)
    options = [line.partition(" --")[2] for line in Path(site.script("a")).read_text().splitlines()]
    expected = {"partition=batch,low", "qos=long,normal", "reservation=r1,r2", "comment='one, two'"}
    assert expected <= set(options)
