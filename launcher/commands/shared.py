"""What several commands share: the store, the profile, the plan and the run that a command line names."""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import __version__, store
from launcher.caps import damaged_held
from launcher.cluster import Profile, load_profile, speak_to
from launcher.errors import UserError
from launcher.git import describe
from launcher.recipe import Recipe
from launcher.run_record import RunRecord, list_runs, read_run
from launcher.submitted import damaged_lines, read_submitted

if TYPE_CHECKING:
    from launcher.state import Jobs
    from launcher.status import RunStatus


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def root_of(args: argparse.Namespace) -> Path:
    """The store's root: `--root`, else PRISM_ROOT, else ./prism-root. Raises UserError where it is somebody else's."""
    root = Path(os.path.abspath(args.root or os.environ.get("PRISM_ROOT") or "prism-root"))
    store.refuse_foreign(root)
    return root


def profile_of(args: argparse.Namespace) -> Profile:
    if args.cluster == "":  # `--cluster "$CLUSTER"` with CLUSTER unset must not run here
        raise UserError("--cluster: is empty; name a cluster, or leave it out for this machine")
    return speak_to(load_profile(args.cluster or "local"))


def records_of(args: argparse.Namespace, profile: Profile, *, elsewhere: bool = False) -> list[RunRecord]:
    """Every run that the recipe on the command line describes, planned and checked. Raises UserError.

    `elsewhere`: the plan is only looked at, so what it reads may lie on another machine.
    """
    from launcher.recipe.load import load_recipes

    cluster = lasting_name(args.cluster or "local")
    recipes = load_recipes(args.recipe, args.overrides, args.name)
    return [_record(recipe, profile, cluster, elsewhere) for recipe in recipes]


def lasting_name(cluster: str) -> str:
    """A cluster as a run remembers it: a profile of the user's own by its full path."""
    own = Path(cluster).name != cluster or Path(cluster).suffix
    return os.path.abspath(cluster) if own else cluster


def print_warnings(records: Iterable[RunRecord], profile: Profile) -> None:
    """Tell on standard error what is most likely not meant."""
    from launcher.check import warnings_of

    told = dict.fromkeys(warning for record in records for warning in warnings_of(record.stages, profile))
    for warning in told:
        print(f"warning: {warning}", file=sys.stderr)


def _record(recipe: Recipe, profile: Profile, cluster: str, elsewhere: bool) -> RunRecord:
    from launcher.check import check_recipe
    from launcher.fit.auto import with_layouts
    from launcher.inputs import resolve_inputs, text_notes
    from launcher.plan import build_plan

    recipe = with_layouts(recipe, profile.gpu)
    inputs = resolve_inputs(recipe)
    planned = build_plan(recipe, inputs, profile.limits, profile.runtime)
    stages = tuple(replace(stage, spec=replace(stage.spec, notify=profile.notify)) for stage in planned)
    problems = [*check_recipe(recipe, stages, profile), *(a.message for a in inputs.absent if not elsewhere)]
    if problems:
        raise UserError(problems)
    return RunRecord(
        run=recipe.name,
        recipe=recipe.path,
        overrides=recipe.overrides,
        cluster=cluster,
        resolved=recipe.resolved,
        stages=stages,
        created=time.time(),
        versions={"prism-launch": __version__, "python": platform.python_version()},
        git=_git_hash(Path(recipe.path).parent),
        notes=text_notes(recipe),
    )


@functools.cache  # the runs of a matrix are of one folder
def _git_hash(folder: Path) -> str | None:
    """The commit of a folder, with `+` where it has changes; None outside a repository."""
    return describe(folder)


def open_run(args: argparse.Namespace) -> tuple[Path, RunRecord]:
    """The run named on the command line, the latest by default."""
    root = root_of(args)
    store.keep_shared(root)
    return root, find_run(root, args.run)


def find_run(root: Path, name: str | None) -> RunRecord:
    """The run of this name, the latest where none is named. What is damaged of its jobs' notes is said."""
    runs = list_runs(root)
    if name and ("/" in name or name in (".", "..")):
        raise UserError(f"{name}: not the name of a run; the runs under {root} are {', '.join(runs) or 'none'}")
    if not name and not runs:
        raise UserError(f"{root}: no run here yet; start one with `prism-launch run RECIPE`, or name the --root")
    store.refuse_foreign_run(root, name or runs[0])
    record = read_run(root, name or runs[0])
    for line in (*damaged_lines(root, record.run), *damaged_held(root, record.run)):
        print(f"prism-launch: {line}", file=sys.stderr)
    return record


def slurm_profile(args: argparse.Namespace) -> Profile:
    profile = profile_of(args)
    if profile.scheduler != "slurm":
        raise UserError(
            f"cluster {profile.name} has no Slurm; name one that has with --cluster (`prism-launch cluster list`)"
        )
    return profile


def jobs_of(root: Path, record: RunRecord) -> Jobs:
    """The run's jobs as Slurm tells them; none for a run that was never submitted."""
    return jobs_source(root, record)({})


def is_on_slurm(root: Path, record: RunRecord) -> bool:
    """Whether the run has, or may have, jobs of Slurm. Asks the Slurm of its profile from now on.

    Where the profile is gone or damaged it asks the shell's own, for a run that has been submitted.
    """
    try:
        if speak_to(load_profile(record.cluster)).scheduler == "slurm":
            return True
    except UserError:
        pass
    return bool(read_submitted(root, record.run))


def jobs_source(root: Path, record: RunRecord) -> Callable[[Jobs], Jobs]:
    """Asks Slurm for the run's jobs, but not again for those of which it is known how they ended."""
    from launcher.submit import stage_jobs

    if not is_on_slurm(root, record):
        return lambda ended: {}
    before: Jobs | None = None

    def ask(ended: Jobs) -> Jobs:
        nonlocal before
        before = stage_jobs(root, record, ended, before)
        return before

    return ask


def submission_times(root: Path, record: RunRecord) -> dict[str, float]:
    """When each job of a run was submitted, by its id."""
    return {s.job: s.time for s in read_submitted(root, record.run)}


def print_line(event: str, run: str, **facts: Any) -> None:
    """One line of the JSON that follows a run; docs/watching.md lists them."""
    print(json.dumps({"schema": 1, "event": event, "time": time.time(), "run": run, **facts}), flush=True)


def watching_hint(root: Path, run: str) -> str:
    """How to look at a run, in words to paste."""
    at = f"{shlex.quote(run)} --root {shlex.quote(str(root))}"
    return f"follow it with: prism-launch watch {at}"


def print_failures(status: RunStatus) -> None:
    """The last lines of failed stages' logs, and where the rest is."""
    from launcher.status import failure_tails

    for line in failure_tails(status):
        print(line, file=sys.stderr)
