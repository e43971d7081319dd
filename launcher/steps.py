"""A step and what is known only when an attempt starts (folders, hosts, ports) as the command that runs, once for
srun and for processes of this machine. Rendered scripts show the same commands. Standard library only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from launcher import store
from launcher.containers import wrap
from launcher.spec import Runtime, StageSpec, Step

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


# -------------------------------------------------------------------------------------------------------------- Slurm


@dataclass(frozen=True)
class SlurmAttempt:
    """What Slurm tells an attempt in the batch step; the defaults are references, for scripts that are only read."""

    job: str = "$SLURM_JOB_ID"
    restarts: str = "${SLURM_RESTART_COUNT:-0}"
    node: str = "$SLURMD_NODENAME"

    @property
    def name(self) -> str:
        """The attempt's folder; the restart count alone would repeat in a chain of jobs."""
        return f"{self.job}.{self.restarts}"

    def port(self, index: int) -> str:
        """The MASTER_PORT of a job's step: 20000 to 31999, below the range that Linux hands out by itself."""
        if self.job.isdigit():
            return str(20000 + int(self.job) % 1200 * 10 + index)
        return f"$((20000 + SLURM_JOB_ID % 1200 * 10 + {index}))"


#: The references of a SlurmAttempt, in the middle of a word.
REFERENCE = re.compile(
    r"\$SLURM_JOB_ID|\$\{SLURM_RESTART_COUNT:-0\}|\$SLURMD_NODENAME|\$\(\(20000 \+ SLURM_JOB_ID % 1200 \* 10 \+ \d+\)\)"
)

#: Variables of the batch step that srun takes for defaults; every step states its own.
SRUN_DEFAULTS = (
    "SLURM_NTASKS",
    "SLURM_NPROCS",
    "SLURM_NTASKS_PER_NODE",
    "SLURM_CPUS_PER_TASK",
    "SLURM_GPUS",
    "SLURM_GPUS_PER_NODE",
    "SLURM_GPUS_PER_TASK",
)


def slurm_place(spec: StageSpec, root: Path, python: str, attempt: SlurmAttempt | None = None) -> Place:
    """Where a stage's steps run under Slurm: with references, or an attempt's own values; all on the first node."""
    attempt = attempt or SlurmAttempt()
    folder = store.stage_dir(root, spec.run, spec.stage)
    return Place(
        root=str(root),
        stage_json=str(folder / "stage.json"),
        attempt_dir=str(folder / attempt.name),
        python=python,
        hosts={step.name: attempt.node for step in spec.steps},
        ports={step.name: attempt.port(index) for index, step in enumerate(spec.steps)},
    )


def preflight_steps(spec: StageSpec, nodes: int, python: str) -> tuple[Step, ...]:
    """What looks at the nodes before the stage's own steps; nothing where the stage asks for no preflight.

    One task a node outside images, by the supervisor's own interpreter, and where asked for an all-reduce, one task a
    GPU, with the image and interpreter of the main step that has most GPUs.
    """
    asked = spec.preflight
    if asked is None:
        return ()
    gpus = max(step.gpus for step in spec.steps)
    words = (f"--gpus={gpus}", f"--min-free-gb={asked.min_free_gb:g}")
    look = (python, "-m", "launcher.workers.preflight", "nodes", *words)
    steps = [Step(name="preflight", argv=look, nodes=nodes, ntasks=nodes, gpus=gpus)]
    if asked.all_reduce is not None and nodes * gpus != 1:
        main = max((s for s in spec.steps if s.role == "main"), key=lambda s: s.gpus)
        words = (f"--size-mb={asked.all_reduce.size_mb}", f"--rounds={asked.all_reduce.rounds}")
        argv = (main.argv[0], "-m", "launcher.workers.preflight", "all-reduce", *words)
        tasks = nodes * max(gpus, 1)
        steps.append(replace(main, name="all-reduce", argv=argv, nodes=nodes, ntasks=tasks, gpus=gpus, probe=None))
    return tuple(steps)


def preflight_place(place: Place, node: str, attempt: SlurmAttempt) -> Place:
    """A place with hosts and ports of the preflight's steps, `node` the first one."""
    names = ("preflight", "all-reduce")
    ports = {name: attempt.port(8 + index) for index, name in enumerate(names)}
    return replace(place, hosts={**place.hosts, **dict.fromkeys(names, node)}, ports={**place.ports, **ports})


def preflight_argv(step: Step, place: Place, runtime: Runtime) -> tuple[str, ...]:
    """The srun command of a preflight's step; what its tasks say goes to srun, since a node may not see the store."""
    outside = runtime if step.image else replace(runtime, container="none")
    return tuple(word for word in srun_argv(step, place, outside) if not word.startswith("--output="))


def srun_argv(step: Step, place: Place, runtime: Runtime) -> tuple[str, ...]:
    """The srun command of a step inside its allocation; ranks are srun's (`SLURM_PROCID`, read by the worker).

    Raises UserError where the runtime cannot start the step.
    """
    options = {
        "job-name": step.name,
        "nodes": step.nodes,
        "ntasks": step.ntasks,
        "ntasks-per-node": step.ntasks // step.nodes,
        "cpus-per-task": step.cpus,
        "gpus-per-node": step.gpus,
        "kill-on-bad-exit": 0,
        "output": f"{place.attempt_dir}/{step.name}.%t.log",
        **({"mpi": runtime.mpi} if runtime.mpi else {}),
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    workdir = os.path.dirname(place.stage_json)
    launch = wrap(step, fill(step.argv, place), environment(step, place), workdir, runtime)
    return ("srun", "--overlap", "--unbuffered", *flags, *launch)
