"""The cluster profile: what a site's Slurm, nodes and containers are like. One YAML file a site, read strictly."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from launcher.configs import Resources, default_of, option
from launcher.containers import RUNTIMES, image_problems, mount_problem, not_built, order_mounts
from launcher.data import data_dir, own_profiles
from launcher.errors import UserError
from launcher.recipe.document import Document, read_document
from launcher.run_record import PlannedStage, RunRecord
from launcher.spec import KINDS, Limits, Preflight, Runtime, SpecError, StageSpec, Step, decode, did_you_mean
from launcher.units import format_duration, parse_duration

#: sbatch options that a profile's `sbatch:` may not set, and what sets them.
OWNED = {
    **dict.fromkeys(("nodes", "ntasks", "ntasks-per-node", "cpus-per-task"), "the stage's resources"),
    **dict.fromkeys(("gpus", "gpus-per-node", "gpus-per-task", "gres"), "gpu_request"),
    **dict.fromkeys(("partition", "account", "qos", "constraint", "time", "mem", "exclusive"), "the key of that name"),
    **dict.fromkeys(("mem-per-cpu", "mem-per-gpu"), "mem"),
    **dict.fromkeys(("signal", "requeue", "no-requeue"), "limits"),
    **dict.fromkeys(("job-name", "output", "error", "input", "open-mode", "chdir"), "the run and the store"),
    **dict.fromkeys(("dependency", "kill-on-invalid-dep", "array", "hold"), "submit.sh"),
    **dict.fromkeys(("wrap", "parsable", "wait", "test-only"), "nothing: scripts are files and submit.sh reads ids"),
    **dict.fromkeys(("container", "container-image", "container-mounts", "environment"), "runtime and images"),
}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MEMORY = re.compile(r"\d+[KMGT]?")


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Limits of a partition; what is not stated is not checked."""

    max_nodes: int | None = option(None, "Most nodes of one job.")
    max_time: str | None = option(None, "Longest time limit, as sbatch takes it.")
    gpus_per_node: int | None = option(None, "GPUs on a node; 0: none.")
    cpus_per_node: int | None = option(None, "Cores of a node that jobs may use.")

    def __post_init__(self) -> None:
        _raise(list(_time_problem("max_time", self.max_time)))


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A cluster: `slurm/clusters/NAME.yaml`, or a file of the user's own."""

    name: str = option(..., "The file's name without .yaml; not a key of the file.")
    scheduler: Literal["local", "slurm"] = option(..., "slurm, or local: processes of this machine.")
    description: str = option("", "One line for `prism-launch clusters`.")
    poll_s: float = option(10.0, "slurm: seconds between looks at the queue while a run is followed.")
    slots: int = option(1, "local: processes that run side by side: each stage takes its tasks times their cores.")
    partition: str | None = option(None, "Partition of stages that name none; null: the site's default.")
    cpu_partition: str | None = option(None, "Partition of stages that ask for no GPU; null: `partition`.")
    partitions: Mapping[str, Partition] = option({}, "Limits by partition; where given, no other may be asked for.")
    account: str | None = option(None, "Account that is charged.")
    qos: str | None = option(None, "Quality of service.")
    constraint: str | None = option(None, "Node features, as sbatch takes them.")
    time: str = option("1:00:00", "Time limit of stages that name none.")
    mem: str | None = option(None, "Memory of a node for stages that name none: 64G, 0 for all of it; null: not asked.")
    exclusive: bool = option(False, "Take whole nodes.")
    gpu_request: Literal["gpus_per_node", "gres"] = option("gpus_per_node", "How GPUs are asked for.")
    gpu_type: str | None = option(None, "Type in the request: gpu:TYPE:8.")
    sbatch: Mapping[str, str | int | bool] = option({}, "Further sbatch options; true for one without a value.")
    setup: tuple[str, ...] = option((), "Shell lines before the supervisor starts, such as `module load`.")
    env: Mapping[str, str] = option({}, "Variables of every job and every step.")
    python: str = option("python3", "Interpreter of the workers: in the image where there is one.")
    host_python: str | None = option(None, "Python 3.10 or newer on the nodes, outside images; null: `python`.")
    code: str | None = option(None, "Folder with the `launcher` package as nodes see it; null: it is installed there.")
    images: Mapping[str, str] = option({}, "Container image by kind of stage.")
    mounts: tuple[str, ...] = option((), "SRC, SRC:DST or SRC:DST:ro; the root, `code` and inputs are mounted anyway.")
    runtime: Runtime = option(Runtime(), "container: none, pyxis or apptainer; mpi; env_unset.")
    limits: Limits = option(Limits(), "When the supervisor acts, and how a stage gets another life.")
    preflight: Preflight | None = option(Preflight(), "What nodes must pass before the steps start; null: nothing.")

    def __post_init__(self) -> None:
        _raise([*_profile_problems(self), *(_slurm_problems if self.scheduler == "slurm" else _local_problems)(self)])

    @property
    def signal_lead_s(self) -> int:
        """Seconds before the time limit at which Slurm signals: time to save, and 30 s for Slurm itself to act."""
        return math.ceil(self.limits.save_s) + 30

    def partition_of(self, resources: Resources) -> str | None:
        """The partition that a stage goes to; None: the site's default."""
        default = self.partition if resources.gpus_per_node else self.cpu_partition or self.partition
        return resources.partition or default

    def time_of(self, resources: Resources) -> str:
        """A stage's time limit."""
        return resources.time or self.time


