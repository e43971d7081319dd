"""What `check` finds beyond the plan: backends and families, components and their sizes, the parts' partitions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from launcher.check import check_recipe
from launcher.cluster import Partition, Profile
from launcher.errors import UserError
from launcher.inputs import External, Inputs
from launcher.plan import build_plan
from launcher.recipe.load import load_recipes

CHECKOUT = Path(__file__).resolve().parent.parent
LIMITS = {"gpu": Partition(max_nodes=20, gpus_per_node=8), "cpu": Partition(max_nodes=2, max_time="4:00:00")}
SITE = Profile(name="site", scheduler="slurm", partition="gpu", cpu_partition="cpu", partitions=LIMITS)


def problems(name: str, *sets: str, profile: Profile = SITE) -> list[str]:
    """The problems of a full-scale recipe, read as if its base model were here."""
    (recipe,) = load_recipes(CHECKOUT / "recipes" / "prism" / f"{name}.yaml", sets)
    ref = recipe.stages["midtrain"].config.checkpoint
    inputs = Inputs({ref: External(ref, "hf", "f" * 20, None)}, {})
    return check_recipe(recipe, build_plan(recipe, inputs), profile)


@pytest.mark.parametrize("name", ["llama-3.1-8b", "nemotron-h-8b", "granite-3.3-8b-long-context"])
def test_the_papers_runs_have_no_problem(name: str) -> None:
    assert problems(name) == []


def test_the_variants_of_long_context_recovery_have_no_problem() -> None:
    for sets in (["long-context.trainable=attention"], ["long-context.checkpoint=midtrain"]):
        assert problems("granite-3.3-8b-long-context", *sets) == []
    name = "granite-3.3-8b-long-context"
    (problem,) = problems(name, "long-context.trainable=attention", "long-context.seq_length=262144")
    assert "stages.long-context.seq_length" in problem and "beyond the 131072 positions" in problem


def test_a_matrix_over_weights_and_what_is_trained_shares_what_comes_before(tmp_path: Path) -> None:
    recipe = tmp_path / "sweep.yaml"
    recipe.write_text(
        "base: prism/granite-3.3-8b-long-context\nmatrix:\n"
        "  merge.weights: [[0.15, 0.85], [0.3, 0.7]]\n  long-context.trainable: [all, attention]\n"
    )
    keys: dict[str, set[str]] = {}
    for point in load_recipes(recipe):
        ref = point.stages["midtrain"].config.checkpoint
        for planned in build_plan(point, Inputs({ref: External(ref, "hf", "f" * 20, None)}, {})):
            keys.setdefault(planned.spec.stage, set()).add(planned.spec.fingerprint)
    assert {n: len(keys[n]) for n in ("prepare", "midtrain", "merge", "long-context")} == {
        "prepare": 1,
        "midtrain": 1,
        "merge": 2,
        "long-context": 4,
    }


def test_the_family_is_found_through_a_merge() -> None:
    both = "{kind: merge, checkpoints: [midtrain, rl], weights: [0.5, 0.5]}"
    again = "{kind: rl, backend: nemo-aligner, checkpoint: sum, prompts: prepare/rl-balanced, max_steps: 1,"
    again += " max_prompt_length: 9}"
    found = problems("nemotron-h-8b", f"stages.sum={both}", f"stages.rl2={again}")
    assert any("stages.rl2.backend" in p and "cannot train nemotron_h" in p for p in found), found


@pytest.mark.parametrize(
    ("sets", "where", "message"),
    [
        (
            ["components.reward-sever={}"],
            "components.reward-sever",
            "no component reward-sever; there is reward-server",
        ),
        (["components.reward-server={cpus_per_task: 99}"], "cpus_per_task", "asks for 99 of 64 cores"),
        (["components.reward-server={gpus_per_node: 1}"], "gpus_per_node", "would share the main program's GPUs"),
        (["components.reward-server={nodes: 1, gpus_per_node: 9}"], "gpus_per_node", "asks for 9 of 8 GPUs"),
        (["components.reward-server={nodes: 5}"], "resources.nodes", "asks for 21 nodes"),
        (["components={}", "placement=heterogeneous", "time=3:00:00"], "components", "say what reward-server asks for"),
        (
            ["components.reward-server={nodes: 3}", "placement=heterogeneous", "time=3:00:00"],
            "components.reward-server.nodes",
            "asks for 3 nodes, but partition cpu",
        ),
        (
            ["components.reward-server={nodes: 1}", "placement=heterogeneous"],
            "resources.components.reward-server:",
            "beyond the 4:00:00 of partition cpu",
        ),
    ],
)
def test_components_that_cannot_be_placed(sets: list[str], where: str, message: str) -> None:
    found = problems("llama-3.1-8b", *(f"rl.resources.{s}" for s in sets))
    assert any(where in p and message in p for p in found), found
    assert len(found) == 1


@pytest.mark.parametrize("stage", ["midtrain", "prepare"])
def test_a_stage_of_one_program_has_no_components(stage: str) -> None:
    found = problems("llama-3.1-8b", f"{stage}.resources.components.server={{}}")
    assert len(found) == 1 and "no component server; there is none" in found[0]
    (problem,) = problems("llama-3.1-8b", f"{stage}.resources.placement=heterogeneous")
    assert "one program" in problem


def test_every_part_needs_an_image() -> None:
    profile = replace(SITE, runtime=replace(SITE.runtime, container="pyxis"), images={"rl-nemo-aligner": "/a.sqsh"})
    found = problems("llama-3.1-8b", profile=profile)
    assert not [p for p in found if "stages.rl.resources.image" in p]
    assert [p for p in found if "stages.midtrain.resources.image" in p]


def test_wrong_sizes_of_a_component_are_all_named_at_once() -> None:
    with pytest.raises(UserError) as error:
        problems("llama-3.1-8b", "rl.resources.components.reward-server={nodes: -1, cpus_per_task: 0}")
    assert len(error.value.problems) == 2 and all("reward-server" in p for p in error.value.problems)


@pytest.mark.parametrize(
    ("gpu", "recipe", "wanted"),
    [
        ("h100-80gb", "tensorwise", None),
        ("h100-80gb", "mxfp8", "stages.midtrain.fp8_recipe: h100-80gb has no mxfp8; there is delayed, tensorwise"),
        ("a100-80gb", "delayed", "stages.midtrain.fp8_format: a100-80gb has no FP8; leave it out"),
        (None, "mxfp8", None),
    ],
)
def test_fp8_that_the_clusters_gpus_do_not_have(gpu: str | None, recipe: str, wanted: str | None) -> None:
    sets = ["midtrain.fp8_format=hybrid", f"midtrain.fp8_recipe={recipe}"]
    found = problems("llama-3.1-8b", *sets, profile=replace(SITE, gpu=gpu))
    assert len(found) == (wanted is not None) and all(wanted in line for line in found if wanted)


def test_fp8_of_a_stage_that_asks_for_no_gpu() -> None:
    found = problems("llama-3.1-8b", "midtrain.fp8_format=hybrid", "midtrain.resources.gpus_per_node=0")
    assert any("stages.midtrain.fp8_format: needs GPUs with FP8, and the stage has none" in line for line in found)


@pytest.mark.parametrize("tasks", [1, 16])
def test_a_train_stage_has_one_process_a_gpu(tasks: int) -> None:
    """One a node is the default; the other GPUs would stand idle, and with more two would share one."""
    (problem,) = problems(
        "llama-3.1-8b", f"midtrain.resources.ntasks_per_node={tasks}", "midtrain.resources.cpus_per_task=1"
    )
    assert (
        f"stages.midtrain.resources.ntasks_per_node: is {tasks}, must be gpus_per_node, 8: one process a GPU" in problem
    )
