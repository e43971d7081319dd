"""`prism-launch devcluster up | env | status | down`."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path

from launcher.devcluster import boot, daemons
from launcher.devcluster.cluster import DevCluster, find
from launcher.devcluster.config import Isolation
from launcher.errors import WorldError
from launcher.units import format_duration

_SAID: dict[Isolation, str] = {
    "network": "own host name, network and address",
    "name": "own host name; the network is this machine's (root gives each its own)",
    "none": "host name and network of this machine, so `hostname` cannot tell them apart: namespaces are not permitted",
}


def _folder(args: argparse.Namespace) -> Path:
    """`--dir`, else a folder for state in the user's home."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(os.path.realpath(args.dir or Path(state, "prism-launch", "devcluster")))


def _dir_flag(folder: Path, args: argparse.Namespace) -> str:
    return f" --dir {shlex.quote(str(folder))}" if args.dir else ""


def _running(args: argparse.Namespace) -> DevCluster:
    folder = _folder(args)
    found = find(folder)
    if found is None:
        raise WorldError(
            f"{folder}: no dev cluster here; start it: prism-launch devcluster up{_dir_flag(folder, args)}"
        )
    return found


def up(args: argparse.Namespace) -> int:
    """Start it, or say that it runs."""
    began = time.monotonic()
    folder = _folder(args)
    there, started = boot.up(folder, args.nodes, args.gpus)
    what = f"{there.site.nodes} nodes with {there.site.gpus} fake GPUs each, in {folder}"
    took = format_duration(time.monotonic() - began)
    print(f"dev cluster ready in {took}: {what}" if started else f"dev cluster runs already: {what}")
    print(f"  each node: {_SAID[there.site.isolation]}")
    flag = _dir_flag(folder, args)
    print(f'  shell:   eval "$(prism-launch devcluster env{flag})"')
    print(f"  profile: --cluster {_profile_name(folder)}")
    print(f"  stop:    prism-launch devcluster down{flag}")
    return 0


def _profile_name(folder: Path) -> str:
    """How `--cluster` names this cluster's profile: `dev`, or its path where another stands under that name."""
    path = folder / "dev.yaml"
    link = boot.profile_link()
    return link.stem if link.is_symlink() and os.readlink(link) == str(path) else str(path)


def env(args: argparse.Namespace) -> int:
    """Print the shell lines that make Slurm's commands speak to it."""
    there = _running(args)
    if dead := there.dead():
        print(
            f"prism-launch: these do not run: {', '.join(dead)}; mend it: prism-launch devcluster up", file=sys.stderr
        )
    print(f"export SLURM_CONF={shlex.quote(str(there.slurm_conf))}")
    have = os.environ.get("PATH", "").split(os.pathsep)
    more = [part for part in daemons.SBIN if part not in have]
    if more:
        print(f'export PATH="$PATH:{os.pathsep.join(more)}"')
    return 0


def status(args: argparse.Namespace) -> int:
    """What runs of it; exit code 1 where something does not."""
    there = _running(args)
    dead, states = there.dead(), there.node_states()
    if args.json:
        pids = {name: owner.pid for name, owner in there.processes.items()}
        processes = {name: {"pid": pids.get(name), "alive": name not in dead} for name in there.names}
        profile = _profile_name(there.folder)
        value = {"dir": str(there.folder), "profile": profile, "processes": processes, "nodes": states}
        print(json.dumps(value, indent=2))
        return bool(dead)
    print(f"dev cluster in {there.folder}, profile: --cluster {_profile_name(there.folder)}")
    for name in there.names:
        kind, _, node = name.partition(".")
        state = states.get(node, "sinfo does not answer") if kind == "slurmd" else ""
        print(f"  {name:<12} {'dead' if name in dead else f'pid {there.processes[name].pid}':<12} {state}".rstrip())
    return bool(dead)


def down(args: argparse.Namespace) -> int:
    """Stop what `up` started."""
    folder = _folder(args)
    print(f"dev cluster in {folder}: {'stopped' if boot.down(folder) else 'none runs'}")
    return 0
