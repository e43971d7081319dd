"""The contract between the login side and the jobs: what a planned stage is, and its file `stage.json`.

Standard library only and Python >= 3.10: this module is imported on login nodes and, under another interpreter, inside
containers. Every value is frozen; `decode` turns plain JSON into these dataclasses and reports every problem at once.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

SCHEMA = 1

#: What an artifact's port holds on disk; `docs/architecture.md` describes each layout.
Format = Literal["hf", "megatron", "nemo", "tokenizer", "tokens", "prompts", "scores", "analysis"]

Kind = Literal["prepare", "train", "convert", "merge", "rl", "evaluate", "analyze"]
KINDS: tuple[str, ...] = typing.get_args(Kind)

#: How an attempt ended. One action belongs to each class; see `launcher.supervisor.classify`.
ExitClass = Literal[
    "finished",
    "time-limit",
    "preempted",
    "requeued",
    "cancelled",
    "node-failure",
    "preflight",
    "gpu-fault",
    "out-of-memory",
    "hang",
    "crashed",
    "storage",
    "diverged",
    "user-error",
]

T = TypeVar("T")


class SpecError(ValueError):
    """A value does not fit its declared type; `problems` is a tuple of (path, message)."""

    def __init__(self, problems: list[tuple[str, str]]):
        self.problems = tuple(problems)
        super().__init__("; ".join(f"{path or '(top)'}: {message}" for path, message in problems))


@dataclass(frozen=True)
class Input:
    """An artifact's port, or a file outside the store, that a stage reads.

    `path` is relative to the store's root; absolute for what lies outside it.
    """

    path: str
    format: Format
    fingerprint: str


@dataclass(frozen=True)
class Output:
    """A port that a stage fills: a folder inside the stage's one artifact, relative to the store's root."""

    path: str
    format: Format


@dataclass(frozen=True)
class Probe:
    """How to see that a component is ready: a TCP port, an HTTP path, or a file relative to the attempt's folder."""

    kind: Literal["tcp", "http", "file"]
    target: str
    deadline: float = 600.0


@dataclass(frozen=True)
class Step:
    """One program of a stage, started as one srun (or as `ntasks` local processes).

    `argv` may hold the placeholders `{python}`, `{stage_json}`, `{attempt_dir}`, `{host:NAME}` and `{port:NAME}`,
    which `launcher.steps` fills in when they are known. `ntasks` counts all tasks, `gpus` and `cpus` are per node and
    per task. `gpus` 0 asks for none explicitly. The step's nodes are those from the allocation's node `first_node` on,
    counted from 0; in a heterogeneous job, those of its component `het_group`.
    """

    name: str
    argv: tuple[str, ...]
    role: Literal["main", "server"] = "main"
    nodes: int = 1
    ntasks: int = 1
    gpus: int = 0
    cpus: int = 1
    env: Mapping[str, str] = field(default_factory=dict)
    image: str | None = None
    mounts: tuple[str, ...] = ()
    probe: Probe | None = None
    first_node: int = 0
    het_group: int | None = None


@dataclass(frozen=True)
class Limits:
    """Seconds and counts at which the supervisor acts.

    hang_s: no heartbeat for this long is a hang; save_s: what a worker gets to save and stop when asked;
    max_no_progress: restarts in a row without progress before the stage has failed; visibility_s: how long a file may
    stay unseen that another node has written: 65 on NFS, whose attribute cache lasts a minute by default;
    continuation: how a stage gets another life: its job goes back into the queue, or, where that is refused,
    `chain_jobs` jobs are submitted at once, each after the one before; max_excluded: bad nodes that a stage may leave
    out.
    """

    hang_s: float = 1800.0
    save_s: float = 120.0
    max_no_progress: int = 2
    continuation: Literal["requeue", "chain"] = "requeue"
    visibility_s: float = 0.0
    chain_jobs: int = 4
    max_excluded: int = 4

    def __post_init__(self) -> None:
        least = {"max_no_progress": 0, "chain_jobs": 1, "max_excluded": 0}
        wrong = [(n, f"must be at least {v}, got {getattr(self, n)}") for n, v in least.items() if getattr(self, n) < v]
        if wrong:
            raise SpecError(wrong)


@dataclass(frozen=True)
class AllReduce:
    """A short all-reduce over all nodes, one process a GPU: `size_mb` of 2^20 bytes, and the least bus bandwidth.

    Bus bandwidth as nccl-tests defines it, in 10^9 bytes a second: 2 (n - 1) / n times the size over the time.
    """

    floor_gbs: float
    size_mb: int = 1024
    rounds: int = 10


@dataclass(frozen=True)
class Preflight:
    """What every node must pass before the steps of a job that asks for GPUs or for several nodes.

    Always: as many GPUs as asked for, without uncorrected memory errors, and the store's root readable and writable.
    min_free_gb: room under the root, in 10^9 bytes; deadline_s: a node that has not answered by then has failed;
    all_reduce: off by default.
    """

    min_free_gb: float = 1.0
    deadline_s: float = 120.0
    all_reduce: AllReduce | None = None


@dataclass(frozen=True)
class Runtime:
    """How steps are started: the container runtime, srun's MPI flavour, variables removed from the environment."""

    container: Literal["none", "pyxis", "apptainer", "docker", "podman", "charliecloud"] = "none"
    mpi: str | None = None
    env_unset: tuple[str, ...] = ()


