"""An answer of Slurm's that stands among other output is found there, and nothing that was queued is unknown."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from launcher import slurm
from launcher.errors import WorldError
from launcher.render import render_plan
from launcher.submit import read_submitted, stage_jobs, submit_run
from tests.faults.slurm_stand_in import StandIn

#: What a site's sbatch does around the real one, which is `$BIN/sbatch.real`; `ask` keeps what that prints.
WRAPPERS = {
    "greets before": 'echo "   Welcome to the Example Computer"; echo "--> Verifying submit host...OK"; real "$@"',
    "charges after": 'real "$@"; echo "Charged to project p1: 12.5 hours"',
    "tells a balance after": 'real "$@"; echo; echo "Left of your grant:"; echo 4321',
    "names its cluster": 'echo "$(real "$@");frontier"',
    "is not parsable": 'echo "Submitted batch job $(real "$@")"',
    "has its own words": 'echo "Job <$(real "$@")> is in the queue"',
    "says it on stderr": 'real "$@" >&2',
    "says a number that no job has": 'real "$@" > /dev/null; echo 0',
    "says nothing": 'real "$@" > /dev/null',
    "fails after": 'real "$@"; echo "accounting: no such project" >&2; exit 3',
    "is cut off after": 'real "$@" > /dev/null; echo "sbatch: error: Socket timed out on send/recv" >&2; exit 1',
}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(tmp_path, monkeypatch)


def wrap(site: StandIn, how: str) -> None:
    (site.bin / "sbatch").rename(site.bin / "sbatch.real")
    tested = 'case "$*" in *--test-only*) exit 0;; esac'
    site.put("sbatch", f'real() {{ "{site.bin}/sbatch.real" "$@"; }}\n{tested}\n{how}')


@pytest.mark.parametrize("how", WRAPPERS.values(), ids=WRAPPERS.keys())
@pytest.mark.parametrize("links", [1, 2])
def test_every_job_is_known_at_once_whatever_sbatch_prints(site: StandIn, how: str, links: int) -> None:
    wrap(site, how)
    limits = {"continuation": "chain", "chain_jobs": 2} if links == 2 else {}
    record = site.plan(**limits)
    made = submit_run(site.root, record, site.profile)
    assert made == ({"a": "101", "b": "102"} if links == 1 else {"a": "102", "b": "104"})
    assert [s.job for s in read_submitted(site.root, "run")] == site.in_queue
    calls = site.calls("sbatch")
    assert f"--dependency=afterok:{made['a']}" in calls[-1]
    assert submit_run(site.root, record, site.profile) == {} and site.calls("sbatch") == calls


@pytest.mark.parametrize("how", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_so_does_a_rendered_folder(site: StandIn, how: str) -> None:
    wrap(site, how)
    record = site.plan()
    render_plan(record, site.profile, site.folder / 'it\'s "here"', site.root)
    script = site.folder / 'it\'s "here"' / "submit.sh"
    for jobs in (["101", "102"], ["103", "104"]):  # what was queued before is no new job
        done = subprocess.run([str(script)], capture_output=True, text=True, cwd="/", check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-2:] == [f"a: job {jobs[0]}", f"b: job {jobs[1]}"]
        assert [s.job for s in read_submitted(site.root, "run")][-2:] == jobs
    assert {s.script for s in read_submitted(site.root, "run")} == {str(script.with_name(f"{s}.sbatch")) for s in "ab"}
    assert {j.state for j in stage_jobs(site.root, record).values()} == {"PENDING"}


def test_an_exit_code_of_0_without_a_job_is_a_failure(site: StandIn) -> None:
    site.put("sbatch", 'echo "Thank you for your request"')
    with pytest.raises(WorldError, match="Thank you for your request.*names no job"):
        submit_run(site.root, site.plan(), site.profile)
    assert read_submitted(site.root, "run") == []


def test_a_refusal_leaves_nothing_and_takes_no_earlier_job(site: StandIn) -> None:
    record = site.plan()
    submit_run(site.root, record, site.profile)
    site.queue(("101", site.script("a"), "FAILED"), ("102", site.script("b"), "CANCELLED"))
    site.put("sbatch", 'echo "Hello"; echo "sbatch: no such project" >&2; exit 1')
    with pytest.raises(WorldError, match="no such project"):
        submit_run(site.root, record, site.profile)
    assert [s.job for s in read_submitted(site.root, "run")] == ["101", "102"]


BANNER = "*** Maintenance | on Monday | see https://x | or | ask | us | now ***\n2026\n\n"


@pytest.mark.parametrize(("before", "after"), [(BANNER, ""), ("", BANNER), (BANNER, BANNER)])
def test_every_answer_is_read_between_greetings(site: StandIn, before: str, after: str) -> None:
    (site.folder / "before").write_text(before)
    (site.folder / "after").write_text(after)

    def say(name: str, text: str) -> None:
        (site.folder / f"{name}.says").write_text(text)
        site.put(name, f'cat "$HERE/before" "$HERE/{name}.says" "$HERE/after"')

    say("squeue", "7|RUNNING|n[1-2]|N/A|1:00|None\n8_[1-3%2]|PENDING||N/A|1:00|Priority\n9+0|PENDING||N/A|1|None\n")
    states = slurm.job_states(["7", "8_2", "9", "10"])
    assert {job: found.state for job, found in states.items()} == {"7": "RUNNING", "8_2": "PENDING", "9": "PENDING"}
    say("squeue", "7\n8_1\n8_2\n9+0\n9+1\n")
    assert slurm.count_jobs("ann") == 5 + before.count("2026") + after.count(
        "2026"
    )  # no form tells a number from a job
    say("squeue", "7|/r/runs/run/stages/a/job.sbatch\n")
    assert dict(slurm.own_scripts()) == {"/r/runs/run/stages/a/job.sbatch": ("7",)}
    say("scontrol", "n1\nn2\ngpu-n07\n")
    assert slurm.hostnames("n[1-2],gpu-n[07-08]") == ["n1", "n2", "gpu-n07"]
    say("sinfo", "n1|drained\nn2|idle\n")
    assert slurm.bad_nodes("n[1-2]") == ("n1",)
    shown = (Path(__file__).parents[1] / "data" / "slurm-24.05" / "scontrol.txt").read_text().splitlines()
    say("scontrol", f"{next(line for line in shown if line)}\n")
    job = slurm.show_job("501")
    assert job is not None and job.state == "RUNNING"
    say("squeue", "")
    say("sacct", "501|FAILED|n1|2026-01-31T10:00:00|None|2026-01-31T09:00:00|run.a\n")
    assert {j: found.state for j, found in slurm.job_states(["501"]).items()} == {"501": "FAILED"}


def test_text_that_is_not_utf_8_is_no_obstacle(site: StandIn) -> None:
    record = site.plan()
    odd = os.fsdecode(b"/home/l\xe9a/train.sh")
    line = os.fsencode(f"55|{odd}|RUNNING|n1|N/A|1:00|\udce9t\udce9\n")
    with (site.folder / "queue").open("ab") as file:
        file.write(line)
    for command in (["status"], ["resume", "--detach"], ["cancel"]):
        done = site.prism(*command)
        assert done.returncode == 0, done.stderr
    assert odd in slurm.own_scripts() and slurm.job_states(["55"])["55"].reason == "?t?"
    site.put("squeue", "printf 'slurm_load_jobs error: \\351\\n' >&2; exit 1")
    done = site.prism("cancel")
    assert done.returncode == 1 and record.run in done.stderr + done.stdout


def test_a_thousand_jobs_are_asked_for_in_arguments_that_linux_takes(site: StandIn) -> None:
    ids = [str(10_000_000 + i) for i in range(17_000)]
    site.queue((ids[-1], "/x/job.sbatch", "RUNNING"))
    site.put("squeue", f'case "$*" in *{ids[-1]}*) echo "{ids[-1]}|RUNNING|n1|N/A|1:00|None";; esac')
    assert list(slurm.job_states(ids)) == [ids[-1]]
    slurm.cancel(ids)
    assert len(site.calls("squeue")) > 1 and len(site.calls("scancel")) > 1
