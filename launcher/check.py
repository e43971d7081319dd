"""What a plan cannot see by itself: parallel layouts, backends and the cluster's limits. All problems at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from launcher.cluster import Profile, check_resources
from launcher.configs import RLConfig, TrainConfig
from launcher.errors import UserError
from launcher.models.families import shape_of
from launcher.models.layout import check_layout
from launcher.recipe import Recipe, Stage
from launcher.rl import backends
from launcher.run_record import PlannedStage


def check_recipe(recipe: Recipe, stages: tuple[PlannedStage, ...], profile: Profile) -> list[str]:
    """Problems of a recipe that plans, one line each with file and line."""
    found = []
    cpu = profile.scheduler == "local" and not Path("/dev/nvidiactl").exists()
    for stage in recipe.stages.values():
        for key, message in _stage_problems(stage, cpu):
            path = f"stages.{stage.name}.{key}" if key else f"stages.{stage.name}"
            found.append(f"{recipe.where(path)}: {path}: {message}")
    for planned in stages:
        for key, message in check_resources(planned.resources, planned.spec, profile):
            path = f"stages.{planned.part_of or planned.spec.stage}.resources.{key}"
            found.append(f"{recipe.where(path)}: {path}: {message}")
    return list(dict.fromkeys(found))


def _stage_problems(stage: Stage, cpu: bool) -> Iterator[tuple[str, str]]:
    if isinstance(stage.config, TrainConfig):
        yield from _train_problems(stage, stage.config, cpu)
    if isinstance(stage.config, RLConfig) and stage.config.backend in backends():
        yield from backends()[stage.config.backend].problems(stage.config, stage.resources)


def _train_problems(stage: Stage, config: TrainConfig, cpu: bool) -> Iterator[tuple[str, str]]:
    try:
        shape = shape_of(config.model.config)
    except UserError as error:
        yield "model", f"{config.model.name}: {error}"
        return
    world_size = stage.resources.nodes * stage.resources.ntasks_per_node
    for problem in check_layout(shape, config, world_size, cpu=cpu):
        key, _, message = problem.partition(": ")
        yield key, message
    if config.seq_length > shape.max_position_embeddings:
        limit = shape.max_position_embeddings
        yield "seq_length", f"{config.seq_length} is beyond the {limit} positions of {config.model.name}"
