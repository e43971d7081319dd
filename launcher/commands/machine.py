"""Commands on machines: cluster profiles, the dev cluster, doctor."""

from __future__ import annotations

import argparse

from launcher.commands.shared import print_json, root_of


def clusters(args: argparse.Namespace) -> int:
    """List the cluster profiles, shipped and the user's own."""
    from launcher.cluster import list_profiles
    from launcher.data import own_profiles

    profiles = list_profiles()
    if args.json:
        rows = [(p.name, p.scheduler, p.runtime.container, p.description) for p in profiles]
        print_json([dict(zip(("name", "scheduler", "container", "description"), r, strict=True)) for r in rows])
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

    findings = examine(root_of(args))
    if args.json:
        from launcher.spec import encode

        print_json([encode(f) for f in findings])
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
