"""What several commands share: the store, the profile, the plan and the run that a command line names."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import __version__, store
from launcher.cluster import Profile, load_profile, speak_to
from launcher.errors import UserError
from launcher.recipe import Recipe
from launcher.run_record import RunRecord, list_runs, read_run

if TYPE_CHECKING:
    from launcher.state import Jobs
    from launcher.status import RunStatus


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def root_of(args: argparse.Namespace) -> Path:
    """The store's root: `--root`, else PRISM_ROOT, else ./prism-root."""
    return Path(os.path.abspath(args.root or os.environ.get("PRISM_ROOT") or "prism-root"))


def profile_of(args: argparse.Namespace) -> Profile:
    if args.cluster == "":  # `--cluster "$CLUSTER"` with CLUSTER unset must not run here
        raise UserError("--cluster: is empty; name a cluster, or leave it out for this machine")
    return speak_to(load_profile(args.cluster or "local"))


def records_of(args: argparse.Namespace, profile: Profile, *, elsewhere: bool = False) -> list[RunRecord]:
    """Every run that the recipe on the command line describes, planned and checked. Raises UserError.

    `elsewhere`: the plan is only looked at, so what it reads may lie on another machine.
    """
    from launcher.recipe.load import load_recipes

    # A profile of the user's own is found again by its path, wherever the next command is typed.
    named = args.cluster or "local"
    cluster = os.path.abspath(named) if Path(named).name != named or Path(named).suffix else named
    recipes = load_recipes(args.recipe, args.overrides, args.name)
    return [_record(recipe, profile, cluster, elsewhere) for recipe in recipes]


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
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def open_run(args: argparse.Namespace) -> tuple[Path, RunRecord]:
    """The run named on the command line, the latest by default."""
    root = root_of(args)
    store.keep_shared(root)
    return root, find_run(root, args.run)


def find_run(root: Path, name: str | None) -> RunRecord:
    """The run of this name, the latest where none is named."""
    runs = list_runs(root)
    if name and ("/" in name or name in (".", "..")):
        raise UserError(f"{name}: not the name of a run; the runs under {root} are {', '.join(runs) or 'none'}")
    if not name and not runs:
        raise UserError(f"{root}: no run here yet; start one with `prism-launch run RECIPE`, or name the --root")
    return read_run(root, name or runs[0])


def slurm_profile(args: argparse.Namespace) -> Profile:
    profile = profile_of(args)
    if profile.scheduler != "slurm":
        raise UserError(
            f"cluster {profile.name} has no Slurm; name one that has with --cluster (`prism-launch cluster list`)"
        )
    return profile


def jobs_of(root: Path, record: RunRecord) -> Jobs:
    """The run's jobs as Slurm tells them; none for a run that was never submitted."""
    from launcher.submit import read_submitted, stage_jobs

    if not read_submitted(root, record.run):
        return {}
    _speak_as(record)
    return stage_jobs(root, record)


def _speak_as(record: RunRecord) -> None:
    """Ask the Slurm of the run's profile; where that is gone or damaged, the shell's own."""
    with contextlib.suppress(UserError):
        speak_to(load_profile(record.cluster))


def jobs_source(root: Path, record: RunRecord) -> Callable[[Jobs], Jobs]:
    """Asks Slurm for the run's jobs, but not again for those of which it is known how they ended."""
    from launcher.submit import read_submitted, stage_jobs

    _speak_as(record)
    return lambda known: stage_jobs(root, record, known) if read_submitted(root, record.run) else {}


def submission_times(root: Path, record: RunRecord) -> dict[str, float]:
    """When each job of a run was submitted, by its id."""
    from launcher.submit import read_submitted

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
