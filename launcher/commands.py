"""What each command does: reads its arguments, calls the part that does the work, prints. Side effects stand here."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher import __version__, store
from launcher.cluster import Profile, load_profile
from launcher.errors import UserError
from launcher.recipe import Recipe
from launcher.run_record import PlannedStage, RunRecord, list_runs, read_run, write_run

# ------------------------------------------------------------------------------------------------------------ shared


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _root(args: argparse.Namespace) -> Path:
    """The store's root: `--root`, else PRISM_ROOT, else ./prism-root."""
    return Path(os.path.abspath(args.root or os.environ.get("PRISM_ROOT") or "prism-root"))


def _profile(args: argparse.Namespace) -> Profile:
    return load_profile(args.cluster or "local")


def _records(args: argparse.Namespace, profile: Profile) -> list[RunRecord]:
    """Every run that the recipe on the command line describes, planned and checked. Raises UserError."""
    from launcher.recipe.load import load_recipes

    return [_record(recipe, profile) for recipe in load_recipes(args.recipe, args.overrides, args.name)]


def _record(recipe: Recipe, profile: Profile) -> RunRecord:
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
        cluster=profile.name,
        resolved=recipe.resolved,
        stages=stages,
        created=time.time(),
        versions={"prism-launch": __version__, "python": platform.python_version()},
        git=_git_hash(Path(recipe.path).parent),
    )


def _git_hash(folder: Path) -> str | None:
    """The commit of a folder, with `+` where it has changes; None outside a repository."""
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _open_run(args: argparse.Namespace) -> tuple[Path, RunRecord]:
    """The run named on the command line, the latest by default."""
    root = _root(args)
    runs = list_runs(root)
    if not args.run and not runs:
        raise UserError(f"{root}: no run here yet; start one with `prism-launch run RECIPE`, or name the --root")
    return root, read_run(root, args.run or runs[0])


# ----------------------------------------------------------------------------------------------------------- recipes


def check(args: argparse.Namespace) -> int:
    """Find every problem of a recipe."""
    try:
        records = _records(args, _profile(args))
    except UserError as error:
        if not args.json:
            raise
        _print_json({"problems": list(error.problems)})
        return error.exit_code
    if args.json:
        _print_json({"problems": []})
    else:
        for record in records:
            print(f"{record.recipe}: run {record.run}: {len(record.stages)} stages, no problem found")
    return 0


def plan(args: argparse.Namespace) -> int:
    """Show the stages and what is done already."""
    root = _root(args)
    records = _records(args, _profile(args))
    if args.json:
        _print_json([_plan_json(root, record) for record in records])
        return 0
    from rich.console import Console

    for record in records:
        Console().print(_plan_table(root, record))
    return 0


def _is_done(root: Path, stage: PlannedStage) -> bool:
    return store.read_receipt(root, stage.spec.artifact) is not None


def _plan_json(root: Path, record: RunRecord) -> dict[str, Any]:
    from launcher.spec import encode

    stages = [
        {
            "stage": s.spec.stage,
            "kind": s.spec.kind,
            "inserted": s.inserted,
            "depends": list(s.depends),
            "inputs": encode(s.spec.inputs),
            "outputs": encode(s.spec.outputs),
            "fingerprint": s.spec.fingerprint,
            "resources": encode(s.resources),
            "tokens": _tokens(s),
            "done": _is_done(root, s),
        }
        for s in record.stages
    ]
    return {"run": record.run, "recipe": record.recipe, "cluster": record.cluster, "stages": stages}


def _tokens(stage: PlannedStage) -> int | None:
    config = stage.spec.config
    if stage.spec.kind != "train":
        return None
    return int(config["train_iters"] * config["global_batch_size"] * config["seq_length"])


