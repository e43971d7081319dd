"""What each command does: reads its arguments, calls the part that does the work, prints. Side effects stand here."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import __version__, store
from launcher.cluster import Profile, load_profile, place_record
from launcher.errors import UserError, WorldError
from launcher.recipe import Recipe
from launcher.run_record import PlannedStage, RunRecord, list_runs, read_run

if TYPE_CHECKING:
    from launcher.state import Jobs

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


def _open_run(args: argparse.Namespace) -> tuple[Path, RunRecord]:
    """The run named on the command line, the latest by default."""
    root = _root(args)
    if args.run and ("/" in args.run or args.run in (".", "..")):
        raise UserError(
            f"{args.run}: not the name of a run; the runs under {root} are {', '.join(list_runs(root)) or 'none'}"
        )
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


def _reads(record: RunRecord, stage: PlannedStage) -> str:
    """What a stage reads, a line each: the stage that makes it, or its path."""
    makers = {s.spec.fingerprint: s.spec.stage for s in record.stages}
    found = dict.fromkeys(makers.get(i.fingerprint, i.path) for i in stage.spec.inputs.values())
    return "\n".join(found) or "-"


def _plan_table(root: Path, record: RunRecord) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from launcher.units import format_count

    title = f"run {record.run} on {record.cluster}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("stage", "kind", "reads", "makes", "nodes\n×GPUs", "tokens", ""):
        table.add_column(column, justify="right" if column in ("nodes\n×GPUs", "tokens") else "left", no_wrap=True)
    if any(stage.inserted for stage in record.stages):
        table.caption, table.caption_justify = "Conversions are inserted by the plan.", "left"
    for stage in record.stages:
        spec, tokens = stage.spec, _tokens(stage)
        table.add_row(
            spec.stage,
            spec.kind,
            Text(_reads(record, stage)),
            "\n".join(dict.fromkeys(o.format for o in spec.outputs.values())),
            f"{stage.resources.nodes}×{stage.resources.gpus_per_node}",
            format_count(tokens) if tokens else "",
            "[green]done[/]" if _is_done(root, stage) else "",
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
    root = store.open_root(_root(args))
    if profile.scheduler == "slurm":
        return _run_on_slurm(root, [place_record(r, profile, root) for r in records], profile, args.detach)
    worst = 0
    for record in records:
        code = _run_here(root, record, profile, args.detach)
        if code == 130:  # interrupted: what the matrix has left is not begun
            return code
        worst = max(worst, code)
    return worst


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
    root, record = _open_run(args)
    _check_versions(record)
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

    root, record = _open_run(args)
    if args.json:
        _print_json(collect(root, record))
    else:
        _finish(root, record)
    return 0


def status(args: argparse.Namespace) -> int:
    """What each stage of a run is doing."""
    from launcher.state import run_state, stage_states

    root, record = _open_run(args)
    try:
        jobs = _jobs(root, record)
    except WorldError as error:  # a laptop that sees the store alone
        print(f"prism-launch: {error}; what follows is from the run's files alone", file=sys.stderr)
        jobs = {}
    states = stage_states(root, record, jobs=jobs)
    if args.json:
        from launcher.spec import encode

        body = {"run": record.run, "root": str(root), "cluster": record.cluster, "state": run_state(states)}
        _print_json({**body, "stages": [encode(s) for s in states]})
        return 0
    from rich.console import Console

    from launcher.watch import states_table

    Console().print(states_table(record.run, states))
    return 0


def _jobs(root: Path, record: RunRecord) -> Jobs:
    """The run's jobs as Slurm tells them; none for a run that was never submitted."""
    from launcher.submit import read_submitted, stage_jobs

    return stage_jobs(root, record) if read_submitted(root, record.run) else {}


def watch(args: argparse.Namespace) -> int:
    """Follow a run; leaving with Ctrl-C does not stop it."""
    from launcher.state import run_state
    from launcher.watch import watch_run

    root, record = _open_run(args)
    profile = load_profile(record.cluster)
    poll_s = profile.poll_s if profile.scheduler == "slurm" else 0.5
    return 0 if run_state(watch_run(root, record, lambda: _jobs(root, record), poll_s)) == "done" else 1


def logs(args: argparse.Namespace) -> int:
    """Print the end of a stage's log, and go on with it where asked."""
    from launcher.attempts import newest_attempt
    from launcher.watch import follow_file

    root, record = _open_run(args)
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

    root, record = _open_run(args)
    print(f"stopping run {record.run}; its stages save first", file=sys.stderr)
    stopped = cancel_jobs(root, record) if _jobs(root, record) else cancel_run(root, record)
    if args.json:
        _print_json({"run": record.run, "stopped": stopped})
    else:
        print(f"run {record.run}: {'stopped ' + ', '.join(stopped) if stopped else 'nothing was running'}")
    return 0


# --------------------------------------------------------------------------------------------------- by hand, listings


def _module(name: str, arguments: Sequence[str]) -> int:
    """Run a module of the job side in its own process, which may load torch; its output and exit code are ours."""
    absent = [name for name in ("torch", "safetensors", "transformers") if importlib.util.find_spec(name) is None]
    if absent:
        raise WorldError(f"not installed here: {', '.join(absent)}; pip install 'prism-launch[local]'")
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


def recipes(args: argparse.Namespace) -> int:
    """List the shipped recipes."""
    from launcher.recipe.load import list_recipes

    found = list_recipes()
    if args.json:
        _print_json(found)
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table("recipe", "stages", "what it is")
    for recipe in found:
        table.add_row(recipe["name"], str(len(recipe["stages"])), recipe["description"])
    Console().print(table)
    return 0


def clusters(args: argparse.Namespace) -> int:
    """List the cluster profiles, shipped and the user's own."""
    from launcher.cluster import list_profiles
    from launcher.data import own_profiles

    profiles = list_profiles()
    if args.json:
        rows = [(p.name, p.scheduler, p.runtime.container, p.description) for p in profiles]
        _print_json([dict(zip(("name", "scheduler", "container", "description"), r, strict=True)) for r in rows])
        return 0
    for p in profiles:
        print(f"{p.name:<20} {p.scheduler:<6} {p.runtime.container:<10} {p.description}")
    print("Your own: copy one of slurm/clusters/, change it, and name its path with --cluster; or put it into")
    print(f"{own_profiles()}, and its name will do.")
    return 0


def devcluster(args: argparse.Namespace) -> int:
    """Start, describe or stop a Slurm on this machine."""
    from launcher.devcluster import commands

    run = {"up": commands.up, "env": commands.env, "status": commands.status, "down": commands.down}
    return run[args.action](args)


def doctor(args: argparse.Namespace) -> int:
    """What this machine has and lacks."""
    from launcher.doctor import examine

    findings = examine(_root(args))
    if args.json:
        from launcher.spec import encode

        _print_json([encode(f) for f in findings])
        return 0
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("", "for", "found", "mend", box=box.SIMPLE_HEAD)
    for f in findings:
        name = Text(f.name, "green" if f.ok else "yellow")
        table.add_row(name, f.wanted_by, Text(f.found), Text(f.mend))
    Console().print(table)
    return 0


def schema(args: argparse.Namespace) -> int:
    """Print the recipe's JSON schema."""
    from launcher.recipe.schema import json_schema

    _print_json(json_schema())
    return 0
