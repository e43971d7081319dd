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
from launcher.containers import RUNTIMES, Here, container_name, wrap
from launcher.errors import UserError
from launcher.spec import Runtime, StageSpec, Step

_PLACEHOLDER = re.compile(
    r"\{(python|stage_json|attempt_dir|progress|seed|(?:host|port|input|output):[A-Za-z0-9._-]+)\}"
)
#: What cannot stand between the quotes of a program's own syntax, such as Hydra's.
_UNQUOTABLE = re.compile(r'["\\$]')


@dataclass(frozen=True)
class Place:
    """Where and when an attempt runs.

    `hosts` and `ports` are by step name; `ports[STEP]` is also that step's MASTER_PORT, `hosts[STEP]` its MASTER_ADDR.
    In a rendered script the values are references to variables, such as `$SLURM_JOB_ID`, to be read and not run.
    `inputs` and `outputs` are folders by port; `progress` is kept from one attempt to the next.
    """

    root: str
    stage_json: str
    attempt_dir: str
    python: str
    hosts: Mapping[str, str] = field(default_factory=dict)
    ports: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict)
    progress: str = ""
    seed: str = "0"


def place_of(
    spec: StageSpec, root: Path, stage_json: Path, attempt_dir: Path, python: str, **late: Mapping[str, str]
) -> Place:
    """The place of an attempt; `late` are its hosts and ports."""
    return Place(
        root=str(root),
        stage_json=str(stage_json),
        attempt_dir=str(attempt_dir),
        python=python,
        inputs={port: str(root / found.path) for port, found in spec.inputs.items()},
        outputs={port: str(store.working_path(root, spec.artifact, o.path)) for port, o in spec.outputs.items()},
        progress=str(store.partial_dir(root, spec.artifact) / store.PROGRESS),
        seed=str(spec.seed),
        **late,
    )


def fill(argv: tuple[str, ...], place: Place) -> tuple[str, ...]:
    """The command with its placeholders replaced.

    Raises KeyError for a host or port that no step has, and UserError for a value that its place cannot quote.
    """

    def value(match: re.Match[str]) -> str:
        kind, _, name = match[1].partition(":")
        found = str(getattr(place, f"{kind}s")[name] if name else getattr(place, kind))
        if match.string[: match.start()].endswith('"') and _UNQUOTABLE.search(found):
            where = match.string.partition("=")[0]
            raise UserError(f'{found}: " \\ and $ cannot be quoted in {where}; choose another --root')
        return found

    return tuple(_PLACEHOLDER.sub(value, word) for word in argv)


def environment(step: Step, place: Place) -> dict[str, str]:
    """The variables that every process of a step gets, ranks apart."""
    ours = {"PRISM_ROOT": place.root, "PRISM_ATTEMPT_DIR": place.attempt_dir, "PRISM_STEP": step.name}
    master = {"MASTER_ADDR": place.hosts[step.name], "MASTER_PORT": place.ports[step.name]}
    gpus = {"PRISM_GPUS": str(step.gpus)} if step.gpus else {}
    return {"OMP_NUM_THREADS": str(step.cpus), **ours, **gpus, **master, **step.env}


#: What a container of this machine does not get from its surroundings; it may have no entry for its user.
_IN_CONTAINERS = {"HOME": "/tmp", "PYTHONUNBUFFERED": "1"}