@dataclass(frozen=True)
class StageSpec:
    """One stage of a plan; as `stage.json` it is the whole contract between login side and job.

    `config` is the plain-JSON form of the kind's dataclass in `launcher.configs`. All paths are relative to the
    store's root. The artifact's folder is the parent of every output's path. `secrets` names variables of the
    submitting shell that the steps need; their values stand in no file. `notify` is the command that is told of
    changes of state.
    """

    run: str
    stage: str
    kind: Kind
    kind_version: int
    fingerprint: str
    config: Mapping[str, Any]
    seed: int
    inputs: Mapping[str, Input]
    outputs: Mapping[str, Output]
    steps: tuple[Step, ...]
    first_exit: Literal["main", "any"] = "any"
    limits: Limits = Limits()
    runtime: Runtime = Runtime()
    preflight: Preflight | None = None
    snapshot: str | None = None
    secrets: tuple[str, ...] = ()
    notify: tuple[str, ...] = ()
    schema: int = SCHEMA

    @property
    def artifact(self) -> str:
        """The artifact's folder, relative to the store's root."""
        return f"artifacts/{self.kind}/{self.fingerprint}"


def encode(value: Any) -> Any:
    """A frozen value as plain JSON data."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): encode(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(v) for v in value]
    return value


def decode(cls: type[T], data: Any) -> T:
    """Plain JSON data as `cls`; strict, no coercion but int to float and list to tuple.

    Raises SpecError with every problem found, each with its path.
    """
    problems: list[tuple[str, str]] = []
    value = _decode(cls, data, "", problems)
    if problems:
        raise SpecError(problems)
    return typing.cast(T, value)


def _decode(hint: Any, data: Any, path: str, problems: list[tuple[str, str]]) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return data
    if origin in (Union, types.UnionType):
        return _decode_union(args, data, path, problems)
    if origin is Literal:
        return _expect(data in args, data, f"one of {', '.join(map(repr, args))}", path, problems)
    if dataclasses.is_dataclass(hint):
        return _decode_dataclass(hint, data, path, problems)
    if origin is tuple:
        return _decode_tuple(args, data, path, problems)
    if origin in (dict, Mapping):
        if not isinstance(data, Mapping):
            return _expect(False, data, "a mapping", path, problems)
        return {k: _decode(args[1], v, _join(path, str(k)), problems) for k, v in data.items()}
    if hint is float:
        ok = isinstance(data, (int, float)) and not isinstance(data, bool)
        ok = ok and not (isinstance(data, int) and abs(data) > sys.float_info.max)
        return float(data) if ok else _expect(False, data, "a number", path, problems)
    ok = isinstance(data, hint) and not (hint is int and isinstance(data, bool))
    return _expect(ok, data, _TYPE_NAMES.get(hint, str(hint)), path, problems)


_TYPE_NAMES = {int: "a whole number", str: "a string", bool: "true or false", type(None): "null"}


def _expect(ok: bool, data: Any, wanted: str, path: str, problems: list[tuple[str, str]]) -> Any:
    if not ok:
        problems.append((path, f"expected {wanted}, got {json.dumps(data, default=str)}"))
    return data


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _decode_union(args: tuple[Any, ...], data: Any, path: str, problems: list[tuple[str, str]]) -> Any:
    tries: list[list[tuple[str, str]]] = []
    for arg in args:
        found: list[tuple[str, str]] = []
        value = _decode(arg, data, path, found)
        if not found:
            return value
        tries.append(found)
    # The alternative that got furthest is the one the author meant: deeper paths come from inside it.
    problems.extend(max(tries, key=lambda found: max(len(p) for p, _ in found)))
    return data


def _decode_tuple(args: tuple[Any, ...], data: Any, path: str, problems: list[tuple[str, str]]) -> Any:
    if not isinstance(data, (list, tuple)):
        return _expect(False, data, "a list", path, problems)
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_decode(args[0], v, f"{path}[{i}]", problems) for i, v in enumerate(data))
    if len(args) != len(data):
        return _expect(False, data, f"a list of {len(args)}", path, problems)
    return tuple(_decode(a, v, f"{path}[{i}]", problems) for i, (a, v) in enumerate(zip(args, data, strict=True)))


#: Unknown keys of one mapping that are compared with those there are, which takes a while.
_HINTS = 20


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _decode_dataclass(cls: Any, data: Any, path: str, problems: list[tuple[str, str]]) -> Any:
    if not isinstance(data, Mapping):
        return _expect(False, data, "a mapping", path, problems)
    hints = _hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    before = len(problems)
    unknown = [key for key in data if key not in fields]
    hints_given = {key: did_you_mean(str(key), fields) if i < _HINTS else "" for i, key in enumerate(unknown)}
    not_there: Mapping[str, str] = getattr(cls, "NOT_THERE", {})  # known elsewhere, and why not here
    problems += [(_join(path, str(key)), not_there.get(key, f"unknown key{hint}")) for key, hint in hints_given.items()]
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        # A misspelt key is one problem and not two.
        if required and name not in data and f", did you mean {name}?" not in hints_given.values():
            problems.append((_join(path, name), "is required"))
    values = {k: _decode(hints[k], v, _join(path, k), problems) for k, v in data.items() if k in fields}
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except SpecError as error:
        problems.extend((_join(path, p), m) for p, m in error.problems)
    return None


def did_you_mean(word: str, known: typing.Iterable[str]) -> str:
    """`, did you mean X?` or, where nothing is close, nothing."""
    import difflib

    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]}?" if close else ""


def read_stage(path: str | os.PathLike[str]) -> StageSpec:
    """Read `stage.json`. Raises OSError, or SpecError where the file is not one."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        data = json.loads(text)
    except ValueError as error:
        raise SpecError([("", f"{path}: not JSON: {error}")]) from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise SpecError([("schema", f"{path}: expected {SCHEMA}; written by another version of prism-launch")])
    return decode(StageSpec, data)


def stage_text(spec: StageSpec) -> str:
    """The text of `stage.json`."""
    return json.dumps(encode(spec), indent=2, sort_keys=True) + "\n"
