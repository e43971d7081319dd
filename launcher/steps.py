"""A step and what is known only when an attempt starts (folders, hosts, ports) as the command that runs, once for
srun and for processes of this machine. Rendered scripts show the same commands. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from launcher.containers import wrap
from launcher.spec import Runtime, Step

_PLACEHOLDER = re.compile(r"\{(python|stage_json|attempt_dir|(?:host|port):[A-Za-z0-9_-]+)\}")


@dataclass(frozen=True)
class Place:
    """Where and when an attempt runs.

    `hosts` and `ports` are by step name; `ports[STEP]` is also that step's MASTER_PORT, `hosts[STEP]` its MASTER_ADDR.
    In a rendered script the values are references to variables, such as `$SLURM_JOB_ID`, to be read and not run.
    """

    root: str
    stage_json: str
    attempt_dir: str
    python: str
    hosts: Mapping[str, str] = field(default_factory=dict)
    ports: Mapping[str, str] = field(default_factory=dict)


def fill(argv: tuple[str, ...], place: Place) -> tuple[str, ...]:
    """The command with its placeholders replaced. Raises KeyError for a host or port that no step has."""

    def value(match: re.Match[str]) -> str:
        kind, _, name = match[1].partition(":")
        if name:
            return (place.hosts if kind == "host" else place.ports)[name]
        return str(getattr(place, kind))

    return tuple(_PLACEHOLDER.sub(value, word) for word in argv)


def environment(step: Step, place: Place) -> dict[str, str]:
    """The variables that every process of a step gets, ranks apart."""
    ours = {"PRISM_ROOT": place.root, "PRISM_ATTEMPT_DIR": place.attempt_dir, "PRISM_STEP": step.name}
    master = {"MASTER_ADDR": place.hosts[step.name], "MASTER_PORT": place.ports[step.name]}
    return {"OMP_NUM_THREADS": str(step.cpus), **ours, **master, **step.env}


def local_commands(step: Step, place: Place) -> list[tuple[tuple[str, ...], dict[str, str]]]:
    """Command and environment of every process of a step, all on this machine."""
    argv = fill(step.argv, place)
    common = environment(step, place)
    ranks = [{"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(step.ntasks)} for i in range(step.ntasks)]
    return [(argv, {**common, **rank}) for rank in ranks]


def srun_argv(step: Step, place: Place, runtime: Runtime) -> tuple[str, ...]:
    """The srun command of a step inside its allocation; ranks are srun's (`SLURM_PROCID`, read by the worker)."""
    options = {
        "job-name": step.name,
        "nodes": step.nodes,
        "ntasks": step.ntasks,
        "ntasks-per-node": step.ntasks // step.nodes,
        "cpus-per-task": step.cpus,
        "gpus-per-node": step.gpus,
        "kill-on-bad-exit": 0,
    }
    if runtime.mpi:
        options["mpi"] = runtime.mpi
    flags = [f"--{name}={value}" for name, value in options.items()]
    launch = wrap(step, fill(step.argv, place), environment(step, place), runtime)
    return ("srun", "--overlap", "--unbuffered", *flags, *launch)
