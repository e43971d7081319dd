"""What a plan cannot see by itself: parallel layouts, backends and the cluster's limits. All problems at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from launcher.cluster import Profile, check_resources, image_of
from launcher.configs import (
    LEAST_TEXTS,
    AnalyzeConfig,
    Component,
    GeneratedSet,
    Parallelism,
    PrepareConfig,
    Resources,
    RLConfig,
    TrainConfig,
)
from launcher.containers import image_warning
from launcher.errors import UserError
from launcher.fit.gpus import GPUS
from launcher.fit.host import node_bytes
from launcher.fit.layers import architecture_of
from launcher.fit.search import GIB
from launcher.fit.speed import layout_of
from launcher.inputs import external_checkpoints, text_problems
from launcher.models.checkpoints import format_of, obstacles, unreadable
from launcher.models.families import shape_of
from launcher.models.layout import check_layout
from launcher.recipe import Recipe, Stage
from launcher.references import checkpoint_path, split_ref
from launcher.rl import backends, refusals
from launcher.run_record import PlannedStage
from launcher.stages import kinds
from launcher.stages.convert import CONVERSIONS
from launcher.stages.kind import Need
from launcher.units import memory_bytes


def check_recipe(recipe: Recipe, stages: tuple[PlannedStage, ...], profile: Profile) -> list[str]:
    """Problems of a recipe that plans, one line each with file and line."""
    found = []
    for stage in recipe.stages.values():
        for key, message in _stage_problems(recipe, stage, _without_gpu(stage.resources, profile), profile.gpu):
            path = f"stages.{stage.name}.{key}" if key else f"stages.{stage.name}"
            found.append(f"{recipe.where(path)}: {path}: {message}")
        for message in _host_problems(stage, profile):
            path = f"stages.{stage.name}.resources.mem"
            found.append(f"{recipe.where(path)}: {path}: {message}")
    for planned in stages:
        for part, resources in planned.job_parts.items():
            for key, message in check_resources(resources, planned.spec, profile):
                path = planned.path_of(part, key)
                found.append(f"{recipe.where(path)}: {path}: {message}")
    found += _checkpoint_problems(recipe)
    found += text_problems(recipe)
    return list(dict.fromkeys(found))


def _checkpoint_problems(recipe: Recipe) -> Iterator[str]:
    """What the headers of checkpoints outside the store rule out, which jobs would say after the queue."""
    for stage, need in external_checkpoints(recipe):
        folder = checkpoint_path(need.ref, Path(recipe.path).parent)
        if folder.exists():
            path = f"stages.{stage.name}.{need.where}"
            yield from (f"{recipe.where(path)}: {path}: {problem}" for problem in _obstacles(stage, need, folder))


def _obstacles(stage: Stage, need: Need, folder: Path) -> list[str]:
    form = format_of(folder)
    if form not in need.accepts:
        target = next((to for to in need.accepts if (form, to) in CONVERSIONS), None)
    elif folder.is_file():
        return [f"{folder}: an archive; unpack it (tar -xf) and name the folder, whose hf/ this stage reads"]
    elif form == "hf" and stage.kind != "merge":
        return unreadable(folder, to_train=stage.kind == "rl")
    else:
        target = None
    try:
        wanted = shape_of(stage.config.model.config) if isinstance(stage.config, TrainConfig) else None
    except UserError:  # told of the model itself
        wanted = None
    if form != "nemo":
        return obstacles(folder, target, wanted)
    from launcher.convert.nemo import nemo_config_problems  # seldom wanted, and loads what no other check does

    return obstacles(folder, target, wanted) or nemo_config_problems(folder)


def warnings_of(stages: tuple[PlannedStage, ...], profile: Profile) -> list[str]:
    """What is most likely not meant, and refused by nobody before a job has waited for its turn."""
    images: dict[str | None, list[str]] = {}
    for stage in stages:
        for image in (stage.resources.image or image_of(stage.spec, profile), *(s.image for s in stage.spec.steps)):
            images.setdefault(image, []).append(stage.spec.stage)
    found = ((names[0], image_warning(image, profile.runtime)) for image, names in images.items())
    return [f"stages.{name}: {warning}" for name, warning in found if warning]


def _without_gpu(resources: Resources, profile: Profile) -> bool:
    """Whether a stage will see no GPU: Slurm gives what is asked for, this machine what it has."""
    if profile.scheduler == "local":
        return not Path("/dev/nvidiactl").exists()
    return not resources.gpus_per_node


def _stage_problems(recipe: Recipe, stage: Stage, cpu: bool, gpu: str | None) -> Iterator[tuple[str, str]]:
    config = stage.config
    if isinstance(config, TrainConfig):
        yield from _train_problems(stage, config, cpu)
        yield from _fp8_problems(config, gpu)
    if isinstance(config, RLConfig) and config.backend in backends():
        module = backends()[config.backend]
        yield from refusals(config.backend, config.algorithm, _family(recipe, config.checkpoint))
        yield from module.problems(config, stage.resources)
        yield from _too_few(recipe, "prompts", config.prompts, config.prompts_per_step, "prompts_per_step")
    if isinstance(config, AnalyzeConfig):
        yield from _too_few(recipe, "problems", config.problems, LEAST_TEXTS, "CKA")
    if isinstance(config, PrepareConfig) and config.tokenizer.too_small:
        yield "tokenizer.vocab_size", config.tokenizer.too_small
    yield from _component_problems(stage.resources, kinds()[stage.kind].components(config))


def _too_few(recipe: Recipe, key: str, ref: str, least: int, what: str) -> Iterator[tuple[str, str]]:
    """A problem set of the recipe's own with fewer problems than what reads it takes at once."""
    maker, name = split_ref(ref)
    config = recipe.stages[maker].config if maker in recipe.stages else None
    problems = config.problems.get(name or "") if isinstance(config, PrepareConfig) else None
    if isinstance(problems, GeneratedSet) and problems.count < least:
        yield key, f"{ref} has {problems.count} problems, and {what} takes {least}; ask for more problems"


