"""Commands on checkpoints by hand: convert, merge, diff, cka, each in a process of its own."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence

from launcher.errors import WorldError


def _module(name: str, arguments: Sequence[str]) -> int:
    """Run a module of the job side in its own process, which may load torch; its output and exit code are ours."""
    absent = [name for name in ("torch", "safetensors", "transformers") if importlib.util.find_spec(name) is None]
    if absent:
        raise WorldError(f"not installed here: {', '.join(absent)}; pip install 'prism-launch[local]'")
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-m", name, *arguments], env=environment).returncode


def convert(args: argparse.Namespace) -> int:
    """Convert a checkpoint, verified."""
    flags = [
        f"--{name.replace('_', '-')}" for name in ("fold_multipliers", "parity", "no_verify") if getattr(args, name)
    ]
    flags += ["--config", args.config] if args.config else []
    return _module("launcher.convert", [args.source, args.target, "--to", args.to, *flags, *_json_flag(args)])


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