def local_commands(
    spec: StageSpec, step: Step, place: Place, user: str
) -> list[tuple[tuple[str, ...], dict[str, str]]]:
    """Command and further environment of every process of a step, all on this machine. `user` is UID:GID.

    Raises UserError where the runtime cannot start the step.
    """
    argv = fill(step.argv, place)
    common = environment(step, place)
    if not Path("/dev/nvidiactl").exists():
        common.pop("PRISM_GPUS", None)  # this machine gives what it has, not what is asked for
    ranks = [{"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(step.ntasks)} for i in range(step.ntasks)]
    if spec.runtime.container == "none":
        return [(argv, {**common, **rank}) for rank in ranks]
    more = _IN_CONTAINERS if RUNTIMES[spec.runtime.container].is_detached else {}
    found: list[tuple[tuple[str, ...], dict[str, str]]] = []
    for i, rank in enumerate(ranks):
        here = Here(
            name=container_name(place.attempt_dir, step.name, i),
            artifact=f"{place.root}/{spec.artifact}",
            user=user,
            passed=("CUDA_VISIBLE_DEVICES", *spec.secrets),
        )
        variables = {**more, **common, **rank}
        found.append((wrap(step, argv, variables, place.attempt_dir, spec.runtime, here), {}))
    return found


# -------------------------------------------------------------------------------------------------------------- Slurm


@dataclass(frozen=True)
class SlurmAttempt:
    """What Slurm tells an attempt in the batch step; the defaults are references, for scripts that are only read.

    `node` is the job's first node, `hosts` the first nodes of steps that start elsewhere, by step. An element of a job
    array is known everywhere as `ARRAYJOB_INDEX`; `number` is the id that Slurm counts it by. `folder` is the name of
    the attempt's folder where another life of the same restart count has the usual one.
    """

    job: str = "$SLURM_JOB_ID"
    restarts: str = "${SLURM_RESTART_COUNT:-0}"
    node: str = "$SLURMD_NODENAME"
    number: str | None = None
    hosts: Mapping[str, str] = field(default_factory=dict)
    folder: str = ""

    @property
    def name(self) -> str:
        """The attempt's folder; the restart count alone would repeat in a chain of jobs."""
        return self.folder or f"{self.job}.{self.restarts}"

    def host(self, step: Step) -> str:
        """The first node of a step."""
        if not is_elsewhere(step):
            return self.node
        return (
            self.hosts.get(step.name)
            or f'$(scontrol show hostnames "${nodelist(step)}" | sed -n {step.first_node + 1}p)'
        )

    def port(self, index: int) -> str:
        """The MASTER_PORT of a job's step: 20000 to 31999, below the range that Linux hands out by itself."""
        number = self.number or self.job
        if number.isdigit():
            return str(20000 + int(number) % 1200 * 10 + index)
        return f"$((20000 + SLURM_JOB_ID % 1200 * 10 + {index}))"


def is_elsewhere(step: Step) -> bool:
    """Whether a step starts on another node than the supervisor's, which is the job's first."""
    return bool(step.first_node or step.het_group)


def nodelist(step: Step) -> str:
    """The variable of the batch step that lists the nodes which a step's own are counted in."""
    return "SLURM_JOB_NODELIST" if step.het_group is None else f"SLURM_JOB_NODELIST_HET_GROUP_{step.het_group}"


#: An element of a job array in a script that is only read, and its stage, a variable that the script sets.
ELEMENT = SlurmAttempt("${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID", number="$SLURM_JOB_ID")
ELEMENT_STAGE = "$stage"
#: The references of a SlurmAttempt, in the middle of a word.
REFERENCE = re.compile(
    r"\$SLURM_JOB_ID|\$\{SLURM_ARRAY_JOB_ID\}|\$SLURM_ARRAY_TASK_ID|\$stage\b"
    r"|\$\{SLURM_RESTART_COUNT:-0\}|\$SLURMD_NODENAME|\$\(\(20000 \+ SLURM_JOB_ID % 1200 \* 10 \+ \d+\)\)"
    r"|\$\(scontrol show hostnames \"\$SLURM_JOB_NODELIST(?:_HET_GROUP_\d+)?\" \| sed -n \d+p\)"
)

#: What tells an element from a job; a job that is submitted from within an element inherits both.
ARRAY_VARIABLES = ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")

_SRUN_TAKES = """
    CPUS_PER_GPU CPUS_PER_TASK GPUS GPUS_PER_NODE GPUS_PER_SOCKET GPUS_PER_TASK GRES NPROCS NTASKS NTASKS_PER_CORE
    NTASKS_PER_GPU NTASKS_PER_NODE NTASKS_PER_SOCKET NTASKS_PER_TRES STEP_GRES TRES_PER_TASK

    CPU_BIND CPU_FREQ_REQ CORE_SPEC DISTRIBUTION DIST_PLANESIZE EXACT EXCLUSIVE GPU_BIND GPU_FREQ GRES_FLAGS HINT
    HOSTFILE MEM_BIND MEM_BIND_SORT NCORES_PER_SOCKET NSOCKETS_PER_NODE OVERCOMMIT OVERLAP SPREAD_JOB
    THREADS_PER_CORE THREAD_SPEC TRES_BIND USE_MIN_NODES WHOLE

    BCAST BCAST_EXCLUDE COMPRESS CONTAINER CONTAINER_ID DISABLE_STATUS EPILOG EXIT_ERROR EXIT_IMMEDIATE EXPORT_ENV
    IMMEDIATE KILL_BAD_EXIT LABELIO MPI_TYPE MULTI_PROG NO_KILL PROLOG REMOTE_CWD SEND_LIBS SIGNAL SRUN_MULTI
    SRUN_REDUCE_TASK_EXIT_MSG STDERRMODE STDINMODE STDOUTMODE STEP_KILLED_MSG_NODE_ID TASK_EPILOG TASK_PROLOG
    TEST_EXEC THREADS TIMELIMIT UMASK UNBUFFEREDIO WAIT WORKING_DIR

    ACCOUNT CLUSTERS CLUSTER_CONSTRAINT CONSTRAINT DELAY_BOOT DEPENDENCY PARTITION QOS REQ_SWITCH RESERVATION
    WAIT4SWITCH WCKEY
"""
#: Variables that srun takes for its options, set by options of sbatch or by the shell that submits; every step states
#: its own. From srun(1) of 22.05 and the names in its binary, and what newer ones add. Not here: which job and
#: controller it is, the job's nodes, memory and network, profiling.
SRUN_DEFAULTS = (
    *(f"SLURM_{name}" for name in _SRUN_TAKES.split()),
    *("SRUN_CONTAINER", "SRUN_CONTAINER_ID", "SRUN_CPUS_PER_TASK", "SRUN_EXPORT_ENV"),
    *("SRUN_ERROR", "SRUN_INPUT", "SRUN_OUTPUT"),
)


def slurm_place(spec: StageSpec, root: Path, python: str, attempt: SlurmAttempt | None = None) -> Place:
    """Where a stage's steps run under Slurm: with references, or an attempt's own values."""
    attempt = attempt or SlurmAttempt()
    folder = store.stage_dir(root, spec.run, spec.stage)
    return place_of(
        spec,
        root,
        folder / "stage.json",
        folder / attempt.name,
        python,
        hosts={step.name: attempt.host(step) for step in spec.steps},
        ports={step.name: attempt.port(index) for index, step in enumerate(spec.steps)},
    )


#: The words of a step that name its interpreter.
_PYTHON = re.compile(r"(.*/)?python[\d.]*")


def preflight_steps(spec: StageSpec, nodes: int, python: str) -> tuple[Step, ...]:
    """What looks at the nodes before the stage's own steps; nothing where the stage asks for no preflight.

    One task a node outside images, by the supervisor's own interpreter; where the stage has GPUs and runs Python, one
    task a node that starts CUDA as the stage will; and where asked for, an all-reduce with one task a GPU. The last two
    with the image and interpreter of the main step that has most GPUs. Of a heterogeneous job the first part is looked
    at.
    """
    asked = spec.preflight
    if asked is None:
        return ()
    first = [step for step in spec.steps if not step.het_group]
    gpus = max(step.gpus for step in first)
    words = (f"--gpus={gpus}", f"--min-free-gb={asked.min_free_gb:g}")
    look = (python, "-m", "launcher.workers.preflight", "nodes", *words)
    steps = [Step(name="preflight", argv=look, nodes=nodes, ntasks=nodes, gpus=gpus)]
    main = replace(max((s for s in first if s.role == "main"), key=lambda s: s.gpus), first_node=0, probe=None)
    inside = next(filter(_PYTHON.fullmatch, main.argv), "python3")
    if main.gpus and inside in main.argv:
        start = (inside, "-m", "launcher.workers.preflight", "cuda", f"--gpus={main.gpus}")
        steps.append(replace(main, name="cuda", argv=start, nodes=nodes, ntasks=nodes))
    if asked.all_reduce is not None and nodes * gpus != 1:
        words = (f"--size-mb={asked.all_reduce.size_mb}", f"--rounds={asked.all_reduce.rounds}")
        argv = (inside, "-m", "launcher.workers.preflight", "all-reduce", *words)
        tasks = nodes * max(gpus, 1)
        steps.append(replace(main, name="all-reduce", argv=argv, nodes=nodes, ntasks=tasks, gpus=gpus))
    return tuple(steps)


def preflight_place(place: Place, node: str, attempt: SlurmAttempt) -> Place:
    """A place with hosts and ports of the preflight's steps, `node` the first one."""
    ports = {"preflight": attempt.port(8), "cuda": attempt.port(8), "all-reduce": attempt.port(9)}
    return replace(place, hosts={**place.hosts, **dict.fromkeys(ports, node)}, ports={**place.ports, **ports})


def preflight_argv(step: Step, place: Place, runtime: Runtime) -> tuple[str, ...]:
    """The srun command of a preflight's step; what its tasks say goes to srun, since a node may not see the store."""
    outside = runtime if step.image else replace(runtime, container="none")
    return tuple(word for word in srun_argv(step, place, outside) if not word.startswith("--output="))


def _nodes_of(step: Step, place: Place) -> dict[str, str | int]:
    """Options that say which nodes of the job a step runs on; none where its nodes are the first or the only ones.

    A server on the first node is told so by name: srun prefers nodes that are idle.
    """
    if step.het_group is not None:
        return {"het-group": step.het_group}
    if step.first_node:
        return {"relative": step.first_node}
    return {"nodelist": place.hosts[step.name]} if step.role == "server" and step.nodes == 1 else {}


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
        **({"distribution": runtime.distribution} if runtime.distribution else {}),
        **({"cpu-bind": runtime.cpu_bind} if runtime.cpu_bind else {}),
        **_nodes_of(step, place),
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    workdir = os.path.dirname(place.stage_json)
    launch = wrap(step, fill(step.argv, place), environment(step, place), workdir, runtime)
    return ("srun", "--overlap", "--unbuffered", *flags, *launch)