def _plan_table(root: Path, record: RunRecord) -> Any:
    from rich.table import Table

    from launcher.units import format_count

    table = Table(title=f"run {record.run} on {record.cluster}", title_justify="left")
    for column in ("stage", "kind", "reads", "makes", "nodes x GPUs", "tokens", ""):
        table.add_column(column, justify="right" if column in ("nodes x GPUs", "tokens") else "left")
    for stage in record.stages:
        spec, tokens = stage.spec, _tokens(stage)
        table.add_row(
            spec.stage,
            spec.kind + (" (inserted)" if stage.inserted else ""),
            ", ".join(stage.depends) or "-",
            ", ".join(dict.fromkeys(o.format for o in spec.outputs.values())),
            f"{stage.resources.nodes} x {stage.resources.gpus_per_node}",
            format_count(tokens) if tokens else "",
            "[green]done[/], skipped" if _is_done(root, stage) else "",
        )
    return table


def render(args: argparse.Namespace) -> int:
    """Write the sbatch scripts into a folder."""
    from launcher.render import render_plan

    profile = _slurm_profile(args)
    records = _records(args, profile)
    target = Path(args.output)
    targets = [target if len(records) == 1 else target / record.run for record in records]
    for record, folder in zip(records, targets, strict=True):
        render_plan(record, profile, folder, _root(args))
    if args.json:
        _print_json([{"run": r.run, "folder": str(f)} for r, f in zip(records, targets, strict=True)])
    else:
        for folder in targets:
            print(f"{folder}: rendered; submit by hand with {folder}/submit.sh")
    return 0


def _slurm_profile(args: argparse.Namespace) -> Profile:
    profile = _profile(args)
    if profile.scheduler != "slurm":
        raise UserError(
            f"cluster {profile.name} has no Slurm; name one that has with --cluster (`prism-launch clusters`)"
        )
    return profile


# -------------------------------------------------------------------------------------------------------------- runs


def run(args: argparse.Namespace) -> int:
    """Run or submit what is not done, and follow it."""
    profile = _profile(args)
    if args.dry_run:
        from launcher.render import dry_run

        profile = _slurm_profile(args)
        for record in _records(args, profile):
            print(dry_run(record, profile, _root(args)))
        return 0
    records = _records(args, profile)
    if profile.scheduler == "slurm":
        raise UserError(
            f"cluster {profile.name}: submitting to Slurm is not built yet; "
            "`prism-launch render` writes the scripts and a submit.sh, --cluster local runs here"
        )
    root = store.open_root(_root(args))
    return max(_run_here(root, record, profile, args.detach) for record in records)


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
    root, record = _open_run(args)
    return _run_here(root, record, load_profile(record.cluster), args.detach)


def report(args: argparse.Namespace) -> int:
    """Every number of a run as JSON; or the page, with the result table."""
    from launcher.report import collect

    root, record = _open_run(args)
    if args.json:
        _print_json(collect(root, record))
    else:
        _finish(root, record)
    return 0


# --------------------------------------------------------------------------------------------------- by hand, listings


def _module(name: str, arguments: Sequence[str]) -> int:
    """Run a module of the job side in its own process, which may load torch; its output and exit code are ours."""
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-m", name, *arguments], env=environment).returncode


def convert(args: argparse.Namespace) -> int:
    """Convert a checkpoint, verified."""
    flags = ["--no-verify"] if args.no_verify else []
    return _module("launcher.convert", [args.source, args.target, "--to", args.to, *flags, *_json_flag(args)])


def diff(args: argparse.Namespace) -> int:
    """Weight change between two checkpoints."""
    return _module("launcher.workers.weight_diff", [args.a, args.b, *_json_flag(args)])


def cka(args: argparse.Namespace) -> int:
    """Representation similarity of two checkpoints."""
    return _module("launcher.workers.cka", [args.a, args.b, "--texts", args.texts, *_json_flag(args)])


def _json_flag(args: argparse.Namespace) -> list[str]:
    return ["--json"] if args.json else []


def schema(args: argparse.Namespace) -> int:
    """Print the recipe's JSON schema."""
    from launcher.recipe.schema import json_schema

    _print_json(json_schema())
    return 0


__all__ = ["write_run"]
