"""Submitting a plan to Slurm: each stage after those it reads; what is done is skipped, what runs is joined.

ROOT/runs/NAME/jobs.jsonl               every job submitted for the run (`launcher.submitted`)
ROOT/runs/NAME/held.json                what a cap of the profile held back
ROOT/runs/NAME/stages/STAGE/job.sbatch  the script that was submitted last, of a stage or of its job array
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

from launcher import slurm, store
from launcher.caps import Room, read_held, room_now, write_held
from launcher.cluster import Profile
from launcher.errors import UserError, WorldError
from launcher.links import dependency, job_count, link_that_counts, newest_links, submit_links
from launcher.run_record import PlannedStage, RunRecord, claimed, write_run
from launcher.sbatch import Script, array_option, sbatch_text, scripts_of
from launcher.spec import stage_text
from launcher.state import Jobs, stage_states
from launcher.submitted import (
    JOBS,
    SCRIPT,
    Submitted,
    newest_by_id,
    read_lines,
    read_submitted,
    renamed,
    told_states,
    unheard,
    write_down,
)
from launcher.users import user_name

__all__ = [
    "JOBS",
    "Submitted",
    "cancel_jobs",
    "cancel_submitted",
    "read_submitted",
    "stage_jobs",
    "submit_held",
    "submit_run",
]

#: How long to wait for another process, perhaps another person's, that is submitting the same run.
PATIENCE_S = 60.0


def _newest(record: RunRecord, known: Iterable[Submitted]) -> dict[str, list[Submitted]]:
    """The jobs of every stage's newest submission: one, or the links of a chain."""
    planned = {s.spec.stage: s.spec.fingerprint for s in record.stages}
    lines: dict[str, list[Submitted]] = {}
    for line in known:
        if planned.get(line.stage) == line.fingerprint:
            lines.setdefault(line.stage, []).append(line)
    return {stage: newest_links(of) for stage, of in lines.items()}


def stage_jobs(root: Path, record: RunRecord, ended: Jobs | None = None, before: Jobs | None = None) -> Jobs:
    """The newest job of every stage as Slurm tells it, also where nobody heard that Slurm took it in.

    A job that nothing knows any more stands as state GONE. Those in `ended` are not asked for again. `before` is the
    answer of a moment ago: a look that follows another asks for what has changed since, as a rule in one question.
    """
    written = {line.job for line in read_submitted(root, record.run)}
    is_news = before is None or any(job.id not in written for job in before.values())
    own = slurm.own_scripts() if is_news else None
    links = _newest(record, _all_jobs(root, record.run, own or {}))
    over = {job.id: job for job in (ended or {}).values()}
    seen = {job.id for job in (before or {}).values() if job.is_active}
    asked = [s for of in links.values() for s in of if s.job not in over]
    known = over | told_states(root, record.run, asked, own, seen)
    specs = {s.spec.stage: s.spec for s in record.stages}
    return {stage: link_that_counts(root, specs[stage], [s.job for s in of], known) for stage, of in links.items()}


def _all_jobs(root: Path, run: str, own: Mapping[str, Sequence[str]]) -> list[Submitted]:
    """The jobs of a run that are written down and those that nobody heard of, by `slurm.own_scripts()`."""
    return newest_by_id([*read_submitted(root, run), *unheard(root, run, own)])


def submit_run(root: Path, record: RunRecord, profile: Profile) -> dict[str, str]:
    """Submit every stage, placed on the cluster, that is neither done nor in the queue; returns this call's job ids.

    What the profile's caps hold back is noted (`launcher.caps.read_held`). Raises UserError where another process is
    submitting this run or jobs of another plan of it are in the queue, and WorldError with what sbatch said; what has
    been submitted by then stays, and the next call joins it.
    """
    with claimed(root, record.run, patience_s=PATIENCE_S):
        find_lost(root, record.run)
        _refuse_other_plans(root, record)
        write_run(root, record)
        return _submit_stages(root, record, profile, {s.spec.stage for s in record.stages})


