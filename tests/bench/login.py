"""The login side: start-up, check and plan of a recipe, rendering of a matrix."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import yaml

from tests.bench.measure import CHECKOUT, Row, cpu_seconds, environment, python, timed

RUNS = 9
SLURM_PROGRAMS = ("sbatch", "srun", "squeue", "sacct", "scontrol", "scancel", "sinfo")


def measure_commands(scratch: Path) -> list[Row]:
    """`--help`, `check` and `plan`, beside an interpreter that does nothing."""
    program = python("-c", "import sys; from launcher.cli import main; sys.exit(main())")
    demo = str(CHECKOUT / "recipes" / "demo.yaml")
    cases = {
        "python -c pass": (python("-c", "pass"), None),
        "prism-launch --help": ([*program, "--help"], 0.15),
        "prism-launch check recipes/demo.yaml": ([*program, "check", demo], 0.4),
        "prism-launch plan recipes/demo.yaml": ([*program, "plan", demo], 0.4),
    }
    variables = environment(scratch)
    for command, _ in cases.values():
        cpu_seconds(command, variables, scratch)  # compiles the bytecode
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(RUNS):
        for name, (command, _) in cases.items():
            found[name].append(cpu_seconds(command, variables, scratch))
    how = "whole process with its children, bytecode compiled, files cached"
    return [Row(name, tuple(found[name]), "s CPU", how, budget) for name, (_, budget) in cases.items()]


# ------------------------------------------------------------------------------------------------------------- matrix


def measure_rendering(scratch: Path) -> list[Row]:
    """`render` of 7 models x 2 seeds of the demo's stages, in this process. Raises RuntimeError where Slurm is called.

    Reading, planning, checking and writing every file, synced, are in it; imports are not.
    """
    from launcher.cli import main

    recipe, called = _write_matrix(scratch / "matrix"), _watch_slurm(scratch / "slurm")
    number = 0

    def render() -> None:
        nonlocal number
        number += 1
        command = ["render", str(recipe), "--cluster", "example-pyxis", "--root", "/scratch/prism"]
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = main([*command, "-o", str(scratch / f"rendered-{number}")])
        if code != 0:
            raise RuntimeError(f"render: exit code {code}: {said.getvalue()[-2000:]}")

    path = os.environ["PATH"]
    os.environ["PATH"] = f"{called.parent}{os.pathsep}{path}"
    try:
        render()  # imports what it needs
        values = tuple(timed(render)[1] for _ in range(5))
    finally:
        os.environ["PATH"] = path
    if called.exists():
        raise RuntimeError(f"rendering called Slurm: {called.read_text()}")
    scripts = len(list((scratch / "rendered-1").glob("*/*.sbatch")))
    how = f"14 runs, {scripts} scripts, for example-pyxis; beyond start-up and imports; no Slurm program was called"
    return [Row("render 7 models x 2 seeds", values, "s CPU", how, 0.5)]


def _write_matrix(folder: Path) -> Path:
    """A recipe with the demo's stages and seven models of its own, the shipped ones in several sizes."""
    (folder / "models").mkdir(parents=True)
    shipped = sorted((CHECKOUT / "recipes" / "models").glob("*.yaml"))
    names = []
    for number in range(7):
        model: dict[str, Any] = yaml.safe_load(shipped[number % len(shipped)].read_text())
        model["name"] = f"{model['name']}-{number}"
        model["config"]["max_position_embeddings"] += 256 * number
        names.append(model["name"])
        (folder / "models" / f"{model['name']}.yaml").write_text(yaml.safe_dump(model))
    demo = yaml.safe_load((CHECKOUT / "recipes" / "demo.yaml").read_text())
    del demo["model"], demo["seed"]
    path = folder / "matrix.yaml"
    path.write_text(yaml.safe_dump({**demo, "name": "matrix", "matrix": {"model": names, "seed": [0, 1]}}))
    return path


def _watch_slurm(folder: Path) -> Path:
    """Puts programs that note their call in place of Slurm's; returns the file in which they do."""
    folder.mkdir()
    called = folder / "called"
    for name in SLURM_PROGRAMS:
        (folder / name).write_text(f"#!/bin/sh\necho {name} >> '{called}'\nexit 1\n")
        (folder / name).chmod(0o755)
    return called
