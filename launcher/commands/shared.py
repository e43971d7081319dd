"""What several commands share: the store, the profile, the plan and the run that a command line names."""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import __version__
from launcher.cluster import Profile, load_profile
from launcher.errors import UserError
from launcher.recipe import Recipe
from launcher.run_record import RunRecord, list_runs, read_run

if TYPE_CHECKING:
    from launcher.state import Jobs


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def root_of(args: argparse.Namespace) -> Path:
    """The store's root: `--root`, else PRISM_ROOT, else ./prism-root."""
    return Path(os.path.abspath(args.root or os.environ.get("PRISM_ROOT") or "prism-root"))


def profile_of(args: argparse.Namespace) -> Profile:
    return load_profile(args.cluster or "local")


def records_of(args: argparse.Namespace, profile: Profile) -> list[RunRecord]:
    """Every run that the recipe on the command line describes, planned and checked. Raises UserError."""
    from launcher.recipe.load import load_recipes

    # A profile of the user's own is found again by its path, wherever the next command is typed.
    named = args.cluster or "local"
    cluster = os.path.abspath(named) if Path(named).name != named or Path(named).suffix else named
    return [_record(recipe, profile, cluster) for recipe in load_recipes(args.recipe, args.overrides, args.name)]


def _record(recipe: Recipe, profile: Profile, cluster: str) -> RunRecord:
    from launcher.check import check_recipe
    from launcher.inputs import resolve_inputs
    from launcher.plan import build_plan

    stages = build_plan(recipe, resolve_inputs(recipe), profile.limits, profile.runtime)
    problems = check_recipe(recipe, stages, profile)
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
    if args.run and ("/" in args.run or args.run in (".", "..")):
        raise UserError(
            f"{args.run}: not the name of a run; the runs under {root} are {', '.join(list_runs(root)) or 'none'}"
        )
    runs = list_runs(root)
    if not args.run and not runs:
        raise UserError(f"{root}: no run here yet; start one with `prism-launch run RECIPE`, or name the --root")
    return root, read_run(root, args.run or runs[0])


def slurm_profile(args: argparse.Namespace) -> Profile:
    profile = profile_of(args)
    if profile.scheduler != "slurm":
        raise UserError(
            f"cluster {profile.name} has no Slurm; name one that has with --cluster (`prism-launch clusters`)"
        )
    return profile


def jobs_of(root: Path, record: RunRecord) -> Jobs:
    """The run's jobs as Slurm tells them; none for a run that was never submitted."""
    from launcher.submit import read_submitted, stage_jobs

    return stage_jobs(root, record) if read_submitted(root, record.run) else {}
