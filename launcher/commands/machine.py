"""Commands on machines: cluster profiles, the dev cluster, doctor."""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING

from launcher.commands.shared import print_json, profile_of, root_of
from launcher.terminal import console

if TYPE_CHECKING:
    from launcher.site.judge import Check


def cluster(args: argparse.Namespace) -> int:
    """List, make and test cluster profiles."""
    return {"list": _list_profiles, "init": _init_profile, "test": _test_profile}[args.action](args)


def _list_profiles(args: argparse.Namespace) -> int:
    """The cluster profiles, shipped and the user's own."""
    from launcher.cluster import list_profiles
    from launcher.data import own_profiles

    profiles = list_profiles()
    if args.json:
        rows = [(p.name, p.scheduler, p.runtime.container, p.description) for p in profiles]
        print_json([dict(zip(("name", "scheduler", "container", "description"), r, strict=True)) for r in rows])
        return 0
    for p in profiles:
        print(f"{p.name:<20} {p.scheduler:<6} {p.runtime.container:<10} {p.description}")
    print(
        "Your own: `prism-launch cluster init` on a login node, or a changed copy of one in slurm/clusters/. --cluster"
    )
    print(f"takes the path of a profile, or the name of one in {own_profiles()}.")
    return 0


def _init_profile(args: argparse.Namespace) -> int:
    """Write a profile by looking at this site."""
    from launcher.site.init import init_profile

    profile, path = init_profile(args.name, args.output, args.force)
    print(f"{path}: written")
    limits = profile.partitions.get(profile.partition or "")
    gpus = limits.gpus_per_node if limits else None
    facts = {
        "partition": profile.partition or "not chosen: see the file",
        "account": profile.account or "none",
        "GPUs a node": f"{gpus}, by {profile.gpu_request}" if gpus else "none seen",
        "mem": profile.mem or "not asked",
        "container": profile.runtime.container,
        "python": profile.python,
    }
    for name, value in facts.items():
        print(f"  {name:<12} {value}")
    named = path.stem if not args.output else args.output
    print("Read it: every line says where it came from, and comments hold what could not be seen. Then:")
    print(f"  prism-launch cluster test {shlex.quote(named)}")
    return 0


def _test_profile(args: argparse.Namespace) -> int:
    """Prove a profile by a job, or show what an earlier one told."""
    from launcher import slurm, store
    from launcher.site import trial
    from launcher.site.judge import judge

    profile = profile_of(args)
    root = root_of(args)
    if args.job:
        test = trial.find_trial(root, args.job)
        outcome = trial.read_outcome(test, slurm.job_of_script(test.job, str(test.folder / "job.sbatch")))
    else:
        root = store.open_root(root)
        test = trial.submit_trial(trial.plan_trial(profile, root, args.partition, args.nodes), profile, root)
        if args.no_wait:
            at = f"{shlex.quote(args.cluster)} --job {test.job} --root {shlex.quote(str(root))}"
            if args.json:
                print_json({"job": test.job})
            else:
                print(f"job {test.job} submitted; its result: prism-launch cluster test {at}")
            return 0
        outcome = trial.follow(test, profile)
    checks = judge(outcome)
    failed = any(check.result == "fail" for check in checks)
    if args.json:
        from launcher.spec import encode

        print_json({"job": test.job, "ok": not failed, "checks": [encode(check) for check in checks]})
    else:
        _print_checks(checks)
        nodes = test.asked["nodes"]
        failures = sum(check.result == "fail" for check in checks)
        verdict = f"{failures} failed: mend, and test again" if failed else "no failure"
        print(f"{verdict}; job {test.job} on {nodes} node{'' if nodes == 1 else 's'}, files in {test.folder}")
    return int(failed)


def _print_checks(checks: list[Check]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    colors = {"pass": "green", "fail": "red", "note": "yellow"}
    table = Table("", "check", "found", box=box.SIMPLE_HEAD)
    for check in checks:
        found = Text(check.found)
        if check.mend:
            found.append(f"\nmend: {check.mend}", "bold")
        table.add_row(Text(check.result, colors[check.result]), check.name, found)
    console().print(table)


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
    from rich.table import Table
    from rich.text import Text

    table = Table("", "for", "found", "mend", box=box.SIMPLE_HEAD)
    for f in findings:
        name = Text(f.name, "green" if f.ok else "yellow")
        table.add_row(name, f.wanted_by, Text(f.found), Text(f.mend))
    console().print(table)
    return 0
