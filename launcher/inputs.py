"""What a plan needs to know of the world: checkpoints and text outside the store. The plan's only reader."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher import store
from launcher.configs import PrepareConfig, TrainConfig
from launcher.errors import UserError
from launcher.models.checkpoints import CARRIED
from launcher.models.headers import adapter_problem, read_config
from launcher.models.torch_dist import TRACKER
from launcher.recipe import Recipe, Stage
from launcher.spec import Format
from launcher.stages import Need, kinds


@dataclass(frozen=True)
class External:
    """A checkpoint outside the store. `model_type` is its config.json's."""

    path: str
    format: Format
    fingerprint: str
    model_type: str | None


@dataclass(frozen=True)
class Absent:
    """Something that a recipe reads and that is not on this machine.

    `stage` is the stage that reads it, None for a checkpoint, which a conversion may read in its stead; `message` says
    it with file and line.
    """

    path: str
    stage: str | None
    message: str


@dataclass(frozen=True)
class Inputs:
    """`checkpoints` by reference; `facts` by stage name: what beside its config decides a stage's artifact.

    What is `absent` stands in both with a fingerprint that nothing has: a plan for another machine can be looked at.
    """

    checkpoints: Mapping[str, External]
    facts: Mapping[str, Mapping[str, str]]
    absent: tuple[Absent, ...] = ()


def is_external(ref: str) -> bool:
    """Whether a checkpoint reference names a path or a hub model and not a stage."""
    return ref.startswith(("hf:", "/", "./", "../", "~"))


def resolve_inputs(recipe: Recipe) -> Inputs:
    """Look at everything outside the store that the recipe names.

    Raises UserError with all problems of what is there; what is not is returned as absent.
    """
    problems: list[str] = []
    absent: list[Absent] = []
    checkpoints: dict[str, External] = {}
    for stage, need in external_checkpoints(recipe):
        where, ref = f"stages.{stage.name}.{need.where}", need.ref
        place = f"{recipe.where(where)}: {where}"
        path = checkpoint_path(ref, Path(recipe.path).parent)
        try:
            if ref.startswith("hf:") or path.exists():
                checkpoints[ref] = read_checkpoint(ref, Path(recipe.path).parent)
                continue
            absent.append(Absent(str(path), None, f"{place}: {path}: no such checkpoint"))
            checkpoints[ref] = External(str(path), "hf", f"absent: {path}", None)
        except UserError as error:
            problems.append(f"{place}: {error}")
    facts = {name: _facts(recipe, stage, absent) for name, stage in recipe.stages.items()}
    if problems:
        raise UserError(problems)
    return Inputs(checkpoints, facts, tuple(absent))


def external_checkpoints(recipe: Recipe) -> Iterator[tuple[Stage, Need]]:
    """Every checkpoint outside the store that a stage of the recipe reads."""
    for stage in recipe.stages.values():
        try:
            needs = kinds()[stage.kind].needs(stage.config)
        except UserError:
            continue  # an unknown backend: reported by the plan, with its place
        yield from ((stage, need) for need in needs if need.what == "checkpoint" and is_external(need.ref))


def _facts(recipe: Recipe, stage: Stage, absent: list[Absent]) -> dict[str, str]:
    if isinstance(stage.config, TrainConfig) and stage.config.entrypoint:
        return _script_facts(recipe, stage, stage.config.entrypoint, absent)
    if not isinstance(stage.config, PrepareConfig):
        return {}
    facts = {
        f"sources.{name}": f"python {sys.version}"
        for name, source in stage.config.sources.items()
        if source.kind == "python-stdlib"
    }
    paths = {f"sources.{n}": s.path for n, s in stage.config.sources.items() if s.kind in ("files", "dataset")}
    paths |= {f"problems.{n}": p.path for n, p in stage.config.problems.items()}
    for key, path in {**paths, "tokenizer": stage.config.tokenizer.path}.items():
        if path and not path.startswith("hf:"):  # which the worker refuses
            where = f"stages.{stage.name}.{key}.path"
            try:
                facts[key] = store.tree_fingerprint(Path(path))
            except OSError as error:
                absent.append(Absent(path, stage.name, f"{recipe.where(where)}: {where}: {path}: {error.strerror}"))
                facts[key] = "absent"
    return facts


def _script_facts(recipe: Recipe, stage: Stage, script: str, absent: list[Absent]) -> dict[str, str]:
    """A script's content decides what it trains; what it imports in turn is the user's to keep still."""
    where = f"stages.{stage.name}.entrypoint"
    try:
        return {"entrypoint": hashlib.sha256(Path(script).read_bytes()).hexdigest()}
    except OSError as error:
        absent.append(Absent(script, stage.name, f"{recipe.where(where)}: {where}: {script}: {error.strerror}"))
        return {"entrypoint": "absent"}


def checkpoint_path(ref: str, relative_to: Path) -> Path:
    """The full path that a checkpoint reference names."""
    return Path(os.path.abspath(relative_to / Path(ref).expanduser()))


def read_checkpoint(ref: str, relative_to: Path) -> External:
    """Look at a checkpoint outside the store: its format and model type. Raises UserError where it is none."""
    if ref.startswith("hf:"):
        raise UserError(f"{ref}: fetching from a hub is not built yet; download it and name its folder")
    path = checkpoint_path(ref, relative_to)
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint")
    if (path / TRACKER).exists():
        return External(str(path), "megatron", store.tree_fingerprint(path), _model_type(path / CARRIED))
    if (path / "config.json").exists():
        if not list(path.glob("*.safetensors")):
            raise UserError(f"{path}: has config.json but no .safetensors file; save it with safe serialization")
        return External(str(path), "hf", store.tree_fingerprint(path), _model_type(path))
    raise UserError(
        adapter_problem(path) or f"{path}: neither a Hugging Face folder (config.json) nor a Megatron one ({TRACKER})"
    )


def _model_type(folder: Path) -> str | None:
    """The model type of a folder's config.json; None where there is none."""
    if not (folder / "config.json").exists():
        return None
    found = read_config(folder).get("model_type")
    if not isinstance(found, str):
        raise UserError(f"{folder / 'config.json'}: not a model's config.json: it has no model_type")
    return found
