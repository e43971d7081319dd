"""Commands that look at runs: status, watch, logs; and clean, which removes what they no longer need."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING

from launcher import store
from launcher.cluster import load_profile
from launcher.commands.shared import (
    find_run,
    jobs_of,
    jobs_source,
    open_run,
    print_failures,
    print_json,
    root_of,
)
from launcher.errors import UserError, WorldError
from launcher.run_record import PlannedStage, RunRecord, list_runs, read_run
from launcher.submitted import living, read_submitted, unheard
from launcher.terminal import console

if TYPE_CHECKING:
    from launcher.attempts import Attempt
    from launcher.clean import Uses, Waste
    from launcher.logs import Look
    from launcher.state import Jobs
    from launcher.status import RunStatus
    from launcher.watch import Queue


def status(args: argparse.Namespace) -> int:
    """What each stage of a run is doing."""
    from launcher.watch import tell_unheard

    root, record = open_run(args)
    jobs, trouble = _jobs_or_trouble(root, record)
    now = _status_of(root, record, jobs, trouble)
    for line in tell_unheard(root, record, now, jobs):
        print(f"prism-launch: {line}", file=sys.stderr)
    if args.json:
        from launcher.spec import encode

        if trouble:
            print(f"prism-launch: {trouble}", file=sys.stderr)
        print_json(encode(now))
        return 0

    from launcher.status_table import StatusTable

    console().print(StatusTable(now))
    sys.stdout.flush()
    print_failures(now)
    return 0


def _status_of(root: Path, record: RunRecord, jobs: Jobs, trouble: str | None) -> RunStatus:
    from launcher.status import run_status

    return run_status(root, record, jobs, trouble)


def _jobs_or_trouble(root: Path, record: RunRecord) -> tuple[Jobs, str | None]:
    """The run's jobs, or none and why: a laptop sees the store alone, and a controller may be silent."""
    try:
        return jobs_of(root, record), None
    except WorldError as error:
        return {}, f"{error}; what is shown is from the run's files alone"


def watch(args: argparse.Namespace) -> int:
    """Follow a run; leaving with Ctrl-C does not stop it."""
    from launcher.watch import watch_run

    root, record = open_run(args)
    now = watch_run(root, record, jobs_source(root, record), _poll_s(record), as_json=args.json)
    print_failures(now)
    return 0 if now.state == "done" else 1


def _poll_s(record: RunRecord) -> float:
    """Seconds between looks, by the profile."""
    try:
        profile = load_profile(record.cluster)
    except UserError:  # gone, or on another machine: the run can be looked at all the same
        return 10.0
    return profile.poll_s if profile.scheduler == "slurm" else 0.5


# ---------------------------------------------------------------------------------------------------------------- logs


def logs(args: argparse.Namespace) -> int:
    """Print the end of a stage's log, and go on with it where asked."""
    from launcher.logs import follow
    from launcher.watch import Queue

    root, record, name = _run_and_stage(args)
    stage = record.stage(name) if name else _stage_of_interest(root, record)
    if not args.follow:
        look = _look(root, stage, args, False)
        follow(lambda: look, args.lines, 0.0)
        return 0
    queue = Queue(jobs_source(root, record), _poll_s(record))
    follow(lambda: _look(root, stage, args, _goes_on(root, record, stage, queue)), args.lines, 0.5)
    return 0


def _run_and_stage(args: argparse.Namespace) -> tuple[Path, RunRecord, str | None]:
    """What `[RUN] [STAGE]` and `--run` name. One word is a stage of the latest run, else a run."""
    root, words = root_of(args), args.names
    if len(words) > (1 if args.run else 2):
        raise UserError(f"{' '.join(words)}: give a STAGE, or RUN and STAGE")
    if args.run or not words:
        return root, find_run(root, args.run), words[0] if words else None
    if len(words) == 2:
        return root, find_run(root, words[0]), words[1]
    known = list_runs(root)
    latest = find_run(root, None)
    if words[0] in known and words[0] not in {s.spec.stage for s in latest.stages}:
        return root, find_run(root, words[0]), None
    return root, latest, words[0]


