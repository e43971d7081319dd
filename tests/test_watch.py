"""What a person or a program reads while a run goes on."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher import slurm, store
from launcher.run_record import RunRecord, write_run
from launcher.spec import StageSpec
from launcher.status import RunStatus, StageStatus, run_status
from launcher.submit import JOBS, stage_jobs
from launcher.watch import Follower, Queue, describe_change, describe_progress, tell_unheard, watch_run
from tests.left_attempts import leave_attempt
from tests.supervisor.counting import counting_run


def stage_status(state: str, step: int | None = None, **facts: Any) -> StageStatus:
    """A stage of which little is known."""
    run = counting_run(("base", (), {}))
    empty = run_status(Path("/nowhere"), run).stages[0]
    return replace(empty, state=state, step=step, total=100, attempt="local.1", **facts)  # type: ignore[arg-type]


def run_of(*stages: StageStatus, trouble: str | None = None) -> RunStatus:
    return RunStatus("run", "/root", "dev", "running", 0.0, 0.0, 0.0, trouble, stages)


def test_words_for_changes_and_progress() -> None:
    failed = stage_status("failed", exit_class="diverged", message="loss is nan", reason="diverged: loss is nan")
    assert describe_change(failed) == "failed: diverged: loss is nan"
    assert describe_change(stage_status("done", seconds=61.0)) == "done in 1 min 01 s"
    assert describe_change(stage_status("running", job="12", nodes="n[1-2]")) == "started (local.1, job 12 on n[1-2])"
    figures = {"loss": 1.23456, "tokens_per_s": 16400.0}
    moving = stage_status("running", 7, figures=figures, left_seconds=90.0, gpu_hours=1.5)
    assert describe_progress(moving) == "step 7/100  loss 1.235  16.4 k tokens/s  1 min 30 s left  1.5 GPU-hours"


def test_plain_lines_say_each_change_once_and_progress_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter(range(0, 1000, 2))
    with Follower("run", clock=lambda: float(next(clock))) as follower:
        for step in (None, 1, 2, 3, 4, 5, 6):
            follower.show(
                run_of(stage_status("running", step), replace(stage_status("waiting"), stage="rl", attempt=None))
            )
        for _ in range(2):
            follower.show(run_of(stage_status("done", seconds=24.0)))
    lines = [line.split("  ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "base: started (local.1)" and lines[-1] == "base: done in 24.0 s"
    assert [line for line in lines if "step" in line] == ["base: step 3/100", "base: step 6/100"] and len(lines) == 4


def test_json_lines_are_one_a_change(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = iter(range(100))
    with Follower("run", as_json=True) as follower:
        for step in (None, 1, 1, 1, 2):  # the time goes on, which is no change
            follower.show(run_of(stage_status("running", step, seconds=float(next(seconds)))))
        follower.show(run_of(stage_status("done", 2), trouble="squeue: no answer"))
        follower.end(run_of(stage_status("done", 2)))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    told = [(line["event"], line.get("state"), line.get("step")) for line in lines]
    changes = [("stage", "running", None), ("stage", "running", 1), ("stage", "running", 2)]
    assert told == [*changes, ("note", None, None), ("stage", "done", 2), ("end", "running", None)]
    assert {(line["schema"], line["run"]) for line in lines} == {(1, "run")} and all(line["time"] for line in lines)


# ---------------------------------------------------------------------------------------------------- what Slurm says


class Controller:
    """Stands for slurmctld and slurmdbd: answers by script, counts what it is asked."""

    def __init__(self, *looks: dict[str, str] | None):
        self.looks, self.asked = list(looks), []

    def call(self, *argv: str, timeout: float = 10.0) -> slurm.Answer:
        if "--format=%i|%o" in argv:  # asked at the first look alone
            return slurm.Answer(0, "", "")
        self.asked.append(argv[0])
        if argv[0] == "sacct":
            ids = next(w for w in argv if w.startswith("--jobs=")).removeprefix("--jobs=").split(",")
            return slurm.Answer(0, "".join(f"{i}|COMPLETED|n1|Unknown|None\n" for i in ids), "")
        now = self.looks.pop(0)
        if now is None:
            return slurm.Answer(1, "", "Unable to contact slurm controller (connect failure)")
        return slurm.Answer(0, "".join(f"{job}|{state}|n1|N/A|59:00|None\n" for job, state in now.items()), "")


def submitted(root: Path, *stages: tuple[str, tuple[str, ...], dict[str, Any]], first: int = 1) -> RunRecord:
    """A run whose stages have been submitted as jobs 1, 2, …"""
    record = replace(counting_run(*stages), cluster="dev")
    write_run(root, record)
    rows = [
        {"stage": s.spec.stage, "fingerprint": s.spec.fingerprint, "job": str(first + i), "time": 1.0}
        for i, s in enumerate(record.stages)
    ]
    (store.run_dir(root, record.run) / JOBS).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return record


def follow(root: Path, record: RunRecord, **options: Any) -> RunStatus:
    return watch_run(root, record, lambda ended: stage_jobs(root, record, ended), 0.0, **options)


def test_each_look_is_one_question_however_many_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = submitted(tmp_path, *((f"s{i}", (), {}) for i in range(40)))
    jobs = [str(1 + i) for i in range(40)]
    pending, running = dict.fromkeys(jobs, "PENDING"), dict.fromkeys(jobs, "RUNNING")
    half = dict.fromkeys(jobs[:20], "RUNNING")  # the other half has left the queue: sacct knows
    controller = Controller(pending, running, running, half, half, {})
    monkeypatch.setattr(slurm, "call", controller.call)
    status = follow(tmp_path, record)
    assert {s.state for s in status.stages} == {"interrupted"}  # jobs ended, and nothing was made
    assert controller.asked == ["squeue", "squeue", "squeue", "squeue", "sacct", "squeue", "squeue", "sacct"]


def test_looks_in_quick_succession_ask_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A followed log is looked at more often than Slurm may be asked."""
    record = submitted(tmp_path, ("a", (), {}))
    controller = Controller({"1": "RUNNING"})
    monkeypatch.setattr(slurm, "call", controller.call)
    queue = Queue(lambda ended: stage_jobs(tmp_path, record, ended), every_s=3600.0)
    for _ in range(5):
        queue.look()
        assert queue.jobs["a"].state == "RUNNING"
    assert controller.asked == ["squeue"]


