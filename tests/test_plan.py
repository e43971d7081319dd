"""The planner: order, formats, inserted conversions, fingerprints, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher import configs
from launcher.errors import UserError
from launcher.inputs import External, Inputs
from launcher.plan import build_plan
from launcher.recipe import Recipe, Stage
from launcher.run_record import PlannedStage
from launcher.spec import decode

MODEL = {"name": "m", "family": "llama", "config": {"model_type": "llama", "hidden_size": 8}}
PREPARE = {"sources": {"text": {"kind": "python-stdlib"}}, "problems": {"held-out": {"count": 5}}}
TRAIN = {"model": MODEL, "data": {"prepare/text": 1.0}, "train_iters": 3}
RL = {"backend": "trl", "prompts": "prepare/held-out", "max_steps": 2}
NOTHING = Inputs({}, {})


def stage(name: str, kind: str, **config: Any) -> Stage:
    value = decode(configs.CONFIGS[kind], config)
    return Stage(name, kind, value, configs.Resources(), seed=0)  # type: ignore[arg-type]


def recipe(*stages: Stage) -> Recipe:
    return Recipe("r", "r.yaml", 0, {s.name: s for s in stages}, (), {}, {"stages": "r.yaml:1"})


def plan(*stages: Stage, inputs: Inputs = NOTHING) -> dict[str, PlannedStage]:
    return {s.spec.stage: s for s in build_plan(recipe(*stages), inputs)}


def demo_like() -> tuple[Stage, ...]:
    return (
        stage("evaluate", "evaluate", checkpoints=["base", "mid", "rl"], benchmarks=["prepare/held-out"]),
        stage("rl", "rl", **RL, checkpoint="mid"),
        stage("mid", "train", **TRAIN, checkpoint="base"),
        stage("base", "train", **TRAIN),
        stage("analyze", "analyze", pairs=[["base", "mid"], ["mid", "rl"]], problems="prepare/held-out"),
        stage("prepare", "prepare", **PREPARE),
    )


def test_conversions_are_inserted_once_and_shared() -> None:
    planned = plan(*demo_like())
    inserted = [name for name, s in planned.items() if s.inserted]
    assert sorted(inserted) == ["base-to-hf", "mid-to-hf"]
    for reader in ("evaluate", "analyze"):
        assert planned[reader].spec.inputs["base"] == planned["evaluate"].spec.inputs["base"]
        assert planned[reader].spec.inputs["base"].format == "hf"
        assert "base-to-hf" in planned[reader].depends
    assert planned["rl"].spec.inputs["checkpoint"].fingerprint == planned["mid-to-hf"].spec.fingerprint
    assert planned["evaluate"].spec.inputs["rl"].fingerprint == planned["rl"].spec.fingerprint


def test_every_input_is_an_output_of_a_stage_planned_before() -> None:
    made: dict[str, str] = {}
    for name, planned in plan(*demo_like()).items():
        for port in planned.spec.inputs.values():
            assert port.path in made, f"{name} reads {port.path} before it is planned"
        assert set(planned.depends) <= {made[p.path] for p in planned.spec.inputs.values()}
        made.update({output.path: name for output in planned.spec.outputs.values()})


@pytest.mark.parametrize("absent", ["sources", "problems"])
def test_a_prepare_stage_has_the_ports_that_it_fills(absent: str) -> None:
    """The supervisor seals no artifact with an empty port."""
    (planned,) = plan(stage("prepare", "prepare", **{**PREPARE, absent: {}})).values()
    port = {"sources": "tokens", "problems": "prompts"}[absent]
    assert set(planned.spec.outputs) == {"tokenizer", "tokens", "prompts"} - {port}
    reader = stage("mid", "train", **TRAIN) if port == "tokens" else stage("rl", "rl", **RL, checkpoint="/m")
    with pytest.raises(UserError, match=f"not {port}"):
        plan(stage("prepare", "prepare", **{**PREPARE, absent: {}}), reader)


@given(st.permutations(demo_like()))
def test_the_order_of_writing_changes_no_fingerprint(stages: list[Stage]) -> None:
    want = {n: s.spec.fingerprint for n, s in plan(*demo_like()).items()}
    assert {n: s.spec.fingerprint for n, s in plan(*stages).items()} == want


@st.composite
def chains(draw: st.DrawFn) -> list[Stage]:
    """A prepare stage and a random tree of train stages, each from random weights or from one before it."""
    stages = [stage("prepare", "prepare", **PREPARE)]
    for i in range(draw(st.integers(1, 6))):
        parent = draw(st.one_of(st.none(), st.integers(0, i - 1))) if i else None
        config = {**TRAIN, "train_iters": i + 1, "checkpoint": None if parent is None else f"t{parent}"}
        stages.append(stage(f"t{i}", "train", **config))
    return stages


def descendants(planned: Mapping[str, PlannedStage], name: str) -> set[str]:
    found = {name}
    for other, s in planned.items():
        if found & set(s.depends):
            found.add(other)
    return found


@given(chains(), st.data())
def test_a_change_reaches_exactly_what_depends_on_it(stages: list[Stage], data: st.DataObject) -> None:
    before = plan(*stages)
    i = data.draw(st.integers(1, len(stages) - 1))
    changed = [replace(s, config=replace(s.config, lr=0.123)) if n == i else s for n, s in enumerate(stages)]
    after = plan(*changed)
    moved = {n for n in before if before[n].spec.fingerprint != after[n].spec.fingerprint}
    assert moved == descendants(before, stages[i].name)


@given(chains(), st.data())
def test_layout_intervals_and_resources_change_no_fingerprint(stages: list[Stage], data: st.DataObject) -> None:
    i = data.draw(st.integers(1, len(stages) - 1))
    layout = configs.Parallelism(tensor_model_parallel_size=2)
    config = replace(stages[i].config, parallelism=layout, save_interval=7, log_interval=3)
    changed = list(stages)
    changed[i] = replace(stages[i], config=config, resources=configs.Resources(nodes=4, partition="long"))
    assert {n: s.spec.fingerprint for n, s in plan(*stages).items()} == {
        n: s.spec.fingerprint for n, s in plan(*changed).items()
    }


def test_seed_and_facts_change_the_fingerprint() -> None:
    stages = demo_like()
    plain = plan(*stages)
    seeded = plan(*(replace(s, seed=1) for s in stages))
    other_python = plan(*stages, inputs=Inputs({}, {"prepare": {"sources.text": "python 3.12.0"}}))
    for other in (seeded, other_python):
        assert all(plain[n].spec.fingerprint != other[n].spec.fingerprint for n in plain)


def test_external_checkpoints_are_converted_under_their_own_name() -> None:
    ref = "/models/Llama-3.1-8B"
    inputs = Inputs({ref: External(ref, "hf", "abc", "llama")}, {})
    planned = plan(
        stage("prepare", "prepare", **PREPARE),
        stage("mid", "train", **TRAIN, checkpoint=ref),
        stage("again", "train", **{**TRAIN, "train_iters": 9}, checkpoint=ref),
        inputs=inputs,
    )
    conversions = [s for s in planned.values() if s.inserted]
    assert len(conversions) == 1 and conversions[0].spec.stage.startswith("llama-3-1-8b-")
    assert conversions[0].spec.stage.endswith("-to-megatron")
    assert planned["mid"].spec.inputs["checkpoint"].format == "megatron"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (stage("mid", "train", **TRAIN, checkpoint="bse"), "no stage bse, did you mean base?"),
        (stage("mid", "train", **TRAIN, checkpoint="mid"), "cannot read what it makes itself"),
        (stage("mid", "train", **TRAIN, checkpoint="prepare"), "makes tokenizer, tokens, prompts, not checkpoint"),
        (
            stage("mid", "train", **{**TRAIN, "data": {"prepare/txt": 1.0}}),
            "no source txt in prepare, did you mean text",
        ),
        (stage("mid", "train", **{**TRAIN, "data": {"prepare": 1.0}}), "name a source of prepare: prepare/text"),
        (stage("rl", "rl", **{**RL, "prompts": "prepare/held"}, checkpoint="mid"), "no problem set held in prepare"),
        (stage("rl", "rl", **{**RL, "backend": "nemo-rl"}, checkpoint="mid"), "backend nemo-rl is not built yet"),
        (stage("mid", "train", **TRAIN, checkpoint="rl"), "in a circle: mid -> rl -> mid"),
        (
            stage("mid", "train", **{**TRAIN, "model": {**MODEL, "config": {"hidden_size": 9}}}, checkpoint="base"),
            "base trains model m, this stage m",
        ),
    ],
)
def test_refusals(change: Stage, message: str) -> None:
    stages = [change if s.name == change.name else s for s in demo_like()]
    with pytest.raises(UserError, match="stages") as caught:
        plan(*stages)
    assert message in str(caught.value)


def test_all_problems_at_once() -> None:
    stages = (
        *demo_like(),
        stage("x", "train", **TRAIN, checkpoint="nope"),
        stage("y", "train", **TRAIN, checkpoint="no"),
    )
    with pytest.raises(UserError) as caught:
        plan(*stages)
    assert len(caught.value.problems) == 2


def test_a_checkpoint_of_another_family_is_refused() -> None:
    ref = "/models/granite"
    inputs = Inputs({ref: External(ref, "hf", "abc", "granite")}, {})
    with pytest.raises(UserError, match="model type granite, but model m is llama"):
        plan(stage("prepare", "prepare", **PREPARE), stage("mid", "train", **TRAIN, checkpoint=ref), inputs=inputs)


# ---------------------------------------------------------------------------------------------------------- fanning out

SETS = {"sources": {"text": {"kind": "python-stdlib"}}, "problems": {"easy": {"count": 5}, "hard": {"count": 5}}}


def fanned_out(*makers: str, **changes: Any) -> dict[str, PlannedStage]:
    refs = [f"{maker}/{item}" for maker in makers for item in ("easy", "hard")]
    config = {"checkpoints": ["base"], "benchmarks": refs, "seeds": [0, 3], "fan_out": True, **changes}
    prepares = (stage(name, "prepare", **SETS) for name in ("prepare", "other"))
    return plan(stage("evaluate", "evaluate", **config), stage("base", "train", **TRAIN), *prepares)


def test_a_stage_fans_out_by_benchmark_and_seed() -> None:
    found = {n: s for n, s in fanned_out("prepare").items() if s.part_of}
    assert list(found) == ["evaluate.easy.0", "evaluate.easy.3", "evaluate.hard.0", "evaluate.hard.3"]
    assert {s.part_of for s in found.values()} == {"evaluate"}
    assert len({s.spec.fingerprint for s in found.values()}) == 4
    for name, part in found.items():
        _, item, seed = name.split(".")
        assert part.spec.seed == int(seed) and part.spec.config["benchmarks"] == [f"prepare/{item}"]
        assert part.depends == ("base-to-hf", "prepare")


def test_a_part_is_what_a_stage_of_its_own_would_be() -> None:
    part = fanned_out("prepare")["evaluate.hard.3"]
    alone = fanned_out("prepare", benchmarks=["prepare/hard"], seeds=[3])["evaluate.hard.3"]
    assert part.spec.fingerprint == alone.spec.fingerprint
    config = {"checkpoints": ["base"], "benchmarks": ["prepare/hard"]}
    single = replace(stage("single", "evaluate", **config), seed=3)
    base = stage("base", "train", **TRAIN)
    assert plan(single, base, stage("prepare", "prepare", **SETS))["single"].spec.fingerprint == part.spec.fingerprint


def test_without_seeds_the_stages_own_counts() -> None:
    found = fanned_out("prepare", seeds=[])
    assert [n for n, s in found.items() if s.part_of] == ["evaluate.easy.0", "evaluate.hard.0"]


def test_benchmarks_of_one_name_are_told_apart_by_their_makers() -> None:
    found = fanned_out("prepare", "other", seeds=[1])
    wanted = ["evaluate.prepare.easy.1", "evaluate.prepare.hard.1", "evaluate.other.easy.1", "evaluate.other.hard.1"]
    assert [n for n, s in found.items() if s.part_of] == wanted


def test_without_fan_out_several_seeds_are_one_stage() -> None:
    found = fanned_out("prepare", fan_out=False)
    assert found["evaluate"].part_of is None and list(found["evaluate"].spec.config["seeds"]) == [0, 3]


def test_a_problem_of_all_parts_is_said_once_and_of_the_stage() -> None:
    with pytest.raises(UserError) as caught:
        fanned_out("prepare", checkpoints=["base", "nowhere"])
    (problem,) = caught.value.problems
    assert "stages.evaluate.checkpoints[1]: no stage nowhere" in problem


@pytest.mark.parametrize(
    ("changes", "message"), [({"seeds": [1, 1]}, "seeds: names one twice"), ({"seeds": [-1]}, "must not be negative")]
)
def test_seeds_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fanned_out("prepare", **changes)