# ---------------------------------------------------------------------------------------------------------- validity

Problems = Iterator[tuple[str, str]]


def _raise(problems: list[tuple[str, str]]) -> None:
    if problems:
        raise SpecError(problems)


def _time_problem(key: str, text: str | None) -> Problems:
    try:
        parse_duration(text or "1")
    except ValueError as error:
        yield key, str(error)


def _profile_problems(profile: Profile) -> Problems:
    yield from _time_problem("time", profile.time)
    if profile.slots < 1:
        yield "slots", f"must be at least 1, got {profile.slots}"
    if profile.mem and not _MEMORY.fullmatch(profile.mem):
        yield "mem", f"{profile.mem!r} is no amount of memory; write 64G"
    for kind in profile.images:
        if kind not in KINDS:
            yield f"images.{kind}", f"no such kind of stage{did_you_mean(kind, KINDS)}; there is {', '.join(KINDS)}"
    for key, names in (("env", profile.env), ("runtime.env_unset", profile.runtime.env_unset)):
        yield from ((key, f"{name!r} is no name of a variable") for name in names if not _NAME.fullmatch(name))
    for name, value in profile.env.items():
        if "\0" in value:
            yield f"env.{name}", "holds a NUL character"


def _local_problems(profile: Profile) -> Problems:
    slurm_only = ("partition", "cpu_partition", "partitions", "account", "qos", "constraint", "mem", "exclusive")
    ignored = (
        *slurm_only,
        "gpu_request",
        "gpu_type",
        "sbatch",
        "setup",
        "env",
        "host_python",
        "code",
        "images",
        "mounts",
        "preflight",
    )
    defaults = {f.name: default_of(f) for f in fields(profile)}
    for key in (*ignored, "python", "time"):
        if getattr(profile, key) != defaults[key]:
            yield key, "has no effect where scheduler is local"
    if profile.runtime.container != "none":
        yield "runtime.container", f"{profile.runtime.container} on the local scheduler is not built yet"


