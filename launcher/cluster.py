"""The cluster profile: what a site's Slurm, nodes and containers are like. One YAML file a site, read strictly."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from launcher.configs import Resources, default_of, option
from launcher.containers import image_problems, mount_problem, order_mounts, runtime_problem
from launcher.data import data_dir, own_profiles, package_dir
from launcher.errors import UserError
from launcher.recipe.document import Document, read_document
from launcher.run_record import PlannedStage, RunRecord
from launcher.secret_files import holds_token, is_secret_variable
from launcher.spec import KINDS, Limits, Preflight, Runtime, SpecError, StageSpec, Step, decode, did_you_mean
from launcher.stages import outside_of
from launcher.steps import SRUN_DEFAULTS
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
#: Kinds of stage, and RL backends whose libraries need an image of their own.
IMAGE_NAMES = (*KINDS, "rl-nemo-aligner", "rl-nemo-rl")
#: Where containers of this machine find the `launcher` package that started them.
CODE_INSIDE = "/opt/prism-launch"
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
    description: str = option("", "One line for `prism-launch cluster list`.")
    poll_s: float = option(10.0, "slurm: seconds between looks at the queue while a run is followed.")
    slurm_conf: str | None = option(None, "slurm.conf that Slurm's commands read; null: the shell's or the site's own.")
    submit_rate: int | None = option(None, "Most calls of sbatch in a minute, over all runs in one root; null: no cap.")
    max_submit: int | None = option(None, "Most jobs of a user in the queue, elements of arrays counted each; null.")
    max_array: int = option(1001, "Most elements of a job array: the site's MaxArraySize.")
    max_array_running: int | None = option(None, "Most elements of a job array that run at the same time; null.")
    share_group: str | None = option(
        None, "Group that may read and write the store, so that several people share one; null: you alone."
    )
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
    env: Mapping[str, str] = option({}, "Variables of every job and every step; local: of steps in containers.")
    python: str = option("python3", "Interpreter of the workers: in the image where there is one.")
    host_python: str | None = option(None, "Python 3.10 or newer on the nodes, outside images; null: `python`.")
    code: str | None = option(
        None, "Folder with the `launcher` package as nodes see it; null: it is installed there, or, local, mounted."
    )
    images: Mapping[str, str] = option(
        {}, "Container image by kind of stage; rl-nemo-aligner and rl-nemo-rl for those backends."
    )
    gpu: str | None = option(None, "Type of the GPUs, such as h100-80gb: `prism-launch fit` lists them.")
    mounts: tuple[str, ...] = option((), "SRC, SRC:DST or SRC:DST:ro; the root, `code` and inputs are mounted anyway.")
    runtime: Runtime = option(Runtime(), "How steps are started: container, `none` for none; mpi and binding.")
    limits: Limits = option(Limits(), "When the supervisor acts, and how a stage gets another life.")
    preflight: Preflight | None = option(Preflight(), "What nodes must pass before the steps start; null: nothing.")
    notify: tuple[str, ...] = option((), "Command, word by word, that gets every change of state as JSON on its stdin.")

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
    for key in ("slots", "submit_rate", "max_submit", "max_array", "max_array_running"):
        count = getattr(profile, key)
        if count is not None and count < 1:
            yield key, f"must be at least 1, got {count}"
    if profile.mem and not _MEMORY.fullmatch(profile.mem):
        yield "mem", f"{profile.mem!r} is no amount of memory; write 64G"
    for kind in profile.images:
        if kind not in IMAGE_NAMES:
            hint = did_you_mean(kind, IMAGE_NAMES)
            yield f"images.{kind}", f"no such kind of stage{hint}; there is {', '.join(IMAGE_NAMES)}"
    for key, names in (("env", profile.env), ("runtime.env_unset", profile.runtime.env_unset)):
        yield from ((key, f"{name!r} is no name of a variable") for name in names if not _NAME.fullmatch(name))
    for key in ("distribution", "cpu_bind"):
        value = getattr(profile.runtime, key)
        if value is not None and not re.fullmatch(r"[\w:,=*.-]+", value):
            yield f"runtime.{key}", f"{value!r} is no value of srun's --{key.replace('_', '-')}"
    for name, value in profile.env.items():
        if name in SRUN_DEFAULTS:
            yield (
                f"env.{name}",
                "srun would take it for every step, so it is unset; see `runtime` for what steps are told",
            )
        if is_secret_variable(name) or holds_token(os.fsencode(value)):
            yield (
                f"env.{name}",
                "looks like a secret; name it under the recipe's `secrets:` and export it in your shell",
            )
        if "\0" in value:
            yield f"env.{name}", "holds a NUL character"
    yield from _notify_problems(profile.notify)


def _notify_problems(argv: tuple[str, ...]) -> Problems:
    """It runs on nodes and login nodes, in folders of its callers' choice, and without a shell."""
    program = argv[0] if argv else "true"
    if not program or ("/" in program and not program.startswith("/")):
        yield "notify[0]", f"{program!r}: give a full path, or the name of a program on PATH"
    yield from ((f"notify[{i}]", "holds a NUL character") for i, word in enumerate(argv) if "\0" in word)


