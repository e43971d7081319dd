"""Commands on checkpoints by hand: convert, merge, diff, cka, each in a process of its own."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from launcher import __version__
from launcher.cluster import Profile
from launcher.commands.shared import lasting_name
from launcher.configs import ConvertConfig, Resources
from launcher.data import install_command
from launcher.errors import UserError, WorldError
from launcher.inputs import External
from launcher.interpreter import module_command, module_environment
from launcher.recipe import Stage
from launcher.run_record import PlannedStage, RunRecord
from launcher.spec import Input
from launcher.stages.convert import CONVERSIONS


def _module(name: str, arguments: Sequence[str]) -> NoReturn:
    """Become a module of the job side, which may load torch: signals, output and exit code are its own from here."""
    absent = [name for name in ("torch", "safetensors", "transformers") if importlib.util.find_spec(name) is None]
    if absent:
        raise WorldError(f"not installed here: {', '.join(absent)}; {install_command('local')}")
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "HF_HUB_OFFLINE": "1"}
    sys.stdout.flush()
    os.execve(sys.executable, module_command(name, *arguments), module_environment(environment))


def convert(args: argparse.Namespace) -> int:
    """Convert a checkpoint, verified: here, or as a job of a cluster."""
    if args.cluster:
        return _submit(args)
    flags = [
        f"--{name.replace('_', '-')}" for name in ("fold_multipliers", "parity", "no_verify") if getattr(args, name)
    ]
    flags += ["--config", args.config] if args.config else []
    return _module("launcher.convert", [args.source, args.target, "--to", args.to, *flags, *_json_flag(args)])


def _submit(args: argparse.Namespace) -> int:
    """A run of one stage; the target is a link to the artifact, which leads nowhere until the job is done."""
    from launcher import store
    from launcher.cluster import place_record
    from launcher.commands.shared import root_of, slurm_profile
    from launcher.inputs import read_checkpoint
    from launcher.models.checkpoints import obstacles
    from launcher.submit import submit_run

    local = [name for name in ("fold_multipliers", "parity", "config") if getattr(args, name)]
    target = Path(os.path.abspath(args.target))
    problems = [f"--{name.replace('_', '-')}: not with --cluster; convert here" for name in local]
    if os.path.lexists(target):
        problems.append(f"{target}: is there already; name a new folder")
    if target.suffix == ".nemo":
        problems.append(f"{target}: archives are not written with --cluster; name a folder")
    if problems:
        raise UserError(problems)
    profile, root = slurm_profile(args), store.open_root(root_of(args))
    source = read_checkpoint(str(Path(os.path.abspath(args.source))), Path())
    if (source.format, args.to) not in CONVERSIONS:
        raise UserError(f"{source.path}: is of format {source.format}; nothing converts that to {args.to}")
    if refused := obstacles(Path(source.path), args.to):
        raise UserError(refused)
    config = ConvertConfig(checkpoint=source.path, source=source.format, target=args.to, verify=not args.no_verify)
    record = place_record(_run_of(config, source, profile, args.cluster), profile, root)
    jobs = submit_run(root, record, profile)
    artifact = root / record.stages[0].spec.outputs["checkpoint"].path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(artifact)
    print("\n".join(f"{stage}: job {job}" for stage, job in jobs.items()) or "done already")
    print(f"{target}: will be {artifact}; follow with: prism-launch watch {record.run} --root {root}")
    return 0


def _run_of(config: ConvertConfig, source: External, profile: Profile, cluster: str) -> RunRecord:
    """A run of one stage that no recipe holds; its name is the same for the same work."""
    from launcher.plan import plan_stage

    stage = Stage("convert", "convert", config, Resources(cpus_per_task=2), seed=0)
    inputs = {"checkpoint": Input(source.path, source.format, source.fingerprint)}
    spec = plan_stage(stage.name, stage, inputs, {}, profile.limits, profile.runtime)
    name = f"convert-to-{config.target}-{spec.fingerprint[:6]}"
    return RunRecord(
        run=name,
        recipe=source.path,
        overrides=(),
        cluster=lasting_name(cluster),
        resolved={"name": name},
        stages=(PlannedStage(replace(spec, run=name), (), stage.resources),),
        created=time.time(),
        versions={"prism-launch": __version__, "python": platform.python_version()},
    )


def merge(args: argparse.Namespace) -> int:
    """A linear combination of checkpoints."""
    flags = ["--no-verify"] if args.no_verify else []
    words = ["merge", *args.sources, f"--weights={args.weights}", "-o", args.output, *flags, *_json_flag(args)]
    return _module("launcher.convert", words)


def diff(args: argparse.Namespace) -> int:
    """Weight change between two checkpoints."""
    return _module("launcher.workers.weight_diff", [args.a, args.b, *_json_flag(args)])


def cka(args: argparse.Namespace) -> int:
    """Representation similarity of two checkpoints."""
    return _module("launcher.workers.cka", [args.a, args.b, "--texts", args.texts, *_json_flag(args)])


def _json_flag(args: argparse.Namespace) -> list[str]:
    return ["--json"] if args.json else []
