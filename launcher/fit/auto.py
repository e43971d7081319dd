"""`parallelism: auto`: the first layout of `fit` for what a train stage asks of the cluster."""

from __future__ import annotations

from dataclasses import replace

from launcher.configs import Parallelism, Resources, TrainConfig
from launcher.errors import UserError
from launcher.fit.gpus import gpu_of
from launcher.fit.search import GIB, Task, find_layouts, parallelism_of
from launcher.models.families import shape_of
from launcher.models.layout import check_layout
from launcher.recipe import Recipe, Stage


def with_layouts(recipe: Recipe, gpu: str | None) -> Recipe:
    """The recipe with every `auto` replaced. `gpu` is the cluster's type. Raises UserError with all that cannot be."""
    problems = []
    stages = {}
    for name, stage in recipe.stages.items():
        try:
            stages[name] = _with_layout(stage, gpu)
        except UserError as error:
            path = f"stages.{name}.parallelism"
            problems += [f"{recipe.where(path)}: {path}: {problem}" for problem in error.problems]
    if problems:
        raise UserError(problems)
    return replace(recipe, stages=stages)


def _with_layout(stage: Stage, gpu: str | None) -> Stage:
    if not isinstance(stage.config, TrainConfig) or stage.config.parallelism != "auto":
        return stage
    return replace(stage, config=replace(stage.config, parallelism=choose(stage.config, stage.resources, gpu)))


def choose(config: TrainConfig, resources: Resources, gpu: str | None) -> Parallelism:
    """The best layout that fits; data parallelism alone where there are no GPUs, and so nothing to fit into.

    By the assumed MFU, so that a plan made again has the same layouts, whatever has run since.
    """
    if not resources.gpus_per_node:
        return Parallelism()
    if gpu is None:
        raise UserError("auto needs the type of the GPUs: set `gpu` in the cluster's profile, or write the sizes")
    tasks, gpus = resources.ntasks_per_node, resources.gpus_per_node
    if tasks != gpus:
        raise UserError(f"auto needs one process a GPU: ntasks_per_node is {tasks}, must be gpus_per_node, {gpus}")
    if config.fp8_format is not None:
        raise UserError("auto does not count the memory of FP8; write the sizes")
    ranks, shape = resources.nodes * resources.ntasks_per_node, shape_of(config.model.config)
    task = Task(
        shape=shape,
        gpu=gpu_of(gpu),
        gpus=ranks,
        gpus_per_node=resources.ntasks_per_node,
        seq_length=config.seq_length,
        global_batch_size=config.global_batch_size,
        train_iters=config.train_iters,
        precision=config.precision,
        trainable=config.trainable,
        fixed={"micro_batch_size": config.micro_batch_size},
    )
    # What the stage does besides, masking or a script say, rules out further ones.
    found = [
        f
        for f in find_layouts(task)
        if not check_layout(shape, replace(config, parallelism=parallelism_of(f.layout)), ranks)
    ]
    if not found:
        raise UserError(
            f"auto: no layout can work on {ranks} GPUs with global_batch_size {config.global_batch_size} and "
            f"micro_batch_size {config.micro_batch_size}; `prism-launch fit` says why"
        )
    if not found[0].fits:
        raise UserError(
            f"auto: nothing fits on {ranks} × {gpu}; the closest layout needs {found[0].needed / GIB:.0f} GiB a GPU; "
            "ask for more nodes or a shorter seq_length"
        )
    return parallelism_of(found[0].layout)
