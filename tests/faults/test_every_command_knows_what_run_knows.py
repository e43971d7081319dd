"""What `run` knows every command knows: jobs taken in unheard, other submitters; and half a chain is made whole."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher import slurm, store
from launcher.commands.shared import jobs_source
from launcher.store import Owner
from launcher.submit import cancel_jobs, read_submitted, stage_jobs, submit_run
from launcher.submitted import JOBS
from tests.faults.slurm_stand_in import StandIn
from tests.supervisor.counting import CHECKOUT

CHAIN = {"continuation": "chain", "chain_jobs": 3}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(tmp_path, monkeypatch)


def forget(site: StandIn, kept: int = 0) -> None:
    """As a submitter leaves the notes that was killed before it could write down what sbatch had answered."""
    path = store.run_dir(site.root, "run") / JOBS
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:kept]))


def test_cancel_ends_a_job_that_nobody_heard_of(site: StandIn) -> None:
    submit_run(site.root, site.plan(), site.profile)
    forget(site)
    done = site.prism("cancel")
    assert (done.returncode, done.stdout) == (0, "run run: stopped a, b\n"), done.stderr
    assert site.calls("scancel") == ["101 102"]


@pytest.mark.parametrize("state", ["RUNNING", "PENDING"])
def test_status_and_clean_see_it(site: StandIn, state: str) -> None:
    record = site.plan()
    submit_run(site.root, record, site.profile)
    forget(site)
    site.queue(("101", site.script("a"), state), ("102", site.script("b"), "PENDING"))
    told = json.loads(site.prism("status", "--json").stdout)
    assert [(s["job"], s["job_state"]) for s in told["stages"]] == [("101", state), ("102", "PENDING")]
    source = jobs_source(site.root, record)
    looks = [source({}) for _ in range(3)]
    assert [{j.id for j in look.values()} for look in looks] == [{"101", "102"}] * 3, "as watch asks"
    done = site.prism("clean", "run", "--forget")
    assert done.returncode == 2 and store.run_dir(site.root, "run").exists(), done.stdout


def test_cancel_of_a_run_that_was_never_submitted_says_so(site: StandIn) -> None:
    site.plan()
    done = site.prism("cancel")
    assert (done.returncode, done.stdout) == (0, "run run: nothing was running\n"), done.stderr


def test_cancel_waits_for_a_shell_that_is_submitting(site: StandIn) -> None:
    """It is not killed, and what it submits meanwhile is ended too."""
    record = site.plan()
    submit_run(site.root, record, site.profile)
    code = (
        "import sys, time; from pathlib import Path; from launcher.run_record import claimed\n"
        "with claimed(Path(sys.argv[1]), 'run'):\n"
        "    print('claimed', flush=True); sys.stdin.readline()\n"
        "print('ended well', flush=True)"
    )
    command = [sys.executable, "-c", code, str(site.root)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    submitter = subprocess.Popen(command, text=True, cwd=CHECKOUT, **pipes)  # type: ignore[call-overload]
    assert submitter.stdout.readline() == "claimed\n"
    env = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    cancel = [sys.executable, "-m", "launcher.cli", "cancel", "--root", str(site.root)]
    canceller = subprocess.Popen(cancel, text=True, cwd=CHECKOUT, **env)  # type: ignore[call-overload]
    time.sleep(2.0)
    assert canceller.poll() is None and submitter.poll() is None and site.calls("scancel") == []
    with (site.folder / "queue").open("a") as file:
        file.write(f"103|{site.script('a')}|PENDING||N/A|1:00|Priority\n")
    out, _ = submitter.communicate("go on\n", timeout=60)
    assert out == "ended well\n"
    out, err = canceller.communicate(timeout=60)
    assert (canceller.returncode, out) == (0, "run run: stopped a, b\n"), err
    assert site.calls("scancel") == ["101 102 103"]


def test_a_submitter_that_does_not_end_keeps_nobody_from_cancelling(
    site: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A login node that is gone left its claim."""
    from launcher import submit
    from launcher.errors import UserError

    record = site.plan()
    submit_run(site.root, record, site.profile)
    store.claim(store.driver_claim(site.root, "run"), Owner("gone", "boot", 5, "9"))
    monkeypatch.setattr(submit, "PATIENCE_S", 0.0)
    with pytest.raises(UserError, match="stopped a, b, but the run is still being submitted.*if gone is gone, remove"):
        submit.cancel_submitted(site.root, record)
    assert site.calls("scancel") == ["101 102"]


@pytest.mark.parametrize("kept", [0, 1, 2])
@pytest.mark.parametrize("queued", [1, 2])
def test_half_a_chain_is_made_whole(site: StandIn, kept: int, queued: int) -> None:
    """Its submitter was killed between two links, before or after it wrote the last one down."""
    record = site.plan(**CHAIN)
    submit_run(site.root, record, site.profile)
    forget(site, min(kept, queued))
    site.queue(*(("101", site.script("a"), "RUNNING"), ("102", site.script("a"), "PENDING"))[:queued])
    made = submit_run(site.root, record, site.profile)
    lines = read_submitted(site.root, "run")
    links = [s.job for s in lines if s.stage == "a"]
    assert links == ["101", "102", "107"][:queued] + ["107", "108"][: 3 - queued] or len(links) == 3
    assert {s.chain for s in lines if s.stage == "a"} == {"101"} and made["a"] == links[-1]
    calls = [c for c in site.calls("sbatch")[6:]]
    assert [f"afterany:{links[i - 1]}" in c for i, c in zip(range(queued, 3), calls, strict=False)] == [True] * (
        3 - queued
    )
    assert f"afterok:{links[-1]}" in calls[3 - queued]
    assert len([s for s in lines if s.stage == "b"]) == 3
    assert submit_run(site.root, record, site.profile) == {}
    assert stage_jobs(site.root, record)["a"].id == "101"


def test_a_chain_whose_links_have_ended_is_no_half_chain(site: StandIn) -> None:
    record = site.plan(("a", (), {}), **CHAIN)
    submit_run(site.root, record, site.profile)
    site.queue(*((job, site.script("a"), "CANCELLED") for job in ("101", "102", "103")))
    assert cancel_jobs(site.root, record) == [] and site.calls("scancel") == []
    assert submit_run(site.root, record, site.profile) == {"a": "106"}
    assert [s.chain for s in read_submitted(site.root, "run")] == ["101"] * 3 + ["104"] * 3


def test_a_silent_controller_is_said_by_cancel(site: StandIn) -> None:
    submit_run(site.root, site.plan(), site.profile)
    forget(site)
    site.put("squeue", 'echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1')
    done = site.prism("cancel")
    assert done.returncode == 1 and "the controller does not answer" in done.stderr
    with pytest.raises(slurm.NoAnswer):
        slurm.own_scripts()