def _slurm_problems(profile: Profile) -> Problems:
    if profile.runtime.container not in RUNTIMES:
        yield "runtime.container", not_built(profile.runtime.container)
    if profile.limits.continuation == "chain":
        yield "limits.continuation", "chain is not built yet; there is requeue"
    for key in ("partition", "cpu_partition"):
        name = getattr(profile, key)
        if name and profile.partitions and name not in profile.partitions:
            yield key, f"{name} is not under partitions{did_you_mean(name, profile.partitions)}"
    for kind, image in profile.images.items():
        yield from ((f"images.{kind}", problem) for problem in image_problems(image, profile.runtime))
    for i, mount in enumerate(profile.mounts):
        problem = mount_problem(mount)
        if problem:
            yield f"mounts[{i}]", problem
    if profile.code and not profile.code.startswith("/"):
        yield "code", f"{profile.code}: give the full path on the nodes"
    for i, line in enumerate(profile.setup):
        if line.lstrip().startswith("#SBATCH"):
            yield f"setup[{i}]", "sbatch options go under sbatch:"
    yield from _option_problems(profile)


def _option_problems(profile: Profile) -> Problems:
    for key, value in profile.sbatch.items():
        option_name = key.replace("_", "-")
        if option_name in OWNED:
            yield f"sbatch.{key}", f"is set by {OWNED[option_name]}"
        elif not re.fullmatch(r"[a-z][a-z0-9-]*", option_name):
            yield f"sbatch.{key}", "is no long option of sbatch"
        elif value is False:
            yield f"sbatch.{key}", "leave the line out instead of false"


# ----------------------------------------------------------------------------------------------------------- reading


def load_profile(name_or_path: str) -> Profile:
    """The user's own or the shipped profile of that name, or a .yaml file.

    Raises UserError with every problem's file and line.
    """
    named = _named_files()
    if name_or_path in named:
        return _read(named[name_or_path])
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        return _read(path)
    hint = did_you_mean(name_or_path, named)
    raise UserError(
        f"no cluster profile {name_or_path}{hint}; there is {', '.join(named)}, or give the path of a .yaml file"
    )


def _read(path: Path) -> Profile:
    document = read_document(path, os.path.relpath(path))
    if "name" in document.data:
        raise UserError(
            f"{_where(document, 'name', path)}: name: remove it; a profile is called as its file, {path.stem}"
        )
    try:
        return decode(Profile, {**document.data, "name": path.stem})
    except SpecError as error:
        raise UserError(f"{_where(document, key, path)}: {key}: {message}" for key, message in error.problems) from None


def _where(document: Document, key: str, path: Path) -> str:
    while key and key not in document.positions:
        key = re.sub(r"(^|\.)[^.[]*$|\[\d+\]$", "", key)
    return document.positions.get(key, os.path.relpath(path))


def profile_files() -> list[Path]:
    """The shipped profiles' files."""
    return sorted((data_dir("slurm") / "clusters").glob("*.yaml"))


def _named_files() -> dict[str, Path]:
    """Name to file: the shipped profiles, then the user's own, which stand in for shipped ones of the same name."""
    own = (path for path in sorted(own_profiles().glob("*.yaml")) if path.exists())
    return {path.stem: path for path in (*profile_files(), *own)}


def list_profiles() -> tuple[Profile, ...]:
    """The shipped profiles and the user's own."""
    return tuple(_read(path) for path in _named_files().values())


# ------------------------------------------------------------------------------------------------------------ stages


def check_resources(resources: Resources, spec: StageSpec, profile: Profile) -> Problems:
    """What this cluster can never run, as (key of the stage's resources, message)."""
    if profile.scheduler == "local":
        if resources.nodes > 1:
            yield "nodes", f"asks for {resources.nodes} nodes, but cluster {profile.name} is one machine"
        return
    yield from _limit_problems(resources, profile)
    yield from _time_problems(resources, profile)
    if resources.mem and not _MEMORY.fullmatch(resources.mem):
        yield "mem", f"{resources.mem!r} is no amount of memory; write 64G"
    mend = f"; set images.{spec.kind} in the profile of cluster {profile.name}, or image here"
    for problem in image_problems(resources.image or profile.images.get(spec.kind), profile.runtime):
        yield "image", problem + (mend if problem == "no container image" else "")