def submit_held(root: Path, record: RunRecord, profile: Profile) -> dict[str, str]:
    """Submit what was held back and now has room, and nothing else; returns this call's job ids.

    Does nothing where another process submits this run. What sbatch refuses for good is noted and not tried again.
    """
    held = read_held(root, record.run)
    if not held:
        return {}
    try:
        with claimed(root, record.run):
            find_lost(root, record.run)
            return _submit_stages(root, record, profile, set(held), later=True)
    except UserError:
        return {}


def find_lost(root: Path, run: str) -> None:
    """Write down jobs that Slurm took in without our hearing of it. Raises NoAnswer where the controller is silent."""
    lost = unheard(root, run, slurm.own_scripts())
    if lost:
        write_down(root, run, lost)


def _refuse_other_plans(root: Path, record: RunRecord) -> None:
    planned = {s.spec.stage: s.spec.fingerprint for s in record.stages}
    others = [s for s in read_submitted(root, record.run) if planned.get(s.stage) != s.fingerprint]
    known = told_states(root, record.run, others)
    problems = [
        f"job {s.job}: stage {s.stage} of an earlier plan is {known[s.job].state.lower()}; "
        f"`prism-launch cancel {record.run}` first"
        for s in others
        if s.job in known and known[s.job].is_active
    ]
    if problems:
        raise UserError(problems)


# --------------------------------------------------------------------------------------------------------- submitting


@dataclass
class _Submission:
    """One pass over a plan: what waits in the queue, what this pass submits and what it holds back."""

    root: Path
    profile: Profile
    room: Room
    done: set[str]
    elements: dict[str, set[str]]  # of every array of the run, by its job
    later: bool  # nobody is there to read what sbatch says: it is noted
    waiting_for: dict[str, str] = field(default_factory=dict)  # job ids of stages that are not done
    submitted: dict[str, str] = field(default_factory=dict)
    held: dict[str, str] = field(default_factory=dict)

    def submit(self, script: Script, stages: Sequence[PlannedStage]) -> None:
        """Submit these stages of a script, those that wait for the same jobs together."""
        groups: dict[tuple[str, ...], list[PlannedStage]] = {}
        for stage in stages:
            missing = [d for d in stage.depends if d not in self.done and d not in self.waiting_for]
            if missing:
                name = missing[0]
                failed = f"not submitted: {name}, which it reads, has not been made; `prism-launch run` submits both"
                self.held[stage.spec.stage] = self.held.get(name, failed)
            else:
                groups.setdefault(self._after(stage), []).append(stage)
        for after, group in groups.items():
            self._submit_group(script, group, after)

    def _after(self, stage: PlannedStage) -> tuple[str, ...]:
        """The jobs that a stage waits for; an array of which it waits for every element stands as a whole."""
        jobs = dict.fromkeys(self.waiting_for[d] for d in stage.depends if d in self.waiting_for)
        whole = {array for array, elements in self.elements.items() if elements <= set(jobs)}
        return tuple(dict.fromkeys(a if (a := job.partition("_")[0]) in whole else job for job in jobs))

    def _submit_group(self, script: Script, group: Sequence[PlannedStage], after: Sequence[str]) -> None:
        # More than one: a chain, which is in no array, or the parts of a heterogeneous job.
        links = job_count(script.stages[0].spec.limits) * len(script.stages[0].job_parts)
        count = self.room.fits(len(group) * links, links) // links
        while count:
            try:
                jobs = self._call(script, group[:count], after)
            except slurm.SubmitLimit:
                count //= 2  # an array may be too large as a whole
                self.room.refused = True
                continue
            except slurm.NoAnswer:
                raise
            except WorldError as error:
                if not self.later:
                    raise
                self.held |= {s.spec.stage: f"not submitted: {error}; `prism-launch run` tries again" for s in group}
                return
            for job in jobs.values() if script.is_array else ():
                self.elements.setdefault(job.partition("_")[0], set()).add(job)
            self.waiting_for |= jobs
            self.submitted |= jobs
            self.room.take(count * links, links)
            break
        self.held |= {stage.spec.stage: self.room.why(links) for stage in group[count:]}

    def complete(self, stage: PlannedStage, links: Sequence[Submitted]) -> None:
        """Submit the links that a chain in the queue lacks, since whoever submitted it was killed between two."""
        name, count = stage.spec.stage, job_count(stage.spec.limits) - len(links)
        if not links or count <= 0 or name not in self.waiting_for or self.room.fits(count, count) < count:
            return
        self.waiting_for[name] = _submit_stage(self.root, stage, self.profile, self._after(stage), links)
        self.submitted[name] = self.waiting_for[name]
        self.room.take(count, count)

    def _call(self, script: Script, stages: Sequence[PlannedStage], after: Sequence[str]) -> dict[str, str]:
        if script.is_array:
            return _submit_array(self.root, script, stages, self.profile, after)
        return {stages[0].spec.stage: _submit_stage(self.root, stages[0], self.profile, after)}


