"""What a plan needs to know of the world: checkpoints and text outside the store. The plan's only reader."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from launcher import store
from launcher.configs import AnalyzeConfig, EvaluateConfig, FilesSource, PrepareConfig, RLConfig, StdlibSource
from launcher.corpus import look, told
from launcher.errors import UserError
from launcher.files import read_bytes
from launcher.models.checkpoints import carried_config, look_at
from launcher.models.tokenizer_files import end_of, read_tokenizer_files
from launcher.recipe import Recipe, Stage
from launcher.references import checkpoint_path, is_external, is_on_hub
from launcher.spec import Format
from launcher.stages import kinds
from launcher.stages.kind import Need, Outside


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
            if is_on_hub(ref) or path.exists():
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
    facts = {}
    if isinstance(stage.config, PrepareConfig):
        library = [n for n, source in stage.config.sources.items() if isinstance(source, StdlibSource)]
        facts = {f"sources.{name}": f"python {sys.version}" for name in library}
    for outside in kinds()[stage.kind].outside(stage.config):
        if is_on_hub(outside.path):  # which the worker refuses
            continue
        where = f"stages.{stage.name}.{outside.where}"
        try:
            facts[outside.where.removesuffix(".path")] = _fact(outside)
        except UserError as error:
            raise UserError(f"{recipe.where(where)}: {where}: {error}") from None
        except OSError as error:
            message = f"{recipe.where(where)}: {where}: {outside.path}: {error.strerror}"
            absent.append(Absent(outside.path, stage.name, message))
            facts[outside.where.removesuffix(".path")] = "absent"
    return facts


def _fact(outside: Outside) -> str:
    if outside.counts == "content":
        return hashlib.sha256(read_bytes(Path(outside.path))).hexdigest()
    return store.tree_fingerprint(Path(outside.path))


def read_checkpoint(ref: str, relative_to: Path) -> External:
    """Look at a checkpoint outside the store: its format and model type. Raises UserError where it is none."""
    if is_on_hub(ref):
        raise UserError(f"{ref}: fetching from a hub is not built yet; download it and name its folder")
    path = checkpoint_path(ref, relative_to)
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint")
    form, _ = look_at(path)
    if form == "hf" and not any(path.glob("*.safetensors")):
        raise UserError(f"{path}: has config.json but no .safetensors file; save it with safe serialization")
    return External(str(path), form, store.tree_fingerprint(path), _model_type(path))


def _model_type(path: Path) -> str | None:
    """The model type of a checkpoint's config.json; None where there is none."""
    config = carried_config(path)
    if config is None:
        return None
    found = config.get("model_type")
    if not isinstance(found, str):
        raise UserError(f"{path}: its config.json is not a model's: it has no model_type")
    return found


# ------------------------------------------------------------------------------------------------ text and tokenizers


def text_problems(recipe: Recipe) -> list[str]:
    """What is wrong with the corpora and tokenizers that a recipe names, by names and headers; none that is absent."""
    found = []
    for stage, config in _prepare_stages(recipe):
        for name, path in _corpora(config):
            where = f"stages.{stage.name}.sources.{name}.path"
            found += [f"{recipe.where(where)}: {where}: {problem}" for problem in look(path).problems]
    for where, folder in _tokenizers(recipe):
        problems = _tokenizer_problems(folder, store.tree_fingerprint(folder))
        found += [f"{recipe.where(where)}: {where}: {problem}" for problem in problems]
    return found


def _tokenizers(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    """The folders outside the store whose tokenizer a job of this package loads, with the places that name them."""
    for stage, config in _prepare_stages(recipe):
        name = config.tokenizer.path
        if name and not is_on_hub(name) and Path(name).exists():
            yield f"stages.{stage.name}.tokenizer.path", Path(name)
    for stage, need in external_checkpoints(recipe):
        config = stage.config
        folder = checkpoint_path(need.ref, Path(recipe.path).parent)
        loads = isinstance(config, (EvaluateConfig, AnalyzeConfig)) or (
            isinstance(config, RLConfig) and config.backend == "trl"
        )
        # One without a tokenizer.json is left to transformers.
        if loads and (folder / "config.json").exists() and (folder / "tokenizer.json").exists():
            yield f"stages.{stage.name}.{need.where}", folder


def text_notes(recipe: Recipe) -> tuple[str, ...]:
    """What lies beside the text of a recipe's corpora and is not read, a line each."""
    notes = [
        f"stages.{stage.name}.sources.{name}: {told(passed, path)}"
        for stage, config in _prepare_stages(recipe)
        for name, path in _corpora(config)
        if (passed := look(path).passed)
    ]
    return tuple(notes)


def _prepare_stages(recipe: Recipe) -> Iterator[tuple[Stage, PrepareConfig]]:
    for stage in recipe.stages.values():
        if isinstance(stage.config, PrepareConfig):
            yield stage, stage.config


def _corpora(config: PrepareConfig) -> Iterator[tuple[str, Path]]:
    """Sources of files that are there; those that are not are absent inputs."""
    for name, source in config.sources.items():
        if isinstance(source, FilesSource) and Path(source.path).exists():
            yield name, Path(source.path)


@lru_cache
def _tokenizer_problems(folder: Path, fingerprint: str) -> tuple[str, ...]:
    """As the job will find them; read once for all runs of a matrix."""
    try:
        end_of(read_tokenizer_files(folder))
    except UserError as error:
        return error.problems
    return ()
