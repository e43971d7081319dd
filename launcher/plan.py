"""The plan: stages in order, their inputs found, conversions inserted and shared, fingerprints computed. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from launcher import configs
from launcher.configs import ConvertConfig, ModelConfig, PrepareConfig, Resources
from launcher.errors import UserError
from launcher.inputs import External, Inputs
from launcher.models.families import FAMILIES
from launcher.recipe import Recipe, Stage
from launcher.references import is_external, split_ref
from launcher.run_record import PlannedStage
from launcher.spec import Format, Input, Limits, Output, Runtime, StageSpec, did_you_mean, encode
from launcher.stages import kinds
from launcher.stages.convert import CONVERSIONS
from launcher.stages.kind import Need


@dataclass
class _Builder:
    """What has been planned so far; lives for one call of `build_plan`."""

    recipe: Recipe
    inputs: Inputs
    limits: Limits
    runtime: Runtime
    planned: dict[str, PlannedStage] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def problem(self, stage: str, where: str, message: str) -> None:
        path = f"stages.{stage.partition('.')[0]}.{where}"  # a part's problem is that of the stage in the recipe
        self.problems.append(f"{self.recipe.where(path)}: {path}: {message}")


def build_plan(
    recipe: Recipe, inputs: Inputs, limits: Limits | None = None, runtime: Runtime | None = None
) -> tuple[PlannedStage, ...]:
    """Every stage of the recipe, in an order in which each follows what it reads.

    Raises UserError with all problems: unknown references, cycles, formats that nothing converts.
    """
    builder = _Builder(recipe, inputs, limits or Limits(), runtime or Runtime())
    needs = {name: _needs(builder, stage) for name, stage in recipe.stages.items()}
    for name in recipe.stages:
        for need in needs[name]:
            _check_ref(builder, name, need)
    if builder.problems:
        raise UserError(builder.problems)
    for name in _order(builder, needs):
        _plan_parts(builder, recipe.stages[name], needs[name])
    if builder.problems:
        raise UserError(list(dict.fromkeys(builder.problems)))
    return tuple(builder.planned.values())


def _needs(builder: _Builder, stage: Stage) -> tuple[Need, ...]:
    try:
        return tuple(kinds()[stage.kind].needs(stage.config))
    except UserError as error:
        builder.problem(stage.name, "backend", str(error))
        return ()


# ------------------------------------------------------------------------------------------------------- references


def _check_ref(builder: _Builder, name: str, need: Need) -> None:
    stages = builder.recipe.stages
    if need.what == "checkpoint" and is_external(need.ref):
        return
    maker, item = split_ref(need.ref)
    if maker not in stages:
        known = ", ".join(stages)
        builder.problem(name, need.where, f"no stage {maker}{did_you_mean(maker, stages)}; there is {known}")
        return
    if maker == name:
        builder.problem(name, need.where, "a stage cannot read what it makes itself")
        return
    outputs = _outputs(stages[maker])
    if need.what not in outputs:
        builder.problem(name, need.where, f"stage {maker} makes {', '.join(outputs)}, not {need.what}")
    elif need.what in ("tokens", "prompts"):
        _check_item(builder, name, need, maker, item)


def _check_item(builder: _Builder, name: str, need: Need, maker: str, item: str | None) -> None:
    config: PrepareConfig = builder.recipe.stages[maker].config
    known = config.sources if need.what == "tokens" else config.problems
    noun = "source" if need.what == "tokens" else "problem set"
    if item is None:
        builder.problem(name, need.where, f"name a {noun} of {maker}: {_names(f'{maker}/{k}' for k in known)}")
    elif item not in known:
        hint = did_you_mean(item, known)
        builder.problem(name, need.where, f"no {noun} {item} in {maker}{hint}; there is {_names(known)}")


def _names(words: Iterable[str]) -> str:
    return ", ".join(words) or "none"


def _outputs(stage: Stage) -> Mapping[str, Format]:
    return kinds()[stage.kind].outputs(stage.config)


# ------------------------------------------------------------------------------------------------------------ order


def _order(builder: _Builder, needs: Mapping[str, tuple[Need, ...]]) -> list[str]:
    """Stage names, each after those it reads and otherwise as written. Raises UserError for a cycle, with its path."""
    reads = {n: [split_ref(x.ref)[0] for x in ns if split_ref(x.ref)[0] in needs] for n, ns in needs.items()}
    order: list[str] = []
    on_path: list[str] = []

    def visit(name: str) -> None:
        if name in order:
            return
        if name in on_path:
            cycle = " -> ".join([*on_path[on_path.index(name) :], name])
            where = builder.recipe.where(f"stages.{name}")
            raise UserError(f"{where}: stages.{name}: stages read one another in a circle: {cycle}")
        on_path.append(name)
        for other in reads[name]:
            visit(other)
        on_path.pop()
        order.append(name)

    for name in needs:
        visit(name)
    return order


# ------------------------------------------------------------------------------------------------------------ stages


def _plan_parts(builder: _Builder, stage: Stage, needs: tuple[Need, ...]) -> None:
    """The stage, or each of those that it fans out into: STAGE.PART, a name that no stage of a recipe can have."""
    module = kinds()[stage.kind]
    parts = module.parts(stage.config, stage.seed)
    if not parts:
        _plan_stage(builder, stage, needs)
    for name, (config, seed) in parts.items():
        part = replace(stage, name=f"{stage.name}.{name}", config=config, seed=seed)
        _plan_stage(builder, part, _needs(builder, part), part_of=stage.name)


def _plan_stage(builder: _Builder, stage: Stage, needs: tuple[Need, ...], part_of: str | None = None) -> None:
    inputs: dict[str, Input] = {}
    depends: dict[str, None] = {}
    for need in needs:
        found = _find(builder, stage, need)
        if found is not None:
            maker, inputs[need.port] = found
            depends.update({maker: None} if maker else {})
    facts = builder.inputs.facts.get(part_of or stage.name, {})
    _add(builder, stage, inputs, tuple(depends), facts, inserted=False, part_of=part_of)


def _find(builder: _Builder, stage: Stage, need: Need) -> tuple[str | None, Input] | None:
    """The input that fills a need and the stage that makes it, a conversion added where one is wanted."""
    if need.what == "checkpoint" and is_external(need.ref):
        external = builder.inputs.checkpoints[need.ref]
        _check_family(builder, stage, need, external)
        maker, found = None, Input(external.path, external.format, external.fingerprint)
    else:
        maker = split_ref(need.ref)[0]
        spec = builder.planned[maker].spec
        output = spec.outputs[need.what]
        found = Input(output.path, output.format, spec.fingerprint)
        _check_model(builder, stage, need)
    if found.format in need.accepts:
        return maker, found
    target = next((t for t in need.accepts if (found.format, t) in CONVERSIONS), None)
    if target is None:
        wanted = " or ".join(need.accepts)
        builder.problem(stage.name, need.where, f"{need.ref} is {found.format}; nothing converts that to {wanted}")
        return None
    return _converted(builder, need.ref, maker, found, target)


def _converted(builder: _Builder, ref: str, maker: str | None, found: Input, target: Format) -> tuple[str, Input]:
    """The stage that converts `found` to `target`: the one that is planned already, or a new one."""
    name = f"{maker or _slug(ref)}-to-{target}"
    if name not in builder.planned:
        config = ConvertConfig(checkpoint=ref, source=found.format, target=target)
        stage = Stage(name, "convert", config, Resources(), seed=0)
        depends = (maker,) if maker else ()
        _add(builder, stage, {"checkpoint": found}, depends, {}, inserted=True)
    spec = builder.planned[name].spec
    return name, Input(spec.outputs["checkpoint"].path, target, spec.fingerprint)


def _slug(ref: str) -> str:
    words = "".join(c if c.isalnum() else "-" for c in ref.rstrip("/").rpartition("/")[2].lower()).strip("-")
    return f"{words or 'checkpoint'}-{hashlib.sha256(ref.encode()).hexdigest()[:6]}"


def _add(
    builder: _Builder,
    stage: Stage,
    inputs: Mapping[str, Input],
    depends: tuple[str, ...],
    facts: Mapping[str, str],
    inserted: bool,
    part_of: str | None = None,
) -> None:
    spec = plan_stage(builder.recipe.name, stage, inputs, facts, builder.limits, builder.runtime)
    spec = replace(spec, secrets=builder.recipe.secrets)
    absent = {a.path for a in builder.inputs.absent if a.stage in (part_of or stage.name, None)}
    read = {i.path for i in inputs.values()}
    read |= {a.path for a in builder.inputs.absent if a.stage == (part_of or stage.name)}
    builder.planned[stage.name] = PlannedStage(
        spec,
        depends,
        stage.resources,
        inserted,
        part_of=part_of,
        not_built=kinds()[stage.kind].not_built(stage.config),
        absent=tuple(sorted(absent & read)),
    )


def plan_stage(
    run: str, stage: Stage, inputs: Mapping[str, Input], facts: Mapping[str, str], limits: Limits, runtime: Runtime
) -> StageSpec:
    """One stage whose inputs are found."""
    kind = kinds()[stage.kind]
    key = fingerprint(stage.kind, kind.VERSION, kind.what_counts(stage.config), stage.seed, inputs, facts)
    return StageSpec(
        run=run,
        stage=stage.name,
        kind=stage.kind,
        kind_version=kind.VERSION,
        fingerprint=key,
        config=encode(stage.config),
        seed=stage.seed,
        inputs=inputs,
        outputs={port: Output(f"artifacts/{stage.kind}/{key}/{port}", form) for port, form in _outputs(stage).items()},
        steps=kind.steps(stage.config, stage.resources),
        limits=limits,
        runtime=runtime,
    )


def fingerprint(
    kind: str, version: int, config: Any, seed: int, inputs: Mapping[str, Input], facts: Mapping[str, str]
) -> str:
    """20 hex digits over all that decides an artifact; not the layout, the partition, the nodes or the time."""
    content = {
        "kind": kind,
        "version": version,
        "config": configs.identity(config),
        "seed": seed,
        "inputs": {port: [i.format, i.fingerprint] for port, i in inputs.items()},
        "facts": dict(facts),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]


# ------------------------------------------------------------------------------------------------------------ models


def _check_family(builder: _Builder, stage: Stage, need: Need, external: External) -> None:
    maker, model = _model_wanted(builder, stage)
    if model is None or external.model_type not in FAMILIES or external.model_type == model.family:
        return  # of a model type that is not covered `check` says more
    mend = "a merge is of one model" if maker else "name the model that fits it"
    message = (
        f"{external.path} is a checkpoint of model type {external.model_type}, "
        f"but model {model.name} is {model.family}; {mend}"
    )
    builder.problem(stage.name, need.where, message)


def _check_model(builder: _Builder, stage: Stage, need: Need) -> None:
    maker, model = _model_wanted(builder, stage)
    if model is None or need.what != "checkpoint":
        return
    theirs, mend = (f"{maker} model", "a merge is of one model") if maker else ("this stage", "give both one model")
    for name, other in builder.recipe.models_of(need.ref):
        if other.config != model.config:
            message = f"{name} trains model {other.name}, {theirs} {model.name}; {mend}"
            builder.problem(stage.name, need.where, message)


def _model_wanted(builder: _Builder, stage: Stage) -> tuple[str | None, ModelConfig | None]:
    """The model that a stage's checkpoints must be of, where the recipe says; first whose, if not the stage's own."""
    if (own := kinds()[stage.kind].model(stage.config)) is not None:
        return None, own
    parts = kinds()[stage.kind].lineage(stage.config)
    return next((found for ref in parts for found in builder.recipe.models_of(ref)), (None, None))
