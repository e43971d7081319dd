"""What cannot start now is queued, and is not refused as what can never start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher import slurm
from launcher.cluster import Profile, place_record
from launcher.errors import UserError
from launcher.limits import refuse_impossible
from launcher.site import ask, trial
from launcher.slurm import Answer
from tests.supervisor.counting import counting_run

NO_NODE = "allocation failure: Requested node configuration is not available"


class Cluster:
    """Slurm's answers: the state of four nodes, that of their partition, what sbatch has against a job."""

    def __init__(self, nodes: str, partition: str = "UP", refusal: str | None = NO_NODE, states: bool = True):
        self.nodes, self.partition, self.refusal, self.states = nodes, partition, refusal, states
        self.submitted = 0

    def call(self, *argv: str, timeout: float = 10.0) -> Answer:
        state = f"|{self.nodes}" if self.states else ""
        out = {
            "config": "ClusterName             = here\nAccountingStorageEnforce = none\n",
            "partition": f"PartitionName=gpu Default=YES MaxNodes=8 TotalNodes=4 State={self.partition}\n",
        }
        if argv[0] == "sbatch" and "--test-only" in argv:
            return Answer(1, "", self.refusal) if self.refusal else Answer(0, "", "")
        if argv[0] == "sbatch":
            self.submitted += 1
            return Answer(0, "7\n", "")
        if argv[0] == "sinfo" and "--exact" in argv:
            return Answer(0, f"gpu|4|64|gpu:8|(null){state}\n", "")
        if argv[0] == "sinfo":
            return Answer(0, "".join(f"gpu|n{i}|64|200000|gpu:8{state}\n" for i in range(4)), "")
        return Answer(0, next((text for word, text in out.items() if word in argv), ""), "")


def noted(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, root: Path, **profile: Any) -> tuple[str, ...]:
    monkeypatch.setattr(slurm, "call", cluster.call)
    site = Profile(**{"name": "x", "scheduler": "slurm", "partition": "gpu", **profile})
    return refuse_impossible(root, [place_record(counting_run(("a", (), {})), site, root)], site)


@pytest.mark.parametrize("state", ["drained", "down*", "draining", "maint", "idle$", "drained*", "reserved", "fail"])
def test_nodes_out_of_service_come_back(state: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (note,) = noted(Cluster(state), monkeypatch, tmp_path)
    assert note == (
        "stages.a: waits in the queue, cannot start now: of partition gpu, n0, n1, n2, n3 are out of service"
    )


@pytest.mark.parametrize("state", ["idle", "allocated", "mixed", "completing", "idle~", "planned"])
def test_what_sbatch_says_holds_where_all_nodes_serve(
    state: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="stages.a: sbatch would refuse it: .*Requested node configuration"):
        noted(Cluster(state), monkeypatch, tmp_path)
    with pytest.raises(UserError, match="sbatch would refuse it"):
        noted(Cluster(state, states=False), monkeypatch, tmp_path)


@pytest.mark.parametrize(
    "refusal",
    [
        "allocation failure: Required node not available (down, drained or reserved)",
        "sbatch: error: Requested nodes are busy",
        "sbatch: error: Requested partition configuration not available now",
    ],
)
def test_words_of_slurm_that_mean_not_now(refusal: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (note,) = noted(Cluster("idle", refusal=refusal), monkeypatch, tmp_path)
    assert note.startswith("stages.a: waits in the queue, cannot start now: sbatch --test-only: ")


def test_a_partition_that_is_down_queues_and_one_that_drains_takes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (note,) = noted(Cluster("idle", "DOWN"), monkeypatch, tmp_path)
    assert note.endswith("partition gpu is DOWN")
    with pytest.raises(UserError, match="partition gpu is DRAIN and takes no jobs"):
        noted(Cluster("idle", "DRAIN"), monkeypatch, tmp_path)


def test_a_reservation_may_begin_later(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    later = "allocation failure: Invalid time specified"
    (note,) = noted(Cluster("idle", refusal=later), monkeypatch, tmp_path, sbatch={"reservation": "next"})
    assert "Invalid time specified" in note
    with pytest.raises(UserError, match="Invalid time"):
        noted(Cluster("idle", refusal=later), monkeypatch, tmp_path)


def test_another_cluster_may_have_what_this_one_has_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cluster = Cluster("idle", refusal=None)
    with pytest.raises(UserError, match="no partition big"):
        noted(cluster, monkeypatch, tmp_path, partition="big", sbatch={"clusters": "here"})
    assert noted(cluster, monkeypatch, tmp_path, partition="big", sbatch={"clusters": "here,there"}) == ()


def test_a_test_of_the_cluster_waits_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = Profile(name="x", scheduler="slurm", partition="gpu")
    for state, queued in (("drained", 1), ("idle", 0)):
        cluster = Cluster(state)
        monkeypatch.setattr(slurm, "call", cluster.call)
        monkeypatch.setattr(ask, "call", cluster.call)
        planned = trial.plan_trial(site, tmp_path, None)
        if queued:
            assert trial.submit_trial(planned, site, tmp_path).job == "7"
            assert "waits in the queue" in capsys.readouterr().err
        else:
            with pytest.raises(UserError, match="Slurm refuses the test"):
                trial.submit_trial(planned, site, tmp_path)
        assert cluster.submitted == queued


@pytest.mark.parametrize(("state", "closed"), [("UP", ""), ("DOWN", ""), ("INACTIVE", "its state is INACTIVE")])
def test_a_partition_in_maintenance_stays_in_a_profile(state: str, closed: str) -> None:
    said = f"PartitionName=gpu State={state} TotalNodes=4\n"
    (queue,) = ask.parse_queues(said, "gpu|4|64|gpu:8|(null)|maint\n", ())
    assert (queue.closed, queue.away) == (closed, 4)
