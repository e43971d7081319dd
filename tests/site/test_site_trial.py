"""The test job as it is planned, rendered, found again and followed; without Slurm."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher import slurm, store
from launcher.cluster import Partition, Profile
from launcher.errors import UserError, WorldError
from launcher.sbatch import sbatch_text
from launcher.site import trial
from launcher.site.ask import Queue
from launcher.slurm import Job
from launcher.spec import Runtime

GPU = {"gpu": Partition(max_nodes=4, max_time="1:00:00", gpus_per_node=4, cpus_per_node=64)}
PROFILE = Profile(
    name="mine",
    scheduler="slurm",
    partition="gpu",
    partitions={
        **GPU,
        "one": Partition(max_nodes=1, gpus_per_node=0, cpus_per_node=2),
        "short": Partition(max_time="2"),
    },
    account="proj",
    gpu_request="gres",
    gpu_type="a100",
    code="/shared/code",
    env={"NCCL_SOCKET_IFNAME": "ib0"},
    poll_s=0.0,
)
ROOT = Path("/shared/root")


def test_it_is_rendered_as_a_stage_is() -> None:
    stage = trial.plan_trial(PROFILE, ROOT, None)
    text = sbatch_text(stage, PROFILE, ROOT, "launcher.site")
    lines = text.splitlines()
    asked = (
        "nodes=2",
        "gres=gpu:a100:4",
        "time=00:05:00",
        "partition=gpu",
        "account=proj",
        "cpus-per-task=8",
        "requeue",
    )
    assert {f"#SBATCH --{option}" for option in asked} <= set(lines)
    assert "export PYTHONPATH=/shared/code" in lines and lines[-1].startswith("exec python3 -u -m launcher.site ")
    names = [step.name for step in stage.spec.steps]
    assert names == ["nodes", "imports-host", "all-reduce", "signals"]
    assert stage.spec.config["paths"] == ["+/shared/root", "/shared/code"]
    assert stage.spec.config["interfaces"] == {"NCCL_SOCKET_IFNAME": "ib0"}


def test_every_image_is_tried_once_and_mounts_are_looked_at() -> None:
    images = {"train": "/i/a.sqsh", "rl": "/i/b.sqsh", "evaluate": "/i/a.sqsh"}
    profile = replace(
        PROFILE, images=images, runtime=Runtime(container="pyxis"), mounts=("/data:/in:ro", "/tmp", "/a:/b:rw")
    )
    stage = trial.plan_trial(profile, ROOT, None)
    shown = {step.name: step.image for step in stage.spec.steps}
    assert shown == {
        "nodes": "/i/a.sqsh",
        "imports-train": "/i/a.sqsh",
        "imports-rl": "/i/b.sqsh",
        "all-reduce": "/i/a.sqsh",
        "signals": "/i/a.sqsh",
    }
    assert stage.spec.config["paths"][2:] == ["/in", "+/tmp", "+/b"]
    assert "/shared/root" in stage.spec.steps[0].mounts
    with pytest.raises(UserError, match="images: name at least one"):
        trial.plan_trial(replace(profile, images={}), ROOT, None)


def test_one_node_where_the_partition_has_one() -> None:
    stage = trial.plan_trial(PROFILE, ROOT, "one")
    assert stage.resources.nodes == 1 and stage.resources.gpus_per_node == 0 and stage.resources.cpus_per_task == 2


def test_more_nodes_than_a_job_may_have_are_refused_not_cut() -> None:
    assert trial.plan_trial(PROFILE, ROOT, "one", 1).resources.nodes == 1
    with pytest.raises(UserError, match="nodes: asks for 9 nodes, but partition one of cluster mine has 1"):
        trial.plan_trial(PROFILE, ROOT, "one", 9)


def test_what_the_profile_does_not_say_is_asked_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    queues = (Queue("a", 4, types={"h100": 2}, cpus=32), Queue("b", 1, True, 1, types={"": 8}, cpus=4))
    monkeypatch.setattr(trial, "show_queues", lambda: queues)
    bare = Profile(name="bare", scheduler="slurm")
    default = trial.plan_trial(bare, ROOT, None).resources
    named = trial.plan_trial(bare, ROOT, "a").resources
    assert (default.nodes, default.gpus_per_node, default.cpus_per_task) == (1, 8, 4)
    assert (named.nodes, named.gpus_per_node, named.partition) == (2, 2, "a")


@pytest.mark.parametrize(
    ("profile", "partition", "message"),
    [
        (Profile(name="here", scheduler="local"), None, "has no Slurm"),
        (PROFILE, "nosuch", "no partition nosuch; cluster mine has gpu, one, short"),
        (PROFILE, "short", "time: 5:00 is beyond the 2 of partition short"),
    ],
)
def test_what_can_never_run_is_refused(
    profile: Profile, partition: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "show_queues", tuple)
    with pytest.raises(UserError, match=message):
        trial.plan_trial(profile, ROOT, partition)


# ----------------------------------------------------------------------------------------------------------- following


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> trial.Trial:
    monkeypatch.setattr(trial, "refusal", lambda script: None)
    monkeypatch.setattr(slurm, "submit", lambda script: "7")
    monkeypatch.setattr(trial, "_PAUSE_S", 0.0)
    monkeypatch.setattr(trial, "_GONE_S", 0.0)
    return trial.submit_trial(trial.plan_trial(PROFILE, tmp_path, None), PROFILE, tmp_path)


def test_it_is_found_again_by_its_job(submitted: trial.Trial, tmp_path: Path) -> None:
    again = trial.find_trial(tmp_path, "7")
    assert again.folder == submitted.folder and again.asked["nodes"] == 2
    assert json.loads((submitted.folder / "stage.json").read_text())["run"] == "cluster-test"
    with pytest.raises(UserError, match="no cluster test of job 8"):
        trial.find_trial(tmp_path, "8")


def test_a_refusal_queues_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "refusal", lambda script: "Invalid account")
    monkeypatch.setattr(slurm, "submit", lambda script: pytest.fail("submitted"))
    with pytest.raises(UserError, match="Slurm refuses the test: Invalid account"):
        trial.submit_trial(trial.plan_trial(PROFILE, tmp_path, None), PROFILE, tmp_path)


class Queueing:
    """Slurm's answers, one a look; the job's last word stands in its folder from the look `done` on."""

    def __init__(self, folder: Path, *states: str | None, done: int | None = None):
        self.folder, self.states, self.done, self.looks = folder, list(states), done, 0

    def job_states(self, jobs: list[str]) -> dict[str, Job]:
        if self.looks == self.done:
            store.write_json(self.folder / "7.0" / "job.json", {"steps": {}, "requeue": "asked"})
            store.write_json(self.folder / "7.0" / "nodes.0.json", {"node": "n1"})
            store.write_json(self.folder / "7.1" / "job.json", {"ended": True})
        self.looks += 1
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if state == "silent":
            raise WorldError("squeue: no answer")
        return {} if state is None else {"7": Job("7", state, "Priority")}


def follow(submitted: trial.Trial, monkeypatch: pytest.MonkeyPatch, *states: str | None, **more: Any) -> trial.Outcome:
    monkeypatch.setattr(slurm, "job_states", Queueing(submitted.folder, *states, **more).job_states)
    return trial.follow(submitted, PROFILE)


def test_it_is_followed_through_both_lives(
    submitted: trial.Trial, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = follow(submitted, monkeypatch, "PENDING", "silent", "RUNNING", "PENDING", "RUNNING", done=4)
    assert outcome.ended and len(outcome.lives) == 2 and outcome.reports == {"nodes.0": {"node": "n1"}}
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "job 7: waits (Priority)" and "job 7: running" in told


def test_a_job_that_ends_without_a_word(submitted: trial.Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    (submitted.folder / "7_0_log.out").write_text("line 9: /x/python: No such file or directory\n")
    outcome = follow(submitted, monkeypatch, "RUNNING", "FAILED")
    assert not outcome.ended and outcome.state == "FAILED" and "/x/python" in outcome.log and outcome.lives == ()


def test_patience_ends_and_the_job_stays(submitted: trial.Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "PATIENCE_S", 0.0)
    monkeypatch.setattr(slurm, "cancel", lambda jobs: pytest.fail("cancelled"))
    with pytest.raises(WorldError, match="still waits .Priority.; later: --job 7"):
        follow(submitted, monkeypatch, "PENDING")


def test_an_interrupt_cancels_the_job(submitted: trial.Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled: list[str] = []
    monkeypatch.setattr(slurm, "cancel", cancelled.extend)

    def interrupted(jobs: list[str]) -> dict[str, Job]:
        raise KeyboardInterrupt

    monkeypatch.setattr(slurm, "job_states", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trial.follow(submitted, PROFILE)
    assert cancelled == ["7"]
