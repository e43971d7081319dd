"""What a real Slurm would never start is refused with reasons before anything is queued."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from on_slurm import shown, state, submit, until
from test_submit import OnSlurm, on

from launcher.configs import Resources
from launcher.errors import UserError
from launcher.limits import read_site, refuse_impossible
from launcher.run_record import RunRecord
from launcher.submit import read_submitted

__all__ = ["on"]


def asking(on: OnSlurm, **resources: Any) -> RunRecord:
    """A run of one stage `a` that asks for this."""
    record = on.plan(("a", (), {}))
    asked = Resources(**{"mem": "200M", **resources})
    (stage,) = record.stages
    steps = tuple(replace(step, nodes=asked.nodes, ntasks=asked.nodes) for step in stage.spec.steps)
    return replace(record, stages=(replace(stage, spec=replace(stage.spec, steps=steps), resources=asked),))


def refused(on: OnSlurm, record: RunRecord) -> list[str]:
    with pytest.raises(UserError) as caught:
        refuse_impossible(on.root, [record], on.profile)
    assert read_submitted(on.root, record.run) == []
    return [p.removeprefix("stages.a.").removeprefix("resources.") for p in caught.value.problems]


def test_all_that_can_never_start_is_said_at_once(on: OnSlurm) -> None:
    record = asking(on, nodes=5, time="2-00:00:00", gpus_per_node=9, cpus_per_task=65, mem="300G")
    assert refused(on, record) == [
        "time: 2 d 0 h is beyond the 24 h 00 min of partition batch",
        "gpus_per_node: asks for 9 GPUs on a node, but no node of partition batch has more than 8",
        "cpus_per_task: asks for 65 cores on a node, but no node of partition batch has more than 64",
        "mem: asks for 307200 MB of memory on a node, but no node of partition batch has more than 200000",
    ]
    assert refused(on, asking(on, nodes=5)) == ["nodes: asks for 5 nodes, but partition batch has 4"]
    (said,) = refused(on, asking(on, partition="bacth"))
    assert said.startswith("partition: Slurm has no partition bacth, did you mean batch?")
    assert refused(on, asking(on, account="physics")) == [
        "account: you are not in account physics; yours are dev, root"
    ]
    assert refused(on, asking(on, account="dev", qos="gold")) == [
        "qos: account dev may not use QOS gold; it has normal"
    ]


def test_what_only_sbatch_knows_is_asked_of_sbatch(on: OnSlurm) -> None:
    on.profile = replace(on.profile, constraint="h100")
    record = on.plan(*((f"a{i}", (), {}) for i in range(3)))
    with pytest.raises(UserError) as caught:
        refuse_impossible(on.root, [record], on.profile)
    (said,) = caught.value.problems  # three equal requests are one question
    assert said.startswith("stages.a0: sbatch would refuse it: ") and "feature" in said


@contextmanager
def account_limit(on: OnSlurm, limit: str) -> Iterator[None]:
    name = limit[: limit.rindex("=")]
    modify = ("sacctmgr", "--immediate", "modify", "account", "dev", "set")
    on.cluster.call(*modify, limit)
    try:
        yield
    finally:
        on.cluster.call(*modify, f"{name}=-1")


def test_what_would_wait_for_ever_is_refused(on: OnSlurm) -> None:
    """sbatch takes such a job, and Slurm never starts it."""
    record = asking(on, nodes=2, gpus_per_node=3, account="dev")
    refuse_impossible(on.root, [record], on.profile)
    with account_limit(on, "GrpTRES=gres/gpu=4"):
        (said,) = refused(on, record)
        job = submit(on.cluster, "--nodes=2", "--gpus-per-node=3", "--account=dev", script="true")
        try:
            until(lambda: shown(on.cluster, job)["Reason"].startswith("AssocGrp"), 30.0, "the reason")
            assert state(on.cluster, job) == "PENDING"
        finally:
            on.cluster.call("scancel", job)
    assert said.startswith("gpus_per_node: asks for 6 GPUs in all, but account dev allows 4 for all jobs together")


def test_what_fits_is_not_refused_and_nothing_is_queued(on: OnSlurm) -> None:
    site = read_site("root", ["dev"])
    assert site is not None and set(site.partitions) == {"batch", "low", "grace", "high"}
    assert len(site.nodes["batch"]) == 4 and {"associations", "limits", "qos"} <= site.enforced
    refuse_impossible(on.root, [asking(on, nodes=4, gpus_per_node=8, time="1-00:00:00")], on.profile)
    assert on.cluster.call("squeue", "--noheader", "--name=run.a") == ""


@contextmanager
def out_of_service(on: OnSlurm, command: str) -> Iterator[None]:
    """Nodes drained or a partition down, by `scontrol update COMMAND`; mended at the end."""
    what, *words = command.split()
    on.cluster.call("scontrol", "update", what, *words)
    try:
        yield
    finally:
        on.cluster.call("scontrol", "update", what, "state=resume" if what.startswith("node") else "state=up")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("nodename=n[1-4] state=drain reason=test", "n1, n2, n3, n4 are out of service"),
        ("nodename=n[2-4] state=drain reason=test", "n2, n3, n4 are out of service"),
        ("partitionname=batch state=down", "partition batch is DOWN"),
    ],
)
def test_what_cannot_start_now_is_queued_and_told(on: OnSlurm, command: str, said: str) -> None:
    """sbatch --test-only says `Requested node configuration is not available` of all of these; sbatch queues them."""
    record = asking(on, nodes=2)
    with out_of_service(on, command):
        (note,) = refuse_impossible(on.root, [record], on.profile)
        assert note.startswith("stages.a: waits in the queue, cannot start now: ") and said in note
        assert refused(on, asking(on, nodes=5)) == ["nodes: asks for 5 nodes, but partition batch has 4"]
        (job,) = on.submit(record).values()
        assert state(on.cluster, job) == "PENDING"
        on.cluster.call("scancel", job)
    until(lambda: refuse_impossible(on.root, [asking(on, nodes=2)], on.profile) == (), 20.0, "nothing to say any more")


def test_a_reservation_that_begins_later_is_waited_for(on: OnSlurm) -> None:
    made = "reservationname=later starttime=now+1hour duration=60 nodes=n1,n2 users=root"
    on.cluster.call("scontrol", "create", "reservation", *made.split())
    try:
        on.profile = replace(on.profile, sbatch={"reservation": "later"})
        (note,) = refuse_impossible(on.root, [asking(on, nodes=2)], on.profile)
        on.profile = replace(on.profile, sbatch={"reservation": "never"})
        (said,) = refused(on, asking(on, nodes=2))
    finally:
        on.cluster.call("scontrol", "delete", "reservationname=later")
    assert note.startswith("stages.a: waits in the queue") and "reservation is invalid" in said


def test_of_a_list_of_partitions_one_is_enough(on: OnSlurm) -> None:
    assert refuse_impossible(on.root, [asking(on, partition="low,batch", nodes=4)], on.profile) == ()
    (said,) = refused(on, asking(on, partition="batch,lwo"))
    assert said.startswith("partition: Slurm has no partition lwo, did you mean low?")
    assert refused(on, asking(on, partition="batch,low", nodes=5)) == [
        "nodes: asks for 5 nodes, but partition batch has 4",
        "nodes: asks for 5 nodes, but partition low has 4",
    ]
