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


@pytest.mark.parametrize("name", ["llama-3.1-8b", "nemotron-h-8b"])
def test_the_papers_runs_have_no_problem(name: str) -> None:
    assert problems(name) == []


def test_aligner_is_refused_for_a_hybrid_by_the_backend_and_with_those_that_can() -> None:
    sets = ["rl.backend=nemo-aligner", "rl.algorithm=reinforce", 'rl.end_strings=["</s>"]', "rl.importance_cap=null"]
    (problem,) = problems("nemotron-h-8b", *sets)
    assert "stages.rl.backend" in problem and "cannot train nemotron_h" in problem and "trl, nemo-rl" in problem


def test_the_family_is_found_through_an_rl_stage() -> None:
    again = "{kind: rl, backend: trl, checkpoint: rl, prompts: prepare/rl-balanced, max_steps: 1, algorithm: grpo}"
    assert problems("nemotron-h-8b", f"stages.rl2={again}") == []
    sets = [f"stages.rl2={again}", "rl2.backend=nemo-aligner"]
    assert any("stages.rl2.backend" in p and "nemotron_h" in p for p in problems("nemotron-h-8b", *sets))


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