def _family(recipe: Recipe, ref: str) -> str | None:
    """The family of the model that a checkpoint reference leads to; None where the recipe does not say."""
    return next((model.family for _, model in recipe.models_of(ref)), None)


def _component_problems(resources: Resources, known: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for name, own in resources.components.items():
        key = f"resources.components.{name}"
        if name not in known:
            yield key, f"this stage has no component {name}; there is {', '.join(known) or 'none'}"
        if resources.placement == "shared":
            yield from ((f"{key}.{inner}", message) for inner, message in _shared_problems(own, resources))
    if resources.placement == "heterogeneous":
        for name in known:
            if name not in resources.components:
                yield "resources.components", f"say what {name} asks for: each component is a part of the job"
        if not known:
            yield "resources.placement", "this stage has one program: shared"


def _shared_problems(own: Component, resources: Resources) -> Iterator[tuple[str, str]]:
    """What nodes that are all of the main program's kind cannot give a component."""
    mend = "; ask for no more, or for placement: heterogeneous"
    if own.gpus_per_node and not own.nodes:
        yield "gpus_per_node", "would share the main program's GPUs; give it nodes of its own"
    elif own.gpus_per_node > resources.gpus_per_node:
        yield "gpus_per_node", f"asks for {own.gpus_per_node} of {resources.gpus_per_node} GPUs on a node{mend}"
    cores, most = own.cpus_per_task * own.ntasks_per_node, resources.cpus_per_task * resources.ntasks_per_node
    if cores > most:
        yield "cpus_per_task", f"asks for {cores} of {most} cores on a node{mend}"


def _train_problems(stage: Stage, config: TrainConfig, cpu: bool) -> Iterator[tuple[str, str]]:
    try:
        shape = shape_of(config.model.config)
    except UserError as error:
        yield "model", f"{config.model.name}: {error}"
        return
    gpus, tasks = stage.resources.gpus_per_node, stage.resources.ntasks_per_node
    if gpus and tasks != gpus:
        yield "resources.ntasks_per_node", f"is {tasks}, must be gpus_per_node, {gpus}: one process a GPU"
    world_size = stage.resources.nodes * tasks
    for problem in check_layout(shape, config, world_size, cpu=cpu):
        key, _, message = problem.partition(": ")
        yield key, message
    if config.seq_length > shape.max_position_embeddings:
        limit = shape.max_position_embeddings
        yield "seq_length", f"{config.seq_length} is beyond the {limit} positions of {config.model.name}"


def _host_problems(stage: Stage, profile: Profile) -> Iterator[str]:
    """Whether the memory that Slurm gives a node has room for what its processes hold while they save."""
    config, asked = stage.config, stage.resources
    memory = asked.mem or profile.mem
    if not asked.gpus_per_node or memory is None or profile.scheduler != "slurm":
        return
    if not isinstance(config, TrainConfig) or not isinstance(config.parallelism, Parallelism) or config.entrypoint:
        return
    given, ranks = memory_bytes(memory), asked.ntasks_per_node
    with contextlib.suppress(UserError, ValueError, ZeroDivisionError):  # of the model or layout, said elsewhere
        layout = layout_of(config, config.parallelism, asked.nodes * ranks)
        architecture = architecture_of(shape_of(config.model.config))
        needed = node_bytes(architecture, layout, ranks, trainable=config.trainable) / GIB
        if given is not None and given / GIB < needed:
            yield (
                f"{memory} a node, and its {ranks} processes need about {needed:.0f} GiB when they save; ask for more, "
                "for 0 (all that the node has), or for more nodes"
            )


def _fp8_problems(config: TrainConfig, gpu: str | None) -> Iterator[tuple[str, str]]:
    """What the cluster's GPUs cannot do; one of a type that `fit` does not know is asked when the stage starts."""
    if config.fp8_format is None or gpu not in GPUS:
        return
    there = GPUS[gpu].fp8_recipes
    if not there:
        yield "fp8_format", f"{gpu} has no FP8; leave it out"
    elif config.fp8_recipe not in there:
        yield "fp8_recipe", f"{gpu} has no {config.fp8_recipe}; there is {', '.join(there)}"
