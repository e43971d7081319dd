"""The contract between the login side and the jobs: what a planned stage is, and its file `stage.json`.

Standard library only and Python >= 3.10: this module is imported on login nodes and, under another interpreter, inside
containers. Every value is frozen; `decode` turns plain JSON into these dataclasses and reports every problem at once.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
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

#: The model families that are covered, by `model_type` of config.json; `launcher.models.families` has their modules.
Family = Literal["llama", "mistral", "granite", "granitemoehybrid", "nemotron_h"]

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

    def __post_init__(self) -> None:
        least = {"nodes": 1, "ntasks": 1, "gpus": 0, "cpus": 1, "first_node": 0}
        wrong = [(n, f"must be at least {v}, got {getattr(self, n)}") for n, v in least.items() if getattr(self, n) < v]
        if wrong:
            raise SpecError(wrong)


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

    Always: as many GPUs as asked for, without uncorrected memory errors, CUDA that starts in the stage's image, and the
    store's root readable and writable. min_free_gb: room under the root, in 10^9 bytes; deadline_s: a node that has not
    answered by then has failed, what runs in the image ten minutes later; all_reduce: off by default.
    """

    min_free_gb: float = 1.0
    deadline_s: float = 120.0
    all_reduce: AllReduce | None = None


@dataclass(frozen=True)
class Runtime:
    """How steps are started: the container runtime, srun's MPI flavour, variables removed from the environment.

    distribution and cpu_bind are srun's options of that name. Ranks fill one socket after the other by default, as GPUs
    are numbered on most nodes; Slurm's own default deals them out in turn, away from their GPUs. null: not said.
    """

    container: Literal["none", "pyxis", "apptainer", "docker", "podman", "charliecloud"] = "none"
    mpi: str | None = None
    env_unset: tuple[str, ...] = ()
    distribution: str | None = "block:block"
    cpu_bind: str | None = None


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

    def __post_init__(self) -> None:
        """Refuse what would be written outside its run or artifact."""
        names = {"run": self.run, "stage": self.stage, "fingerprint": self.fingerprint}
        wrong = [(key, f"{name!r} is no name of a folder") for key, name in names.items() if not _is_folder_name(name)]
        for port, output in self.outputs.items():
            if not all(_is_folder_name(part) for part in output.path.split("/")):
                wrong.append((f"outputs.{port}.path", f"{output.path!r} is no path inside the store"))
        if wrong:
            raise SpecError(wrong)

    @property
    def artifact(self) -> str:
        """The artifact's folder, relative to the store's root."""
        return f"artifacts/{self.kind}/{self.fingerprint}"


def _is_folder_name(name: str) -> bool:
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name