def _submit_stages(
    root: Path, record: RunRecord, profile: Profile, wanted: set[str], later: bool = False
) -> dict[str, str]:
    known = stage_jobs(root, record)
    lines = read_submitted(root, record.run)
    links = _newest(record, lines)
    # A job may still be completing when its attempt has said how it ended: nothing more comes of that one.
    states = {s.stage: s.state for s in stage_states(root, record, jobs=known)}
    elements: dict[str, set[str]] = {}
    for job in (s.job for s in lines if "_" in s.job):
        elements.setdefault(job.partition("_")[0], set()).add(job)
    done = {name for name, state in states.items() if state == "done"}
    now = _Submission(root, profile, _room(root, profile), done, elements, later)
    busy = {n for n in known if states[n] in ("queued", "running")}
    # Never on a job that has ended: once Slurm has forgotten it, `afterok` holds even if it failed.
    now.waiting_for = {n: links[n][-1].job if n in links else known[n].id for n in busy if known[n].is_active}
    now.done.update(busy - now.waiting_for.keys())
    try:
        for script in scripts_of(record.stages, profile):
            for stage in script.stages:
                now.complete(stage, links.get(stage.spec.stage, ()))
            names = wanted - now.done - set(now.waiting_for)
            now.submit(script, [s for s in script.stages if s.spec.stage in names])
    finally:
        write_held(root, record.run, now.held)
        if now.submitted:
            _note_scripts(root, record.run, {line.number for line in lines})
    return now.submitted


def _note_scripts(root: Path, run: str, before: Set[str]) -> None:
    """Note what Slurm calls the scripts of the jobs submitted since `before`: a site's sbatch may submit a copy."""
    with contextlib.suppress(WorldError):
        own = slurm.own_scripts()
        copies = renamed(root, run, [s for s in read_submitted(root, run) if s.number not in before], own)
        if copies:
            write_down(root, run, copies)


def _room(root: Path, profile: Profile) -> Room:
    calls = 0 if profile.submit_rate is None else _calls_in_minute(root, time.time())
    jobs = 0 if profile.max_submit is None else slurm.count_jobs(user_name())
    return room_now(profile, calls, jobs)


def _calls_in_minute(root: Path, now: float) -> int:
    """Calls of sbatch for all runs of a root in the last minute; those for an array's elements are one.

    Those of a later time are old: a clock was set back.
    """
    recent = [p for p in (root / "runs").glob(f"*/{JOBS}") if p.stat().st_mtime >= now - 60]
    lines = [line for path in recent for _, line in read_lines(path) if line]
    return len({line.number for line in lines if abs(now - line.time) <= 60})