def _partition(resources: Resources, profile: Profile) -> tuple[str | None, Partition]:
    name = profile.partition_of(resources)
    return name, profile.partitions.get(name or "", Partition())


def _limit_problems(resources: Resources, profile: Profile) -> Problems:
    name, limits = _partition(resources, profile)
    if profile.partitions and name not in profile.partitions:
        known = ", ".join(profile.partitions)
        found = f"no partition {name}{did_you_mean(name, profile.partitions)}" if name else "names no partition"
        yield "partition", f"{found}; cluster {profile.name} has {known}"
    asked = (
        ("nodes", resources.nodes, limits.max_nodes, "nodes"),
        ("gpus_per_node", resources.gpus_per_node, limits.gpus_per_node, "GPUs a node"),
        ("cpus_per_task", resources.cpus_per_task * resources.ntasks_per_node, limits.cpus_per_node, "cores a node"),
    )
    for key, count, most, noun in asked:
        if most is not None and count > most:
            yield key, f"asks for {count} {noun}, but partition {name} of cluster {profile.name} has {most}"


def _time_problems(resources: Resources, profile: Profile) -> Problems:
    text = profile.time_of(resources)
    try:
        seconds = parse_duration(text)
    except ValueError as error:
        yield "time", str(error)
        return
    name, limits = _partition(resources, profile)
    if limits.max_time and seconds > parse_duration(limits.max_time):
        yield "time", f"{text} is beyond the {limits.max_time} of partition {name} of cluster {profile.name}"
    least = profile.signal_lead_s + 120
    if seconds < least:
        yield "time", f"{text} is too short to save before it ends; ask for at least {format_duration(least)}"


def place_stage(stage: PlannedStage, profile: Profile, root: Path) -> PlannedStage:
    """The stage as it runs on this cluster: interpreter, variables, image and mounts stand in its steps.

    Nothing of that decides what the stage computes, so the fingerprint stays. `root` is the store as the nodes see it.
    """
    steps = tuple(_place_step(step, stage.spec, profile, root) for step in stage.spec.steps)
    looked_at = profile.scheduler == "slurm" and (stage.resources.nodes > 1 or stage.resources.gpus_per_node > 0)
    preflight = profile.preflight if looked_at else None
    return replace(stage, spec=replace(stage.spec, steps=steps, preflight=preflight))


def place_record(record: RunRecord, profile: Profile, root: Path) -> RunRecord:
    """The run with every stage placed on this cluster."""
    return replace(record, stages=tuple(place_stage(stage, profile, root) for stage in record.stages))


def _place_step(step: Step, spec: StageSpec, profile: Profile, root: Path) -> Step:
    code = code_folder(spec, profile, root)
    env = {**profile.env, **({"PYTHONPATH": code} if code else {}), **step.env}
    argv = tuple(word.replace("{python}", profile.python) for word in step.argv)
    if profile.runtime.container == "none":
        return replace(step, argv=argv, env=env)
    outside = tuple(f"{path}:{path}:ro" for path in _outside(spec))
    own = (str(root), *([f"{code}:{code}:ro"] if code else []))
    mounts = order_mounts((*own, *step.mounts, *profile.mounts, *outside))
    return replace(step, argv=argv, env=env, image=step.image or profile.images.get(spec.kind), mounts=mounts)


def _outside(spec: StageSpec) -> list[str]:
    """What a stage reads outside the store: checkpoints, and a prepare stage's text and tokenizer."""
    paths: list[str | None] = [port.path for port in spec.inputs.values()]
    if spec.kind == "prepare":
        paths += [source["path"] for source in spec.config["sources"].values()]
        paths.append(spec.config["tokenizer"]["path"])
    return [path for path in paths if path and os.path.isabs(path)]


def code_folder(spec: StageSpec, profile: Profile, root: Path) -> str | None:
    """Where the nodes find the `launcher` package: the stage's snapshot, else the profile's `code`."""
    return str(root / spec.snapshot) if spec.snapshot else profile.code