def _local_problems(profile: Profile) -> Problems:
    slurm_only = ("partition", "cpu_partition", "partitions", "account", "qos", "constraint", "mem", "exclusive")
    submission = ("slurm_conf", "submit_rate", "max_submit", "max_array", "max_array_running", "share_group")
    jobs = ("gpu_request", "gpu_type", "sbatch", "setup", "host_python", "time", "preflight")
    ignored = (*slurm_only, *submission, *jobs)
    in_containers = ("env", "code", "images", "mounts", "python")
    contained = profile.runtime.container != "none"
    defaults = {f.name: default_of(f) for f in fields(profile)}
    for key in (*ignored, *(() if contained else in_containers)):
        if getattr(profile, key) != defaults[key]:
            without = " without containers" if key in in_containers else ""
            yield key, f"has no effect where scheduler is local{without}"
    if contained:
        yield from _container_problems(profile)


def _container_problems(profile: Profile) -> Problems:
    problem = runtime_problem(profile.runtime.container, profile.scheduler)
    if problem:
        yield "runtime.container", problem
    for kind, image in profile.images.items():
        yield from ((f"images.{kind}", problem) for problem in image_problems(image, profile.runtime))
    for i, mount in enumerate(profile.mounts):
        problem = mount_problem(mount, profile.runtime.container)
        if problem:
            yield f"mounts[{i}]", problem
    if profile.code and not profile.code.startswith("/"):
        yield "code", f"{profile.code}: give the full path on the nodes"


def _slurm_problems(profile: Profile) -> Problems:
    limits = profile.limits
    if limits.continuation == "chain" and limits.chain_jobs > (profile.max_submit or limits.chain_jobs):
        yield "limits.chain_jobs", f"{limits.chain_jobs} jobs a stage, but max_submit is {profile.max_submit}"
    for key in ("partition", "cpu_partition"):
        for name in alternatives(getattr(profile, key)) if profile.partitions else ():
            if name not in profile.partitions:
                yield key, f"{name} is not under partitions{did_you_mean(name, profile.partitions)}"
    yield from _container_problems(profile)
    if profile.slurm_conf and not profile.slurm_conf.startswith("/"):
        yield "slurm_conf", f"{profile.slurm_conf}: give the full path"
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


def speak_to(profile: Profile) -> Profile:
    """Let this process' Slurm commands, and all it starts, read the profile's `slurm_conf`; returns the profile."""
    if profile.slurm_conf:
        os.environ["SLURM_CONF"] = profile.slurm_conf
    return profile


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
        return decode(Profile, {**document.data, "name": path.stem}, document.written)
    except SpecError as error:
        raise UserError(f"{_where(document, key, path)}: {key}: {message}" for key, message in error.problems) from None


def _where(document: Document, key: str, path: Path) -> str:
    while key and key not in document.positions:
        key = re.sub(r"(^|\.)[^.[]*$|\[\d+\]$", "", key)
    return document.positions.get(key, os.path.relpath(path))


def profile_files() -> list[Path]:
    """The shipped profiles' files."""
    return sorted((data_dir("slurm") / "clusters").glob("*.yaml"), key=lambda path: path.stem)


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
        if profile.runtime.container != "none":
            yield from _image_problems(resources, spec, profile)
        return
    yield from _limit_problems(resources, profile)
    yield from _time_problems(resources, profile)
    if resources.mem and not _MEMORY.fullmatch(resources.mem):
        yield "mem", f"{resources.mem!r} is no amount of memory; write 64G"
    yield from _image_problems(resources, spec, profile)


def _image_problems(resources: Resources, spec: StageSpec, profile: Profile) -> Problems:
    mend = f"; set images.{spec.kind} in the profile of cluster {profile.name}, or image here"
    for problem in image_problems(resources.image or image_of(spec, profile), profile.runtime):
        yield "image", problem + (mend if problem == "no container image" else "")


def alternatives(text: str | None) -> tuple[str, ...]:
    """The names in a value of Slurm's that may be a list, `a,b`: one of them is enough."""
    return tuple(filter(None, (name.strip() for name in (text or "").split(","))))


def listed(text: str | None) -> str | None:
    """Such a value as Slurm reads it, which takes no blank beside a comma; None where it names nothing."""
    return ",".join(alternatives(text)) or None