def _submit_stage(
    root: Path, stage: PlannedStage, profile: Profile, after: Sequence[str], links: Sequence[Submitted] = ()
) -> str:
    folder = store.stage_dir(root, stage.spec.run, stage.spec.stage)
    store.write_atomic(folder / "stage.json", stage_text(stage.spec))
    script = folder / SCRIPT
    store.write_atomic(script, sbatch_text(stage, profile, root))

    def written(job: str, chain: str | None) -> None:
        write_down(root, stage.spec.run, [_submitted(stage, script, job, chain)])

    return submit_links(str(script), stage.spec.limits, after, written, _numbers(root, stage), [s.job for s in links])


def _submit_array(
    root: Path, script: Script, stages: Sequence[PlannedStage], profile: Profile, after: Sequence[str]
) -> dict[str, str]:
    """Submit these elements of a script's job array; returns the id of each, ARRAYJOB_INDEX."""
    for stage in stages:
        folder = store.stage_dir(root, stage.spec.run, stage.spec.stage)
        store.write_atomic(folder / "stage.json", stage_text(stage.spec))
    path = _script_file(root, script)
    store.write_atomic(path, script.text(profile, root))
    indexes = script.indexes(stages)
    options = (f"--array={array_option(indexes, profile)}", *dependency(after))
    job = slurm.submit(str(path), *options, known=_numbers(root, stages[0]))
    found = [_submitted(stage, path, f"{job}_{i}") for stage, i in zip(stages, indexes, strict=True)]
    write_down(root, stages[0].spec.run, found)
    return {s.stage: s.job for s in found}


def _script_file(root: Path, script: Script) -> Path:
    return script.folder(root) / (f"{script.name}.sbatch" if script.is_array else SCRIPT)


def _numbers(root: Path, stage: PlannedStage) -> set[str]:
    """The jobs of the stage's run that are written down."""
    return {line.number for line in read_submitted(root, stage.spec.run)}


def _submitted(stage: PlannedStage, script: Path, job: str, chain: str | None = None) -> Submitted:
    return Submitted(stage.spec.stage, stage.spec.fingerprint, job, time.time(), user_name(), chain, str(script))


# ------------------------------------------------------------------------------------------------------------- cancel


def cancel_submitted(root: Path, record: RunRecord) -> list[str]:
    """`cancel_jobs` when nobody submits the run any more, with what was taken in unheard.

    Raises UserError where another process goes on submitting it for too long; what it had submitted by then is ended.
    """
    try:
        with claimed(root, record.run, patience_s=PATIENCE_S):
            find_lost(root, record.run)
            return cancel_jobs(root, record)
    except UserError as error:
        stopped = ", ".join(cancel_jobs(root, record)) or "nothing"
        raise UserError(f"stopped {stopped}, but the run is still being submitted: {error}") from None
    except OSError:  # a store that is not ours to write
        return cancel_jobs(root, record)


def cancel_jobs(root: Path, record: RunRecord) -> list[str]:
    """Cancel every job of a run that waits or runs, and forget what was held back; returns the stages' names.

    Raises WorldError where Slurm refuses, with whose jobs they are.
    """
    write_held(root, record.run, {})
    own = slurm.own_scripts()
    jobs = _all_jobs(root, record.run, own)
    known = told_states(root, record.run, jobs, own)
    active = [s for s in jobs if s.job in known and known[s.job].is_active]
    try:
        slurm.cancel(s.job for s in active)
    except WorldError as error:
        raise WorldError(f"{error}{_whose(active)}") from None
    # A job may still be completing when what it made is whole.
    made = {s.spec.stage for s in record.stages if store.read_receipt(root, s.spec.artifact) is not None}
    order = {s.spec.stage: i for i, s in enumerate(record.stages)}
    names = dict.fromkeys(s.stage for s in active if s.stage not in made)
    return sorted(names, key=lambda name: order.get(name, len(order)))


def _whose(active: Iterable[Submitted]) -> str:
    others = [f"{s.job} ({s.stage}) of {s.user}" for s in active if s.user not in ("", user_name())]
    return f"; not yours to cancel: job {', '.join(others)}; ask them, or an operator" if others else ""
