"""A job's number that Slurm has given out again names nothing of a run's: it is neither believed nor touched."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launcher import slurm, store, submitted
from launcher.render import render_plan
from launcher.store import Owner
from launcher.submit import read_submitted, stage_jobs, submit_run
from launcher.submitted import JOBS
from tests.faults.slurm_stand_in import StandIn

STRANGERS = ["/home/ann/train.sh", "/home/ann/runs/run/stages/a/job.sbatch", "(null)", "sleep 100"]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(tmp_path, monkeypatch)


@pytest.mark.parametrize("stranger", STRANGERS)
@pytest.mark.parametrize("state", ["RUNNING", "PENDING"])
def test_a_stranger_is_not_followed_waited_for_or_cancelled(site: StandIn, stranger: str, state: str) -> None:
    record = site.plan()
    assert submit_run(site.root, record, site.profile) == {"a": "101", "b": "102"}
    site.queue(("101", stranger, state))
    told = json.loads(site.prism("status", "--json").stdout)
    assert [s["state"] for s in told["stages"]] == ["interrupted", "interrupted"]
    assert site.prism("cancel").returncode == 0 and site.calls("scancel") == []
    assert submit_run(site.root, record, site.profile) == {"a": "103", "b": "104"}
    assert "--dependency=afterok:103 " in site.calls("sbatch")[-1]


def test_other_runs_of_the_same_name_are_strangers_too(site: StandIn, tmp_path: Path) -> None:
    record = site.plan()
    submit_run(site.root, record, site.profile)
    site.queue(
        ("101", site.script("b"), "RUNNING"), ("102", str(tmp_path / "root2/runs/run/stages/b/job.sbatch"), "PENDING")
    )
    jobs = stage_jobs(site.root, record)
    assert "a" not in jobs, "the number names the job of another stage"
    assert (jobs["b"].id, jobs["b"].state) == ("101", "RUNNING"), "which is one of this run's, taken in unheard"


@pytest.mark.parametrize("noted", [True, False])
def test_jobs_noted_by_an_older_version_are_known_by_where_their_scripts_lie(site: StandIn, noted: bool) -> None:
    record = site.plan()
    submit_run(site.root, record, site.profile)
    path = store.run_dir(site.root, "run") / JOBS
    if not noted:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({k: v for k, v in e.items() if k != "script"}) + "\n" for e in lines))
    assert {s.script for s in read_submitted(site.root, "run")} == (
        {site.script("a"), site.script("b")} if noted else {""}
    )
    assert {j.state for j in stage_jobs(site.root, record).values()} == {"PENDING"}


@pytest.mark.parametrize("noted", [True, False])
def test_so_are_those_of_a_rendered_folder_and_no_others(site: StandIn, tmp_path: Path, noted: bool) -> None:
    record = site.plan()
    for name, plan in (("mine", record), ("other", site.plan(("z", (), {}), ("a", (), {}), ("b", (), {})))):
        render_plan(plan, site.profile, tmp_path / name, site.root)
    line = submitted.Submitted("a", record.stage("a").spec.fingerprint, "7", time.time())
    line = replace(line, script=str(tmp_path / "mine" / "a.sbatch")) if noted else line
    for name, state in (("mine", "RUNNING"), ("other", "GONE")):
        site.queue(("7", str(tmp_path / name / "a.sbatch"), "RUNNING"))
        assert submitted.told_states(site.root, "run", [line])["7"].state == state


def test_a_root_that_is_reached_by_another_path_is_the_same(site: StandIn, tmp_path: Path) -> None:
    record = site.plan()
    submit_run(site.root, record, site.profile)
    (tmp_path / "link").symlink_to(site.root)
    assert {j.state for j in stage_jobs(tmp_path / "link", record).values()} == {"PENDING"}


def test_a_site_whose_sbatch_submits_a_copy_is_believed_about_it(site: StandIn) -> None:
    record = site.plan()
    site.put("sbatch", (site.bin / "sbatch").read_text().replace("$id|$script|", "$id|/var/spool/copy.$id|"))
    assert submit_run(site.root, record, site.profile) == {"a": "101", "b": "102"}
    assert {j.state for j in stage_jobs(site.root, record).values()} == {"PENDING"}
    assert submit_run(site.root, record, site.profile) == {}


def test_what_accounting_tells_of_an_earlier_job_is_not_told_of_ours(site: StandIn) -> None:
    record = site.plan()
    submit_run(site.root, record, site.profile)
    site.queue()
    now, long_ago = time.strftime("%Y-%m-%dT%H:%M:%S"), "2020-01-31T10:00:00"
    site.accounts(
        f"101|FAILED|n1|{long_ago}|None|{long_ago}|run.a",
        f"102|COMPLETED|n1|{now}|None|{now}|somebody|else",
    )
    assert {j.state for j in stage_jobs(site.root, record).values()} == {"GONE"}
    site.accounts(f"101|FAILED|n1|{now}|None|{now}|run.a", f"102|CANCELLED by 0|n1|{now}|None|{now}|run.b")
    assert [j.state for j in stage_jobs(site.root, record).values()] == ["FAILED", "CANCELLED"]


@pytest.mark.parametrize("script", ["mine", "/home/ann/x.sh", "(null)"])
def test_so_is_the_job_of_a_cluster_test(site: StandIn, tmp_path: Path, script: str) -> None:
    mine = str(tmp_path / "trial" / "job.sbatch")
    site.queue(("7", mine if script == "mine" else script, "RUNNING"))
    assert (slurm.job_of_script("7", mine) is not None) == (script == "mine")


def test_an_element_of_an_array_is_known_by_the_arrays_script(site: StandIn) -> None:
    folder = store.stage_dir(site.root, "run", "sweep")
    line = submitted.Submitted("sweep.x.0", "f", "7_0", time.time(), script=str(folder / "sweep.sbatch"))
    site.queue(("7_0", str(folder / "sweep.sbatch"), "RUNNING"))
    assert submitted.told_states(site.root, "run", [line])["7_0"].state == "RUNNING"
    site.queue(("7_0", "/home/ann/other.sbatch", "RUNNING"))
    assert submitted.told_states(site.root, "run", [line])["7_0"].state == "GONE"


@pytest.mark.parametrize(("script", "alive"), [(None, True), ("/home/ann/x.sh", False), ("(null)", False)])
def test_a_claim_whose_job_is_another_one_now_is_free(site: StandIn, script: str | None, alive: bool) -> None:
    """A job on another node made an artifact; its number now names a stranger's."""
    record = site.plan()
    submit_run(site.root, record, site.profile)
    site.queue(("101", script or site.script("a"), "RUNNING"))
    assert submitted.lives(site.root, "101") is alive
    assert submitted.living(site.root, ["101"]) == ({"101"} if alive else set())
    (site.root / "artifacts/train" / f"{'9' * 20}.partial").mkdir(parents=True)
    store.claim(store.claim_dir(site.root, f"artifacts/train/{'9' * 20}"), Owner("n7", "boot", 5, "9", "101"))
    site.prism("clean")
    assert (site.root / "artifacts/train" / f"{'9' * 20}.partial").exists() is alive


def test_a_lost_job_with_the_number_of_an_older_one_is_joined(site: StandIn) -> None:
    record = site.plan()
    submit_run(site.root, record, site.profile)
    site.queue(("102", site.script("a"), "RUNNING"))  # 102 was b's
    assert submit_run(site.root, record, site.profile) == {"b": "103"}
    assert [(s.stage, s.job) for s in read_submitted(site.root, "run")][-2:] == [("a", "102"), ("b", "103")]