def _limit_problems(resources: Resources, profile: Profile) -> Problems:
    """What no partition allows that the stage may go to; each of several says why not."""
    names = alternatives(profile.partition_of(resources))
    known = ", ".join(profile.partitions)
    unknown = [name for name in names if profile.partitions and name not in profile.partitions]
    for name in unknown:
        yield (
            "partition",
            f"no partition {name}{did_you_mean(name, profile.partitions)}; cluster {profile.name} has {known}",
        )
    if profile.partitions and not names:
        yield "partition", f"names no partition; cluster {profile.name} has {known}"
    there = [name for name in names if name not in unknown] or [""]
    found = [list(_beyond(resources, profile, name, profile.partitions.get(name, Partition()))) for name in there]
    if all(found):
        yield from dict.fromkeys(itertools.chain(*found))


def _beyond(resources: Resources, profile: Profile, name: str, limits: Partition) -> Problems:
    """What a stage asks for beyond a partition's limits."""
    asked = (
        ("nodes", resources.nodes, limits.max_nodes, "nodes"),
        ("gpus_per_node", resources.gpus_per_node, limits.gpus_per_node, "GPUs a node"),
        ("cpus_per_task", resources.cpus_per_task * resources.ntasks_per_node, limits.cpus_per_node, "cores a node"),
    )
    for key, count, most, noun in asked:
        if most is not None and count > most:
            yield key, f"asks for {count} {noun}, but partition {name} of cluster {profile.name} has {most}"
    text = profile.time_of(resources)
    with contextlib.suppress(ValueError):  # told below
        if limits.max_time and parse_duration(text) > parse_duration(limits.max_time):
            yield "time", f"{text} is beyond the {limits.max_time} of partition {name} of cluster {profile.name}"


def _time_problems(resources: Resources, profile: Profile) -> Problems:
    text = profile.time_of(resources)
    try:
        seconds = parse_duration(text)
    except ValueError as error:
        yield "time", str(error)
        return
    least = profile.signal_lead_s + 120
    if seconds < least:
        yield "time", f"{text} is too short to save before it ends; ask for at least {format_duration(least)}"


def place_stage(stage: PlannedStage, profile: Profile, root: Path) -> PlannedStage:
    """The stage as it runs on this cluster: interpreter, variables, image and mounts stand in its steps.

    Nothing of that decides what the stage computes, so the fingerprint stays. `root` is the store as the nodes see it.
    """
    steps = tuple(_place_step(step, stage.spec, profile, root) for step in stage.spec.steps)
    asked = stage.job_parts[None]
    looked_at = profile.scheduler == "slurm" and (asked.nodes > 1 or asked.gpus_per_node > 0)
    preflight = profile.preflight if looked_at else None
    return replace(stage, spec=replace(stage.spec, steps=steps, preflight=preflight))


def place_record(record: RunRecord, profile: Profile, root: Path) -> RunRecord:
    """The run with every stage placed on this cluster; on this machine without containers it stays as it is."""
    if profile.scheduler == "local" and profile.runtime.container == "none":
        return record
    return replace(record, stages=tuple(place_stage(stage, profile, root) for stage in record.stages))


def _place_step(step: Step, spec: StageSpec, profile: Profile, root: Path) -> Step:
    code, code_mount = code_folder(spec, profile, root), None
    if code:
        code_mount = f"{code}:{code}:ro"
    elif profile.scheduler == "local":
        # The package alone: what else is installed beside it is the image's affair.
        code, code_mount = CODE_INSIDE, f"{package_dir()}:{CODE_INSIDE}/launcher:ro"
    env = {**profile.env, **({"PYTHONPATH": code} if code else {}), **step.env}
    argv = tuple(word.replace("{python}", profile.python) for word in step.argv)
    if profile.runtime.container == "none":
        return replace(step, argv=argv, env=env)
    outside = tuple(f"{path}:{path}:ro" for path in _outside(spec))
    own = (str(root), *([code_mount] if code_mount and not spec.snapshot else []))  # a snapshot lies in the root
    mounts = order_mounts((*own, *step.mounts, *profile.mounts, *outside))
    return replace(step, argv=argv, env=env, image=step.image or image_of(spec, profile), mounts=mounts)


def image_of(spec: StageSpec, profile: Profile) -> str | None:
    """The profile's image for a stage; an RL backend may have one of its own."""
    own = profile.images.get(f"rl-{spec.config.get('backend')}") if spec.kind == "rl" else None
    return own or profile.images.get(spec.kind)


def _outside(spec: StageSpec) -> list[str]:
    """What a stage reads outside the store: checkpoints, text, a tokenizer, a user's script and what lies beside it."""
    paths = [port.path for port in spec.inputs.values()]
    for outside in outside_of(spec):
        paths.append(os.path.dirname(outside.path) if outside.counts == "content" else outside.path)
    return [path for path in paths if os.path.isabs(path)]


def code_folder(spec: StageSpec, profile: Profile, root: Path) -> str | None:
    """Where the nodes find the `launcher` package: the stage's snapshot, else the profile's `code`."""
    return str(root / spec.snapshot) if spec.snapshot else profile.code
