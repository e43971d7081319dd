"""Recipes from files: `base:`, `matrix:`, `--set` and models resolved, every stage checked, all problems at once."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.configs import CONFIGS, ModelConfig, Resources, with_value
from launcher.data import data_dir
from launcher.errors import UserError
from launcher.recipe import Recipe, Stage
from launcher.recipe.document import Document, join, merge_documents, parse_value, read_document
from launcher.references import is_on_hub
from launcher.secret_files import holds_token
from launcher.spec import SpecError, decode, did_you_mean, expected
from launcher.stages import kinds
from launcher.units import parse_duration

TOP_KEYS = ("name", "description", "base", "model", "seed", "secrets", "matrix", "resources", "stages")
STAGE_KINDS = tuple(kind for kind in CONFIGS if kind != "convert")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
#: numpy takes no negative seed and none beyond 32 bits, and ranks add to it; the stages before would have run by then.
_MAX_SEED = 2**31 - 1
#: Runs of one matrix, files that `base:` leads to, and levels of a key of --set.
_MAX_RUNS = 1000
_MAX_FILES = 100
_MAX_LEVELS = 64
_STAGE_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
_RESERVED = ("-to-hf", "-to-megatron", "-to-nemo")


def load_recipes(path: str | Path, overrides: Sequence[str] = (), name: str | None = None) -> tuple[Recipe, ...]:
    """Every run that a recipe file describes: one, or one a point of its `matrix:`.

    Raises UserError with all problems, each as `file:line: dotted.path: what is wrong`.
    """
    file = find_recipe(str(path))
    document = _with_bases(file, str(path) if Path(path).exists() else str(file), ())
    return tuple(
        _load_point(document, file, str(path), point, overrides, name) for point in _matrix_points(document, str(path))
    )


def find_recipe(name: str) -> Path:
    """A recipe file by path, or a shipped recipe by name. Raises UserError, naming those there are."""
    path = Path(name)
    if path.exists():
        return path
    shipped = data_dir("recipes")
    inner = Path(*path.parts[1:]) if path.parts[:1] == ("recipes",) else path
    for candidate in (shipped / inner, shipped / f"{inner}.yaml"):
        if not path.is_absolute() and ".." not in path.parts and candidate.is_file():
            return candidate
    known = [str(p.relative_to(shipped).with_suffix("")) for p in recipe_files()]
    raise UserError(f"{name}: no such file or shipped recipe{did_you_mean(name, known)}; shipped: {', '.join(known)}")


def recipe_files() -> list[Path]:
    """The shipped recipes; models, mixtures and suites are parts of recipes and not among them."""
    shipped = data_dir("recipes")
    return sorted([*shipped.glob("*.yaml"), *shipped.glob("prism/*.yaml")])


def list_recipes() -> list[dict[str, Any]]:
    """Name, file, description and stages of every shipped recipe."""
    found = []
    for path in recipe_files():
        data = _with_bases(path, str(path), ()).data
        name = str(path.relative_to(data_dir("recipes")).with_suffix(""))
        stages = list(data.get("stages") or {})
        found.append({"name": name, "path": str(path), "description": data.get("description", ""), "stages": stages})
    return found


# ------------------------------------------------------------------------------------------------------------- files


def _with_bases(path: Path, shown: str, chain: tuple[Path, ...], read: list[Path] | None = None) -> Document:
    """The document with everything that its `base:` names laid below it; `read` are the files read so far."""
    real, read = path.resolve(), [] if read is None else read
    read.append(real)
    if len(read) > _MAX_FILES:
        raise UserError(f"{shown}: base: more than {_MAX_FILES} files are read, one again for each that names it")
    if real in chain:
        circle = " -> ".join(str(p.name) for p in (*chain[chain.index(real) :], real))
        raise UserError(f"{shown}: base: files name one another in a circle: {circle}")
    document = read_document(path, shown, piped=not chain)
    bases = document.data.get("base")
    names = [bases] if isinstance(bases, str) else bases or []
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise UserError(f"{document.positions['base']}: base: expected the name of a file, or a list of them")
    below = Document({}, {})
    for name in names:
        beside = path.parent / name
        try:
            file = beside if beside.exists() else find_recipe(name)
        except UserError as error:
            raise UserError(f"{document.positions['base']}: base: {error}") from None
        below = merge_documents(below, _with_bases(file, os.path.relpath(file), (*chain, real), read))
    return merge_documents(below, document) if names else document


def _matrix_points(document: Document, shown: str) -> list[list[str]]:
    """The overrides of every point of the matrix; one empty point where there is none."""
    matrix = document.data.get("matrix")
    if matrix is None:
        return [[]]
    place = document.positions.get("matrix", shown)
    if not isinstance(matrix, Mapping) or not all(isinstance(v, list) and v for v in matrix.values()):
        raise UserError(f"{place}: matrix: expected keys with lists of values, such as `seed: [0, 1, 2]`")
    runs = math.prod(len(values) for values in matrix.values())
    if runs > _MAX_RUNS:
        raise UserError(
            f"{place}: matrix: {_exactly(runs)} runs; at most {_MAX_RUNS:,}, so leave out values, or split it"
        )
    import json

    axes = [[f"{key}={v if _is_plain(v) else json.dumps(v)}" for v in values] for key, values in matrix.items()]
    return [list(point) for point in itertools.product(*axes)]


def _exactly(count: int) -> str:
    return f"{count:,}" if count < 1e15 else "more than 10^15"


def _is_plain(value: Any) -> bool:
    """Whether a value is a string that reads back as itself without quotes."""
    try:
        return isinstance(value, str) and parse_value(value, "") == value
    except UserError:
        return False


# --------------------------------------------------------------------------------------------------------- one recipe


@dataclass
class _Reader:
    """One recipe being read: its merged data, where everything stands, and the problems found so far."""

    data: dict[str, Any]
    positions: dict[str, str]
    shown: str
    folder: Path
    problems: list[str]
    written: dict[str, str]

    def where(self, path: str) -> str:
        while path and path not in self.positions:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return self.positions.get(path, self.shown)

    def problem(self, path: str, message: str) -> None:
        self.problems.append(f"{self.where(path)}: {path}: {message}")

    def decode(self, cls: type, data: Any, path: str) -> Any:
        try:
            return decode(cls, data, {key.removeprefix(f"{path}."): text for key, text in self.written.items()})
        except SpecError as error:
            for inner, message in error.problems:
                self.problem(join(path, inner) if inner else path, message)
            return None


def _load_point(
    document: Document, file: Path, shown: str, point: list[str], own: Sequence[str], name: str | None
) -> Recipe:
    sets = [*point, *own]
    place = document.positions.get("matrix", shown)
    labels = [*(f"{place}: matrix: {text}" for text in point), *(f"--set {text}" for text in own)]
    document, applied = _apply_overrides(document, list(zip(sets, map(_shortened, labels), strict=True)))
    reader = _Reader(dict(document.data), dict(document.positions), shown, file.parent, [], dict(document.written))
    _check_top(reader)
    _check_secrets(reader)
    stages = _read_stages(reader)
    if reader.problems:
        raise UserError(list(dict.fromkeys(reader.problems)))
    title = reader.data.get("name") or file.stem
    run = _run_name(name, point) if name else _run_name(title, sets)
    return Recipe(
        name=run,
        path=shown if Path(shown).exists() else str(file),
        seed=reader.data.get("seed", 0),
        stages=stages,
        overrides=tuple(applied),
        resolved=reader.data,
        positions=reader.positions,
        secrets=tuple(reader.data.get("secrets") or ()),
    )


def _run_name(title: str, sets: Sequence[str]) -> str:
    """The recipe's name and what was changed; safe as a folder's name and never the same for two lists of changes."""
    # Where the locale is not UTF-8, a file's name holds its bytes as surrogates.
    raw = "-".join([title, *sets]).encode(errors="surrogateescape").decode(errors="surrogateescape")
    safe = re.sub(r"[^A-Za-z0-9._=,+-]", "_", raw).lstrip(".-")
    if safe == raw and len(safe) <= 80:
        return safe
    return f"{safe[:70] or 'run'}-{hashlib.sha256(raw.encode(errors='surrogateescape')).hexdigest()[:8]}"


def _shortened(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def _apply_overrides(document: Document, sets: Sequence[tuple[str, str]]) -> tuple[Document, list[str]]:
    """The document with changes `KEY=VALUE`, each with the place where it stands."""
    problems: list[str] = []
    applied = []
    for text, place in sets:
        key, equals, value = text.partition("=")
        if not equals or not key:
            problems.append(f"{place}: expected KEY=VALUE")
            continue
        if key.count(".") >= _MAX_LEVELS:
            problems.append(f"{place}: a key of more than {_MAX_LEVELS} levels; no recipe has one")
            continue
        try:
            path = _override_path(key, document)
            document = _with_value(document, path.split("."), parse_value(value, place), place)
            applied.append(text)
        except UserError as error:
            problems += [
                f"{place}: {p.removeprefix(f'{place}:1: ').removeprefix(f'{place}: ')}" for p in error.problems
            ]
    if problems:
        raise UserError(problems)
    return document, applied


def _override_path(key: str, document: Document) -> str:
    """The dotted path from the file's top that an abbreviated one means."""
    first, dot, _ = key.partition(".")
    stages = document.data.get("stages")
    names = list(stages) if isinstance(stages, Mapping) else []
    if dot and first in names:
        return f"stages.{key}"
    if first in ("base", "matrix"):
        raise UserError(f"{first}: is read before --set and matrix; write it in the recipe")
    if first in TOP_KEYS:
        return key
    hint = did_you_mean(first, [*TOP_KEYS, *names])
    raise UserError(f"{first}: neither a top-level key nor a stage{hint}; stages: {', '.join(names)}")


