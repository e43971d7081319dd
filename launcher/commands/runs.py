"""Commands that act on runs: run, resume, cancel, report. Those that look at them are in `watching`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launcher import store
from launcher.caps import read_held, waits_for_room
from launcher.cluster import Profile, load_profile, place_record, speak_to
from launcher.commands.shared import (
    is_on_slurm,
    jobs_of,
    jobs_source,
    open_run,
    print_failures,
    print_json,
    print_line,
    print_warnings,
    profile_of,
    records_of,
    root_of,
    slurm_profile,
    submission_times,
    watching_hint,
)
from launcher.errors import UserError, WorldError
from launcher.run_record import RunRecord, list_runs, obstacles_of, read_run, refuse_unbuilt
from launcher.snapshot import refuse_gone, with_snapshot
from launcher.terminal import console

if TYPE_CHECKING:
    from launcher.state import Jobs


def run(args: argparse.Namespace) -> int:
    """Run or submit what is not done, and follow it."""
    profile = profile_of(args)
    if args.dry_run:
        from launcher.render import dry_run

        profile = slurm_profile(args)
        for record in records_of(args, profile, elsewhere=True):
            print(dry_run(record, profile, root_of(args)))
        return 0
    records = _runnable(args, profile)
    _refuse_absent_secrets(records)
    print_warnings(records, profile)
    root = store.open_root(root_of(args), profile.share_group)
    _refuse_elsewhere(root, records, profile)
    if profile.scheduler == "slurm":
        from launcher.limits import refuse_impossible

        _tell(refuse_impossible(root, [place_record(r, profile, root) for r in records], profile))
        records = [place_record(with_snapshot(root, r, profile), profile, root) for r in records]
        return _run_on_slurm(root, records, profile, args)
    records = [place_record(r, profile, root) for r in records]
    worst = 0
    for record in records:
        code = _run_here(root, record, profile, args)
        if code == 130:  # interrupted: what the matrix has left is not begun
            return code
        worst = max(worst, code)
    return worst


def _tell(notes: Iterable[str]) -> None:
    for note in notes:
        print(note, file=sys.stderr)


def _runnable(args: argparse.Namespace, profile: Profile) -> list[RunRecord]:
    """The recipe's runs. Raises UserError with all that is wrong and all that cannot be run yet."""
    try:
        records = records_of(args, profile)
    except UserError as error:
        unbuilt = []
        with contextlib.suppress(UserError):
            planned = records_of(args, profile, elsewhere=True)
            unbuilt = [line for line in obstacles_of(planned) if "not built" in line]
        raise UserError([*unbuilt, *error.problems]) from None
    refuse_unbuilt(records)
    return records


def _refuse_absent_secrets(records: Sequence[RunRecord]) -> None:
    named = {name for record in records for stage in record.stages for name in stage.spec.secrets}
    absent = sorted(name for name in named if not os.environ.get(name))
    if absent:
        raise UserError(f"secrets: {', '.join(absent)} not set in this shell; export it, then run again")


def _refuse_elsewhere(root: Path, records: Sequence[RunRecord], profile: Profile) -> None:
    """Refuse runs whose jobs go on in another Slurm: the new record would forget where they are."""
    problems = []
    for name in sorted({record.run for record in records} & set(list_runs(root))):
        cluster, jobs = _active_elsewhere(root, name, profile)
        if jobs:
            problems.append(
                f"run {name}: its jobs {', '.join(jobs)} go on on cluster {cluster}; stop them first "
                f"(`prism-launch cancel {name}`), join them with --cluster {cluster}, or give another --name"
            )
    if problems:
        raise UserError(problems)


def _active_elsewhere(root: Path, name: str, profile: Profile) -> tuple[str, list[str]]:
    """A run's cluster, and its jobs there that wait or run, if that has another Slurm than the profile.

    No jobs where the record, the cluster or its controller is gone: then the claims on artifacts guard alone.
    """
    shell = os.environ.get("SLURM_CONF")
    try:
        before = read_run(root, name)
        other = load_profile(before.cluster)
        if (other.scheduler, other.slurm_conf) == (profile.scheduler, profile.slurm_conf):
            return before.cluster, []
        return before.cluster, sorted({job.id for job in jobs_of(root, before).values() if job.is_active})
    except (UserError, WorldError):
        return "", []
    finally:  # it asked as the other cluster
        os.environ.pop("SLURM_CONF", None)
        os.environ.update({"SLURM_CONF": shell} if shell is not None else {})