def _stage_of_interest(root: Path, record: RunRecord) -> PlannedStage:
    """The stage that failed, else one that runs, else the last that was started."""
    from launcher.state import stage_states

    states = stage_states(root, record)
    for wanted in ("failed", "running", "interrupted", "stopped", "done"):
        found = [s for s in states if s.state == wanted and s.attempt]
        if found:
            return record.stage(max(found, key=lambda s: s.started or 0).stage)
    begun = [stage for stage in record.stages if _has_batch_log(root, stage)]
    if begun:  # its supervisor never was: why stands there
        return begun[0]
    raise UserError(f"run {record.run}: no stage has been started yet")


def _has_batch_log(root: Path, stage: PlannedStage) -> bool:
    from launcher.logs import NoLogYet

    try:
        return _without_attempt(root, stage).exists()
    except NoLogYet:
        return False


def _look(root: Path, stage: PlannedStage, args: argparse.Namespace, goes_on: bool) -> Look:
    """Where the log lies now. Raises UserError where there is none, unless it may still come."""
    from launcher.attempts import attempts_at
    from launcher.logs import Look, NoLogYet, find_log, supervisor_log

    found = attempts_at(root, stage.spec)
    if args.attempt:
        found = [a for a in found if a.name == args.attempt] or _no_such_attempt(stage, args.attempt, found)
    try:
        if not found:
            return Look(None, True) if goes_on else Look(_without_attempt(root, stage), False)
        path = find_log(stage.spec, found[-1], args.component, args.rank)
    except NoLogYet as error:
        if goes_on:
            return Look(None, True)
        raise UserError(str(error)) from None
    if goes_on and not args.component and path == supervisor_log(found[-1]):
        return Look(None, True)  # its components have not been started yet
    # A named attempt that has ended gets no more lines.
    return Look(path, goes_on and not (args.attempt and found[-1].end is not None))


def _no_such_attempt(stage: PlannedStage, name: str, found: list[Attempt]) -> list[Attempt]:
    known = ", ".join(a.name for a in found) or "none"
    raise UserError(f"stage {stage.spec.stage}: no attempt {name}; there is {known}")


def _without_attempt(root: Path, stage: PlannedStage) -> Path:
    """The batch log of a job whose supervisor never began."""
    from launcher.logs import NoLogYet, batch_log

    spec = stage.spec
    jobs = [s.job for s in read_submitted(root, spec.run) if (s.stage, s.fingerprint) == (spec.stage, spec.fingerprint)]
    path = batch_log(root, spec, jobs[-1]) if jobs else None
    if path is None:
        raise NoLogYet(f"stage {spec.stage} of run {spec.run} has no log: it has not been started in this run")
    return path


def _goes_on(root: Path, record: RunRecord, stage: PlannedStage, queue: Queue) -> bool:
    """Whether more may come of the stage: it runs, waits for its turn, or is about to be tried again."""
    from launcher.attempts import newest_attempt
    from launcher.state import stage_states

    queue.look()
    states = {s.stage: s.state for s in stage_states(root, record, jobs=queue.jobs)}
    state = states[stage.spec.stage]
    if state in ("running", "queued") or (queue.trouble is not None and state != "done"):
        return True
    driver = store.claim_holder(store.driver_claim(root, record.run))
    if driver is None or store.is_alive(driver) is False:
        return False
    newest = newest_attempt(root, stage.spec)
    again = newest is not None and (newest.end is None or newest.wants_another)
    return state == "waiting" or (state != "done" and again)


# --------------------------------------------------------------------------------------------------------------- clean


def clean(args: argparse.Namespace) -> int:
    """Remove, or with --dry-run only show, what nothing needs any more."""
    from launcher import clean as cleaning

    root = root_of(args)
    if args.run and args.artifacts:
        raise UserError("--artifacts looks at the whole store: leave RUN out")
    if args.forget and not args.run:
        raise UserError("--forget removes the record of one run: name it")
    if args.run:
        find_run(root, args.run)  # or say which there are
    uses = _uses(root)
    if args.forget:
        found = [cleaning.run_as_waste(root, args.run, uses.busy)]
        if not args.dry_run:
            cleaning.forget(root, found[0])
        return _show_cleaned(args, root, found, [], ())

    def look() -> list[Waste]:
        return cleaning.find_waste(cleaning.read_store(root), uses.busy, args.run, args.artifacts)

    found, held = (look(), []) if args.dry_run else cleaning.remove(look(), root, look, uses.lives)
    return _show_cleaned(args, root, found, held, cleaning.read_store(root).unreadable)


