"""Commands on a recipe, before anything runs: check, plan, render, and the listings of recipes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Literal

from launcher.commands.estimates import Outlook, estimate_json, estimate_table, outlook_of, warnings_of
from launcher.commands.shared import print_json, print_warnings, profile_of, records_of, root_of, slurm_profile
from launcher.errors import UserError
from launcher.run_record import PlannedStage, RunRecord
from launcher.terminal import console


def check(args: argparse.Namespace) -> int:
    """Find every problem of a recipe."""
    profile = profile_of(args)
    try:
        records = records_of(args, profile)
    except UserError as error:
        if not args.json:
            raise
        print_json({"problems": list(error.problems), "notes": []})
        return error.exit_code
    print_warnings(records, profile)
    if args.json:
        print_json({"problems": [], "notes": list(dict.fromkeys(n for record in records for n in record.notes))})
    else:
        for note in dict.fromkeys(n for record in records for n in record.notes):
            print(f"note: {note}")
        for record in records:
            print(f"{record.recipe}: run {record.run}: {len(record.stages)} stages, no problem found")
    return 0


def plan(args: argparse.Namespace) -> int:
    """Show the stages, what is done already, and what the others will take."""
    root, profile = root_of(args), profile_of(args)
    records = records_of(args, profile, elsewhere=True)
    outlooks = [(record, outlook_of(root, record, profile)) for record in records]
    if args.json:
        print_json([_plan_json(record, outlook) for record, outlook in outlooks])
        return 0

    for record, outlook in outlooks:
        console().print(_plan_table(record, outlook.done))
        if table := estimate_table(outlook):
            console().print(table)
    return 0


def _plan_json(record: RunRecord, outlook: Outlook) -> dict[str, Any]:
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
            "tokens": outlook.found[s.spec.stage].tokens,
            "estimate": estimate_json(outlook, s),
            "done": s.spec.stage in outlook.done,
            "not_built": s.not_built,
            "absent": list(s.absent),
        }
        for s in record.stages
    ]
    told = {"run": record.run, "recipe": record.recipe, "cluster": record.cluster, "stages": stages}
    return {**told, "warnings": warnings_of(outlook)}


def _reads(record: RunRecord, stage: PlannedStage) -> str:
    """What a stage reads, a line each: the stage that makes it, or its path."""
    makers = {s.spec.fingerprint: s.spec.stage for s in record.stages}
    found = dict.fromkeys(makers.get(i.fingerprint, i.path) for i in stage.spec.inputs.values())
    return "\n".join(found) or "-"


def _plan_table(record: RunRecord, done: frozenset[str]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    title = f"run {record.run} on {record.cluster}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("stage", "kind", "reads", "makes", "nodes\n×GPUs", ""):
        justify: Literal["right", "left"] = "right" if "nodes" in column else "left"
        table.add_column(column, justify=justify, no_wrap=column not in ("stage", "reads"), overflow="fold")
    table.caption, table.caption_justify = Text("\n".join(_caption(record))), "left"
    for stage in record.stages:
        spec = stage.spec
        table.add_row(
            spec.stage,
            spec.kind,
            Text(_reads(record, stage)),
            "\n".join(dict.fromkeys(o.format for o in spec.outputs.values())),
            "\n".join(f"{part.nodes}×{part.gpus_per_node}" for part in stage.job_parts.values()),
            Text("done", "green") if spec.stage in done else Text(_mark(stage), "yellow"),
        )
    return table


def _mark(stage: PlannedStage) -> str:
    return "\n".join([*(["not built"] if stage.not_built else []), *(["input absent"] if stage.absent else [])])


def _caption(record: RunRecord) -> list[str]:
    inserted = any(stage.inserted for stage in record.stages)
    lines = [f"{s.spec.stage}: {why}" for s in record.stages for why in s.obstacles]
    lines += [f"note: {note}" for note in record.notes]
    return [*(["Conversions are inserted by the plan."] if inserted else []), *lines]


def render(args: argparse.Namespace) -> int:
    """Write the sbatch scripts into a folder."""
    from launcher.render import render_plan

    profile = slurm_profile(args)
    records = records_of(args, profile, elsewhere=True)
    target = Path(args.output)
    print_warnings(records, profile)
    targets = [target if len(records) == 1 else target / record.run for record in records]
    for record, folder in zip(records, targets, strict=True):
        render_plan(record, profile, folder, root_of(args))
    if args.json:
        print_json([{"run": r.run, "folder": str(f)} for r, f in zip(records, targets, strict=True)])
    else:
        for folder in targets:
            print(f"{folder}: rendered; submit by hand with {folder}/submit.sh")
    return 0


def backends(args: argparse.Namespace) -> int:
    """Which model × algorithm × RL backend works, and why another does not."""
    from launcher.rl import matrix

    rows = list(matrix())
    if args.json:
        keys = ("backend", "algorithm", "family", "state", "reason")
        models = _models()
        print_json([{**dict(zip(keys, row, strict=True)), "models": models.get(row[2], [])} for row in rows])
        return 0
    from rich import box
    from rich.table import Table

    families: dict[tuple[str, ...], list[str]] = {}
    for backend, algorithm, family, state, reason in rows:
        families.setdefault((backend, algorithm, state, reason), []).append(family)
    table = Table("backend", "algorithm", "models", "state", "why", box=box.SIMPLE_HEAD)
    for (backend, algorithm, state, reason), names in families.items():
        table.add_row(backend, algorithm, ", ".join(names), state, reason)
    table.caption = "rendered: planned and rendered in full, and refused by run"
    console().print(table)
    return 0


def _models() -> dict[str, list[str]]:
    """The shipped models by family."""
    from launcher.data import data_dir
    from launcher.recipe.document import read_document

    found: dict[str, list[str]] = {}
    for path in sorted((data_dir("recipes") / "models").glob("*.yaml")):
        found.setdefault(read_document(path, str(path)).data["family"], []).append(path.stem)
    return found


def recipes(args: argparse.Namespace) -> int:
    """List the shipped recipes."""
    from launcher.recipe.load import list_recipes

    found = list_recipes()
    if args.json:
        print_json(found)
        return 0
    from rich.table import Table

    table = Table("recipe", "stages", "what it is")
    for recipe in found:
        table.add_row(recipe["name"], str(len(recipe["stages"])), recipe["description"])
    console().print(table)
    return 0


def schema(args: argparse.Namespace) -> int:
    """Print the recipe's JSON schema."""
    from launcher.recipe.schema import json_schema

    print_json(json_schema())
    return 0