def test_a_silent_controller_is_said_and_borne(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is known, and later; it ends no watching."""
    record = submitted(tmp_path, ("a", (), {}))
    running = {"1": "RUNNING"}
    controller = Controller(None, None, running, None, None, running, {"1": "CANCELLED"})
    monkeypatch.setattr(slurm, "call", controller.call)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert follow(tmp_path, record).state == "stopped"
    lines = [line.split("  ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    silent = [i for i, line in enumerate(lines) if "Unable to contact slurm controller" in line]
    answers = [i for i, line in enumerate(lines) if line == "Slurm answers again"]
    assert len(silent) == len(answers) == 2 and silent[0] == 0 and controller.looks == []


def test_a_machine_without_slurm_shows_the_files_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = submitted(tmp_path, ("a", (), {}))
    leave_attempt(tmp_path, record.stages[0].spec, "1.0", 10, 20, "diverged")
    monkeypatch.setenv("PATH", str(tmp_path))
    status = follow(tmp_path, record)
    assert status.state == "failed" and status.trouble is not None and "no squeue here" in status.trouble


# ---------------------------------------------------------------------------------------------------------------- hook


def hooked(record: RunRecord, program: str) -> RunRecord:
    """Every stage with a hook, a Python program."""
    argv = (sys.executable, "-c", program)
    return replace(record, stages=tuple(replace(s, spec=replace(s.spec, notify=argv)) for s in record.stages))


def test_what_no_supervisor_could_tell_is_told_once(tmp_path: Path) -> None:
    """Never started; killed with its supervisor; cancelled between two lives. Not: ended by itself, waits, goes on."""
    names = ("never", "killed", "ended", "waits", "between", "goes-on")
    run = submitted(tmp_path, *((name, (), {}) for name in names), first=11)
    told = tmp_path / "told"
    record = hooked(run, f"import sys; open({str(told)!r}, 'a').write(sys.stdin.read())")
    owner = replace(store.this_process(), start="0", job="12")  # a process that is dead
    leave_attempt(tmp_path, record.stage("killed").spec, "12.0", 10, None, owner=owner)
    leave_attempt(tmp_path, record.stage("ended").spec, "13.0", 10, 20, "diverged")
    for name, job in (("between", "15"), ("goes-on", "16")):
        leave_attempt(tmp_path, record.stage(name).spec, f"{job}.0", 10, 20, "time-limit", action="again")
    states = ("CANCELLED", "NODE_FAIL", "FAILED", "PENDING", "CANCELLED", "PENDING")
    jobs = {name: slurm.Job(str(11 + i), state) for i, (name, state) in enumerate(zip(names, states, strict=True))}
    store.stage_dir(tmp_path, "run", "never").mkdir(parents=True)
    for _ in range(2):
        assert tell_unheard(tmp_path, record, run_status(tmp_path, record, jobs), jobs) == []
    rows = {row["stage"]: row for row in map(json.loads, told.read_text().splitlines())}
    assert len(told.read_text().splitlines()) == 3 and set(rows) == {"never", "killed", "between"}
    never, killed, between = rows["never"], rows["killed"], rows["between"]
    assert (between["old_state"], between["new_state"], between["attempt"]) == ("queued", "stopped", "15.0")
    assert (never["old_state"], never["new_state"], never["job"]) == ("queued", "stopped", "11")
    assert (killed["old_state"], killed["new_state"], killed["attempt"]) == ("running", "interrupted", "12.0")
    assert killed["exit_class"] == "node-failure" and "NODE_FAIL" in killed["message"]


def test_a_hook_that_fails_is_said_and_the_watching_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = hooked(submitted(tmp_path, ("a", (), {})), "raise SystemExit('no such channel')")
    store.stage_dir(tmp_path, "run", "a").mkdir(parents=True)
    monkeypatch.setattr(slurm, "call", Controller({"1": "CANCELLED"}).call)
    jobs = stage_jobs(tmp_path, record)
    (line,) = tell_unheard(tmp_path, record, run_status(tmp_path, record, jobs), jobs)
    assert "exit code 1: no such channel" in line


def test_a_store_that_is_not_ours_to_write_is_looked_at_in_silence(tmp_path: Path) -> None:
    record = hooked(counting_run(("a", (), {})), "raise SystemExit(1)")
    spec: StageSpec = record.stages[0].spec
    jobs = {"a": slurm.Job("1", "CANCELLED")}
    assert not store.stage_dir(tmp_path, spec.run, "a").exists()  # as unwritable as a folder can be, also for root
    assert tell_unheard(tmp_path, record, run_status(tmp_path, record, jobs), jobs) == []