def _with_value(document: Document, path: list[str], value: Any, place: str) -> Document:
    above: Any = value
    key = ".".join(path)
    positions = {key: place}
    for name in reversed(path):
        above = {name: above}
    merged = merge_documents(document, Document(above, positions))
    if value is None:
        return merged
    # A value that is a mapping replaces the old one whole: `--set x={}` means empty, not unchanged.
    data = _replaced(merged.data, path, value)
    inside = (f"{key}.", f"{key}[")
    written = {p: text for p, text in merged.written.items() if p != key and not p.startswith(inside)}
    return Document(data, merged.positions, written)


def _replaced(data: Mapping[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    head, *rest = path
    inner = data.get(head)
    return {**data, head: _replaced(inner if isinstance(inner, Mapping) else {}, rest, value) if rest else value}


def _check_top(reader: _Reader) -> None:
    for key in reader.data:
        if key not in TOP_KEYS:
            reader.problem(key, "unknown key" + did_you_mean(key, TOP_KEYS))
    for key, kind, noun in (
        ("name", str, "a string"),
        ("description", str, "a string"),
        ("seed", int, "a whole number"),
    ):
        value = reader.data.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            reader.problem(key, expected(noun, value, reader.written.get(key)))
    secrets = reader.data.get("secrets") or []
    if not isinstance(secrets, list) or not all(isinstance(s, str) and _VARIABLE.fullmatch(s) for s in secrets):
        reader.problem("secrets", "expected a list of names of variables, such as [HF_TOKEN]; never their values")
    if not isinstance(reader.data.get("stages"), Mapping) or not reader.data["stages"]:
        reader.problem("stages", "is required: a mapping of stage names to stages")


def _check_secrets(reader: _Reader) -> None:
    """Refuse tokens and keys: run.json, stage.json, scripts and the snapshot show every value of a recipe."""
    for path, text in _texts("", reader.data):
        if holds_token(text.encode(errors="surrogatepass")):
            mend = "export it, and name its variable in `secrets`"
            reader.problem(path, f"looks like a secret, which every record of the run would show; {mend}")


def _texts(path: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every text in a value, with its dotted path."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(join(path, str(key)), inner)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _texts(f"{path}[{i}]", inner)


def _read_stages(reader: _Reader) -> dict[str, Stage]:
    stages = reader.data.get("stages")
    if not isinstance(stages, Mapping):
        return {}
    found = {name: _read_stage(reader, name, stage) for name, stage in stages.items()}
    return {name: stage for name, stage in found.items() if stage is not None}


def _seed_problem(seed: int) -> str:
    return f"must not be negative, got {seed}" if seed < 0 else f"must be at most {_MAX_SEED}, got {seed}"


def _read_stage(reader: _Reader, name: str, data: Any) -> Stage | None:
    path = f"stages.{name}"
    if not _STAGE_NAME.fullmatch(name) or len(name) > 60:
        reader.problem(path, "a stage's name is lower-case letters, digits and dashes, at most 60")
    if name in ("stages", "matrix", "resources") or name.endswith(_RESERVED):
        reader.problem(path, "this name is reserved; choose another")
    if not isinstance(data, Mapping):
        reader.problem(path, "expected a mapping with `kind:`")
        return None
    kind = data.get("kind")
    if kind not in STAGE_KINDS:
        reader.problem(join(path, "kind"), _kind_problem(kind))
        return None
    seed = data.get("seed", reader.data.get("seed", 0))
    if "seed" in data and (not isinstance(seed, int) or isinstance(seed, bool)):
        reader.problem(join(path, "seed"), expected("a whole number", seed, reader.written.get(join(path, "seed"))))
    elif isinstance(seed, int) and not 0 <= seed <= _MAX_SEED:
        reader.problem(join(path, "seed") if "seed" in data else "seed", _seed_problem(seed))
    resources = _read_resources(reader, path, data.get("resources"))
    config = {k: v for k, v in data.items() if k not in ("kind", "seed", "resources")}
    if kind == "train":
        config["model"] = _read_model(reader, path, data.get("model", reader.data.get("model")))
        if config["model"] is None:
            return None
    value = reader.decode(CONFIGS[kind], config, path)
    if value is None or resources is None:
        return None
    return Stage(name, kind, _with_absolute_paths(kind, value, reader.folder), resources, seed)


def _kind_problem(kind: Any) -> str:
    if kind is None:
        return f"is required: one of {', '.join(STAGE_KINDS)}"
    if kind == "convert":
        return "conversions are not written in a recipe: the plan inserts them"
    return f"unknown kind {kind}{did_you_mean(str(kind), STAGE_KINDS)}; one of {', '.join(STAGE_KINDS)}"


def _read_resources(reader: _Reader, path: str, own: Any) -> Resources | None:
    common = reader.data.get("resources")
    for where, value in (("resources", common), (join(path, "resources"), own)):
        if value is not None and not isinstance(value, Mapping):
            reader.problem(where, "expected a mapping")
            return None
    merged = {**(common or {}), **(own or {})}
    where = join(path, "resources") if own else "resources"
    resources: Resources | None = reader.decode(Resources, merged, where)
    if resources is not None and resources.time is not None:
        try:
            parse_duration(resources.time)
        except ValueError as error:
            reader.problem(join(where, "time"), str(error))
    return resources


def _with_absolute_paths(kind: str, config: Any, folder: Path) -> Any:
    """What a config names by path is found from the recipe's folder, or from the one that the stage names, wherever
    the command is typed and the worker runs."""
    start = folder / os.path.expanduser(getattr(config, "folder", None) or ".")
    for outside in kinds()[kind].outside(config):
        if not is_on_hub(outside.path):
            config = with_value(config, outside.key, os.path.abspath(start / os.path.expanduser(outside.path)))
    return config


# ------------------------------------------------------------------------------------------------------------ models


def _read_model(reader: _Reader, stage: str, model: Any) -> Any:
    """A model as plain data: written out in the recipe, or read from the file that its name stands for."""
    where = join(stage, "model") if join(stage, "model") in reader.positions else "model"
    if isinstance(model, Mapping):
        return model
    if not isinstance(model, str):
        reader.problem(where, f"is required: the name of a model; there is {', '.join(model_names(reader.folder))}")
        return None
    file = _model_file(model, reader.folder)
    if file is None:
        known = model_names(reader.folder)
        reader.problem(where, f"no model {model}{did_you_mean(model, known)}; there is {', '.join(known)}")
        return None
    document = read_document(file, os.path.relpath(file))
    for path, place in document.positions.items():
        reader.positions.setdefault(f"{stage}.model.{path}", place)
    reader.written.update((f"{stage}.model.{path}", text) for path, text in document.written.items())
    before = len(reader.problems)
    reader.decode(ModelConfig, document.data, f"{stage}.model")
    return document.data if len(reader.problems) == before else None


def read_model(name: str) -> ModelConfig:
    """A model of ours by name, or a model's YAML file. Raises UserError with those there are, or with its problems."""
    file = _model_file(name, Path())
    if file is None:
        known = model_names()
        raise UserError(f"no model {name}{did_you_mean(name, known)}; there is {', '.join(known)}")
    document = read_document(file, os.path.relpath(file))
    reader = _Reader(dict(document.data), dict(document.positions), str(file), file.parent, [], dict(document.written))
    model: ModelConfig | None = reader.decode(ModelConfig, document.data, "")
    if model is None:
        raise UserError(reader.problems)
    return model


def _model_file(name: str, folder: Path) -> Path | None:
    if name.endswith((".yaml", ".yml")):
        path = folder / name
        return path if path.is_file() else None
    for models in (folder / "models", data_dir("recipes") / "models"):
        if (models / f"{name}.yaml").is_file():
            return models / f"{name}.yaml"
    return None


def model_names(folder: Path | None = None) -> list[str]:
    """Names of the models that a recipe in `folder` can use."""
    folders = [data_dir("recipes") / "models", *([folder / "models"] if folder else [])]
    return sorted({p.stem for f in folders for p in f.glob("*.yaml")})
