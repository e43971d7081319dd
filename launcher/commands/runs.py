"""Commands on runs: run, resume, status, watch, logs, cancel, report."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher import store
from launcher.cluster import Profile, load_profile, place_record
from launcher.commands.shared import jobs_of, open_run, print_json, profile_of, records_of, root_of, slurm_profile
from launcher.errors import UserError, WorldError
from launcher.run_record import PlannedStage, RunRecord


def run(args: argparse.Namespace) -> int:
    """Run or submit what is not done, and follow it."""
    profile = profile_of(args)
    if args.dry_run:
        from launcher.render import dry_run

        profile = slurm_profile(args)
        for record in records_of(args, profile):
            print(dry_run(record, profile, root_of(args)))
        return 0
    records = records_of(args, profile)
    _refuse_absent_secrets(records)
    root = store.open_root(root_of(args))
    records = [place_record(r, profile, root) for r in records]
    if profile.scheduler == "slurm":
        return _run_on_slurm(root, records, profile, args.detach)
    worst = 0
    for record in records:
        code = _run_here(root, record, profile, args.detach)
        if code == 130:  # interrupted: what the matrix has left is not begun
            return code
        worst = max(worst, code)
    return worst


def _refuse_absent_secrets(records: Sequence[RunRecord]) -> None:
    named = {name for record in records for stage in record.stages for name in stage.spec.secrets}
    absent = sorted(name for name in named if not os.environ.get(name))
    if absent:
        raise UserError(f"secrets: {', '.join(absent)} not set in this shell; export it, then run again")


def _run_on_slurm(root: Path, records: Sequence[RunRecord], profile: Profile, detach: bool) -> int:
    """Submit every run, then follow them one by one; leaving with Ctrl-C stops nothing."""
    from launcher.submit import submit_run

    for record in records:
        for stage, job in submit_run(root, record, profile).items():
            print(f"{stage}: job {job}")
    if detach:
        return 0
    return max(_follow(root, record, profile) for record in records)


def _follow(root: Path, record: RunRecord, profile: Profile) -> int:
    from launcher.state import run_state
    from launcher.submit import stage_jobs
    from launcher.watch import watch_run

    states = watch_run(root, record, lambda: stage_jobs(root, record), profile.poll_s)
    if run_state(states) != "done":
        return 1
    _finish(root, record)
    return 0


def _run_here(root: Path, record: RunRecord, profile: Profile, detach: bool) -> int:
    from launcher.local import run_local

    code = run_local(root, record, profile.slots, detach=detach)
    if code == 0 and not detach:
        _finish(root, record)
    return code


def _finish(root: Path, record: RunRecord) -> None:
    """What a finished run ends with: the result table and where the report is."""
    from rich.console import Console

    from launcher.report import collect, render_table, write_report

    page = write_report(root, record)
    Console().print(render_table(collect(root, record)))
    print(f"report: {page}")


def resume(args: argparse.Namespace) -> int:
    """Go on with a run, as it was planned."""
    root, record = open_run(args)
    _check_versions(record)
    _refuse_absent_secrets([record])
    profile = load_profile(record.cluster)
    if profile.scheduler == "slurm":
        return _run_on_slurm(root, [record], profile, args.detach)
    return _run_here(root, record, profile, args.detach)


def _check_versions(record: RunRecord) -> None:
    """Refuse a plan of another version: its fingerprints would name what this version makes otherwise."""
    from launcher.stages import kinds

    old = [s.spec.stage for s in record.stages if s.spec.kind_version != kinds()[s.spec.kind].VERSION]
    if old:
        raise UserError(
            f"run {record.run} was planned by another version of prism-launch ({', '.join(old)} would differ); "
            f"plan it anew with: prism-launch run {record.recipe} --name {record.run}"
        )


def report(args: argparse.Namespace) -> int:
    """Every number of a run as JSON; or the page, with the result table."""
    from launcher.report import collect

    root, record = open_run(args)
    if args.json:
        print_json(collect(root, record))
    else:
        _finish(root, record)
    return 0


def status(args: argparse.Namespace) -> int:
    """What each stage of a run is doing."""
    from launcher.state import run_state, stage_states

    root, record = open_run(args)
    try:
        jobs = jobs_of(root, record)
    except WorldError as error:  # a laptop that sees the store alone
        print(f"prism-launch: {error}; what follows is from the run's files alone", file=sys.stderr)
        jobs = {}
    states = stage_states(root, record, jobs=jobs)
    if args.json:
        from launcher.spec import encode

        body = {"run": record.run, "root": str(root), "cluster": record.cluster, "state": run_state(states)}
        print_json({**body, "stages": [encode(s) for s in states]})
        return 0
    from rich.console import Console

    from launcher.watch import states_table

    Console().print(states_table(record.run, states))
    return 0


def watch(args: argparse.Namespace) -> int:
    """Follow a run; leaving with Ctrl-C does not stop it."""
    from launcher.state import run_state
    from launcher.watch import watch_run

    root, record = open_run(args)
    profile = load_profile(record.cluster)
    poll_s = profile.poll_s if profile.scheduler == "slurm" else 0.5
    return 0 if run_state(watch_run(root, record, lambda: jobs_of(root, record), poll_s)) == "done" else 1


def logs(args: argparse.Namespace) -> int:
    """Print the end of a stage's log, and go on with it where asked."""
    from launcher.attempts import newest_attempt
    from launcher.watch import follow_file

    root, record = open_run(args)
    stage = record.stage(args.stage) if args.stage else _stage_of_interest(root, record)
    attempt = newest_attempt(root, stage.spec)
    if attempt is None:
        raise UserError(f"stage {stage.spec.stage} of run {record.run} has no log: it has not been started in this run")
    path = _log_file(attempt.folder, args.step)
    print(f"==> {path} <==", file=sys.stderr)
    print("\n".join(path.read_text(errors="replace").splitlines()[-args.lines :]))
    if args.follow:
        follow_file(path, lambda: (now := newest_attempt(root, stage.spec)) is not None and now.is_living)
    return 0


def _stage_of_interest(root: Path, record: RunRecord) -> PlannedStage:
    """The stage that failed, else one that runs, else the last that was started."""
    from launcher.state import stage_states

    states = stage_states(root, record)
    for wanted in ("failed", "running", "interrupted", "stopped", "done"):
        found = [s for s in states if s.state == wanted and s.attempt]
        if found:
            return record.stage(max(found, key=lambda s: s.started or 0).stage)
    raise UserError(f"run {record.run}: no stage has been started yet")


def _log_file(folder: Path, step: str | None) -> Path:
    """The log of a component's first rank, or of the supervisor where no component was started."""
    found = sorted(folder.glob(f"{step or '*'}.0.log"))
    if step and not found:
        known = ", ".join(sorted(p.name.removesuffix(".0.log") for p in folder.glob("*.0.log"))) or "none"
        raise UserError(f"{folder}: no log of step {step}; there is {known}")
    return found[0] if found else folder / "supervisor.log"


def cancel(args: argparse.Namespace) -> int:
    """Stop a run's stages; they save first."""
    from launcher.local import cancel_run
    from launcher.submit import cancel_jobs

    root, record = open_run(args)
    print(f"stopping run {record.run}; its stages save first", file=sys.stderr)
    stopped = cancel_jobs(root, record) if jobs_of(root, record) else cancel_run(root, record)
    if args.json:
        print_json({"run": record.run, "stopped": stopped})
    else:
        print(f"run {record.run}: {'stopped ' + ', '.join(stopped) if stopped else 'nothing was running'}")
    return 0