def _run_on_slurm(root: Path, records: Sequence[RunRecord], profile: Profile, args: argparse.Namespace) -> int:
    """Submit every run, then follow them one by one; leaving with Ctrl-C stops nothing."""
    from launcher.submit import submit_run

    for record in records:
        jobs = submit_run(root, record, profile)
        held = read_held(root, record.run)
        if args.json:
            print_line("submitted", record.run, jobs=jobs, held=held)
        else:
            lines = [
                *(f"{stage}: job {job}\n" for stage, job in jobs.items()),
                *(f"{s}: {why}\n" for s, why in held.items()),
            ]
            print("".join(lines), end="", flush=True)
        if args.detach and not args.json:
            print(watching_hint(root, record.run))
    if args.detach:
        return 0
    return max(_follow(root, record, profile, args) for record in records)


def _follow(root: Path, record: RunRecord, profile: Profile, args: argparse.Namespace) -> int:
    """Follow a run to its end; what a cap holds back is submitted as room comes."""
    from launcher.submit import submit_held
    from launcher.watch import watch_run

    source = jobs_source(root, record)

    def ask(known: Jobs) -> Jobs:
        submit_held(root, record, profile)
        return source(known)

    try:
        status = watch_run(root, record, ask, profile.poll_s, as_json=args.json)
        while waits_for_room(root, record.run):
            time.sleep(profile.poll_s)
            with contextlib.suppress(WorldError):  # a controller that does not answer for a while
                if submit_held(root, record, profile):
                    status = watch_run(root, record, ask, profile.poll_s, as_json=args.json)
    except KeyboardInterrupt:
        print(f"left; its jobs go on. {watching_hint(root, record.run)}", file=sys.stderr)
        raise
    if status.state != "done":
        print_failures(status)
        return 1
    _finish(root, record, args)
    return 0


def _run_here(root: Path, record: RunRecord, profile: Profile, args: argparse.Namespace) -> int:
    from launcher.local import run_local

    code = run_local(root, record, profile.slots, detach=args.detach, as_json=args.json)
    if code == 0 and not args.detach:
        _finish(root, record, args)
    return code


def _finish(root: Path, record: RunRecord, args: argparse.Namespace) -> None:
    """What a finished run ends with: the result table and where the report is."""
    from launcher.report import collect, render_table, write_report

    submitted = submission_times(root, record)
    page = write_report(root, record, submitted)
    if args.json:
        print_line("report", record.run, path=str(page))
        return

    console().print(render_table(collect(root, record, submitted)))
    print(f"report: {page}")


def resume(args: argparse.Namespace) -> int:
    """Go on with a run, as it was planned."""
    root, record = open_run(args)
    _check_versions(record)
    refuse_unbuilt([record])
    _refuse_absent_secrets([record])
    profile = speak_to(load_profile(record.cluster))
    if profile.scheduler == "slurm":
        from launcher.limits import refuse_impossible

        refuse_gone(root, record)
        _tell(refuse_impossible(root, [record], profile))
        return _run_on_slurm(root, [record], profile, args)
    return _run_here(root, record, profile, args)


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
        print_json(collect(root, record, submission_times(root, record)))
    else:
        _finish(root, record, args)
    return 0


def cancel(args: argparse.Namespace) -> int:
    """Stop a run's stages; they save first."""
    from launcher.local import cancel_run
    from launcher.submit import cancel_submitted

    root, record = open_run(args)
    print(f"stopping run {record.run}; its stages save first", file=sys.stderr)
    stopped = cancel_submitted(root, record) if is_on_slurm(root, record) else cancel_run(root, record)
    if args.json:
        print_json({"run": record.run, "stopped": stopped})
    else:
        print(f"run {record.run}: {'stopped ' + ', '.join(stopped) if stopped else 'nothing was running'}")
    return 0