def _uses(root: Path) -> Uses:
    """Who uses what under a root, by processes and by Slurm's word."""
    from launcher import clean as cleaning

    names = [p.name for p in (root / "runs").glob("*") if p.is_dir()]
    submitted = {name: {s.job for s in read_submitted(root, name)} for name in names}
    claimed = {owner.job for owner in cleaning.owners(root) if owner.job}
    active = _active_jobs(root, _jobs_by_slurm(root, submitted, claimed), submitted)
    return cleaning.uses(root, submitted, active)


def _jobs_by_slurm(root: Path, submitted: Mapping[str, Set[str]], claimed: Set[str]) -> Mapping[str, Set[str]]:
    """The jobs to ask each `slurm.conf` for, the shell's own (or the site's, empty) first; none without runs on Slurm.

    A claim names no cluster: jobs of which no run tells are asked of all.
    """
    shell = os.environ.get("SLURM_CONF", "")
    found: dict[str, set[str]] = {}
    for run, jobs in submitted.items():
        conf = _slurm_conf(root, run)
        if jobs or conf is not None:
            found.setdefault(conf or shell, set()).update(jobs)
    stray = claimed - set().union(*found.values())
    if stray:
        found.setdefault(shell, set())
    return {conf: found[conf] | stray for conf in sorted(found, key=lambda conf: conf != shell)}


def _slurm_conf(root: Path, run: str) -> str | None:
    """The `slurm_conf` of a run's cluster, "" for the site's own; None where it has no Slurm or is forgotten."""
    try:
        profile = load_profile(read_run(root, run).cluster)
    except UserError:
        return None
    return profile.slurm_conf or "" if profile.scheduler == "slurm" else None


def _active_jobs(root: Path, asked: Mapping[str, Set[str]], submitted: Mapping[str, set[str]]) -> set[str]:
    """Jobs that wait or run, by the Slurm of each; all of one that does not answer, so that nothing of theirs goes.

    Those that a Slurm took in unheard are added to `submitted`.
    """
    from launcher import slurm

    active: set[str] = set()
    for conf, jobs in asked.items():
        if conf:
            os.environ["SLURM_CONF"] = conf
        try:
            active |= living(root, jobs)
            own = slurm.own_scripts()
            for run, known in submitted.items():
                lost = {line.job for line in unheard(root, run, own)}
                known |= lost
                active |= living(root, lost)
        except WorldError as error:
            print(f"prism-launch: {error}; runs that have jobs there are left alone", file=sys.stderr)
            active |= jobs
    return active


def _show_cleaned(
    args: argparse.Namespace, root: Path, found: list[Waste], held: list[Waste], unreadable: Sequence[str]
) -> int:
    from launcher.units import format_bytes

    total = sum(w.bytes for w in found)
    if args.json:
        body = {"schema": 1, "root": str(root), "dry_run": args.dry_run, "bytes": total}
        lists = {"removed": found, "held": held}
        rows = {k: [{"path": str(w.path), "bytes": w.bytes, "why": w.why} for w in v] for k, v in lists.items()}
        print_json({**body, **rows, "unreadable_runs": list(unreadable)})
        return 0
    for waste in found:
        print(f"{format_bytes(waste.bytes):>11}  {os.path.relpath(waste.path, root)}  ({waste.why})")
    for waste in held:
        print(f"kept: {os.path.relpath(waste.path, root)}: another process holds it")
    for name in unreadable:
        print(f"run {name} cannot be read, so no artifact that it might name is touched", file=sys.stderr)
    print(f"{'would free' if args.dry_run else 'freed'} {format_bytes(total)} under {root}")
    return 0