def encode(value: Any) -> Any:
    """A frozen value as plain JSON data."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): encode(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(v) for v in value]
    return value


class _Problems(list[tuple[str, str]]):
    """What was found, (path, message); `written` as `decode` gets it."""

    def __init__(self, written: Mapping[str, str]):
        super().__init__()
        self.written = written


def decode(cls: type[T], data: Any, written: Mapping[str, str] = types.MappingProxyType({})) -> T:
    """Plain JSON data as `cls`; strict, no coercion but int to float and list to tuple.

    `written` is, by path, the text that numbers and words such as `true` have in the file that they were read from.
    Raises SpecError with every problem found, each with its path.
    """
    problems = _Problems(written)
    value = _decode(cls, data, "", problems)
    if problems:
        raise SpecError(problems)
    return typing.cast(T, value)


def _decode(hint: Any, data: Any, path: str, problems: _Problems) -> Any:
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
        return float(data) if ok else _expect(False, data, _A_NUMBER, path, problems)
    ok = isinstance(data, hint) and not (hint is int and isinstance(data, bool))
    return _expect(ok, data, _TYPE_NAMES.get(hint, str(hint)), path, problems)


_A_NUMBER = "a number"
_TYPE_NAMES = {int: "a whole number", str: "a string", bool: "true or false", type(None): "null"}


def _expect(ok: bool, data: Any, wanted: str, path: str, problems: _Problems) -> Any:
    if not ok:
        problems.append((path, expected(wanted, data, problems.written.get(path))))
    return data


_NUMBER = re.compile(r"[-+]?(0|[1-9]\d*)(\.\d*)?([eE][-+]?\d+)?")


def expected(wanted: str, data: Any, written: str | None = None) -> str:
    """That a value is not what is wanted, shown as it is written, and what to write where that is plain."""
    text = _shortened(written or json.dumps(data, default=str))
    if wanted == _TYPE_NAMES[str] and not isinstance(data, (list, Mapping)):
        mend = f"; put it in quotes: {json.dumps(written or ('' if data is None else text), ensure_ascii=False)}"
    elif wanted == _TYPE_NAMES[int] and isinstance(data, float) and data.is_integer():
        mend = f"; write {int(data)}"
    elif wanted in (_TYPE_NAMES[int], _A_NUMBER) and isinstance(data, str) and _NUMBER.fullmatch(data):
        mend = "; leave the quotes out"
    else:
        mend = ""
    return f"expected {wanted}, got {text}{mend}"


def _shortened(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _decode_union(args: tuple[Any, ...], data: Any, path: str, problems: _Problems) -> Any:
    alternatives = [arg for arg in args if dataclasses.is_dataclass(arg)]
    if len(alternatives) > 1 and isinstance(data, Mapping):
        return _decode_alternative(alternatives, data, path, problems)
    tries: list[_Problems] = []
    for arg in args:
        found = _Problems(problems.written)
        value = _decode(arg, data, path, found)
        if not found:
            return value
        tries.append(found)
    # The alternative that got furthest is the one the author meant: deeper paths come from inside it.
    problems.extend(max(tries, key=lambda found: max(len(p) for p, _ in found)))
    return data


def _decode_alternative(classes: list[Any], data: Mapping[str, Any], path: str, problems: _Problems) -> Any:
    """One of several dataclasses: that of the tag; without a tag, the one that wants nothing more and knows most."""
    tag = tag_of(classes)
    if tag is None:
        chosen = min(classes, key=lambda cls: (len(required(cls) - set(data)) > 0, -len(set(data) & set(_hints(cls)))))
        return _decode_dataclass(chosen, data, path, problems, classes)
    by_value = {value: cls for cls in classes for value in typing.get_args(_hints(cls)[tag])}
    if tag not in data:
        problems.append((_join(path, tag), f"is required: one of {', '.join(by_value)}"))
    elif not isinstance(data[tag], str) or data[tag] not in by_value:
        hint = did_you_mean(str(data[tag]), by_value)
        _expect(False, data[tag], f"one of {', '.join(map(repr, by_value))}", _join(path, tag), problems)
        problems[-1] = (problems[-1][0], problems[-1][1] + hint)
    else:
        return _decode_dataclass(by_value[data[tag]], data, path, problems, classes)
    return None


def tag_of(classes: typing.Sequence[Any]) -> str | None:
    """The key that tells alternatives apart, whose type is another Literal in each; None where there is none."""
    shared = (f.name for f in dataclasses.fields(classes[0]) if all(f.name in _hints(cls) for cls in classes))
    for name in shared:
        values = [typing.get_args(_hints(c)[name]) for c in classes if typing.get_origin(_hints(c)[name]) is Literal]
        if len(values) == len(classes) and len({v for of in values for v in of}) == sum(map(len, values)):
            return name
    return None


def required(cls: Any) -> set[str]:
    """The keys of a dataclass that have no default."""
    missing = dataclasses.MISSING
    return {f.name for f in dataclasses.fields(cls) if f.default is missing and f.default_factory is missing}


def _decode_tuple(args: tuple[Any, ...], data: Any, path: str, problems: _Problems) -> Any:
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


def _decode_dataclass(
    cls: Any, data: Any, path: str, problems: _Problems, alternatives: typing.Sequence[Any] = ()
) -> Any:
    if not isinstance(data, Mapping):
        return _expect(False, data, "a mapping", path, problems)
    hints = _hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    before = len(problems)
    idle = _idle_keys(alternatives, data)
    unknown = [str(key) for key in data if key not in fields and str(key) not in idle]
    hints_given = {key: did_you_mean(key, fields) if i < _HINTS else "" for i, key in enumerate(unknown)}
    not_there: Mapping[str, str] = getattr(cls, "NOT_THERE", {})  # known elsewhere, and why not here
    for key in unknown:
        message = not_there.get(key) or _known_by(key, cls, alternatives) or f"unknown key{hints_given[key]}"
        problems.append((_join(path, key), message))
    for name in (n for n in fields if n in required(cls)):
        # A misspelt key is one problem and not two.
        if name not in data and f", did you mean {name}?" not in hints_given.values():
            problems.append((_join(path, name), "is required"))
    values = {k: _decode(hints[k], v, _join(path, k), problems) for k, v in data.items() if k in fields}
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except SpecError as error:
        problems.extend((_join(path, p), m) for p, m in error.problems)
    return None


def _idle_keys(alternatives: typing.Sequence[Any], data: Mapping[str, Any]) -> set[str]:
    """Keys of other alternatives at their defaults, which say nothing: so written, one text fits all of them."""
    return {
        f.name
        for other in alternatives
        for f in dataclasses.fields(other)
        if f.name in data and f.name not in required(other) and _is_default(f, data[f.name])
    }


def _is_default(f: Any, value: Any) -> bool:
    default = f.default_factory() if f.default is dataclasses.MISSING else f.default
    return bool(encode(default) == encode(value))


def _known_by(key: str, cls: Any, alternatives: typing.Sequence[Any]) -> str | None:
    """Which alternatives have a key that the chosen one has not."""
    able = [other for other in alternatives if key in _hints(other)]
    if not able:
        return None
    tag = tag_of(alternatives)
    if tag is None:
        return f"is no key of a {_summary(cls)}; it is one of a {' or a '.join(map(_summary, able))}"
    names = [" or ".join(typing.get_args(_hints(other)[tag])) for other in able]
    return f"{tag} {' or '.join(typing.get_args(_hints(cls)[tag]))} does not know it; {tag} {', '.join(names)} does"


def _summary(cls: Any) -> str:
    """What an alternative without a tag is called: its docstring up to the first colon or full stop, in lower case."""
    words: str = (cls.__doc__ or cls.__name__).strip()
    return words[: min((words + ".").index("."), (words + ":").index(":"))].lower()


def did_you_mean(word: str, known: typing.Iterable[str]) -> str:
    """`, did you mean X?` or, where nothing is close, nothing."""
    import difflib

    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]}?" if close else ""


def read_stage(path: str | os.PathLike[str]) -> StageSpec:
    """Read `stage.json`. Raises OSError, or SpecError where the file is not one."""
    try:
        data = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise SpecError([("", f"{path}: not JSON: {error}; `prism-launch run` writes it anew")]) from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise SpecError([("schema", f"{path}: expected {SCHEMA}; written by another version of prism-launch")])
    try:
        return decode(StageSpec, data)
    except SpecError as error:
        raise SpecError([(key, f"{path}: {message}") for key, message in error.problems]) from None


def stage_text(spec: StageSpec) -> str:
    """The text of `stage.json`."""
    return json.dumps(encode(spec), indent=2, sort_keys=True) + "\n"
