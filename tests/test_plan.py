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
from launcher.inputs import Absent, External, Inputs
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
        (stage("rl", "rl", **{**RL, "backend": "open-instruct"}, checkpoint="mid"), "backend open-instruct is not"),
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


# -------------------------------------------------------------------------------------------------------------- merging

LLAMA = "/models/llama"
HALVES = {"checkpoints": [LLAMA, "mid"], "weights": [0.15, 0.85]}


def merging(*stages: Stage, family: str | None = "llama", **config: Any) -> dict[str, PlannedStage]:
    """Mid-training from a checkpoint outside, the two merged, and training from the sum."""
    return plan(
        stage("prepare", "prepare", **PREPARE),
        stage("sum", "merge", **{**HALVES, **config}),
        stage("long", "train", **TRAIN, checkpoint="sum"),
        stage("mid", "train", **TRAIN, checkpoint=LLAMA),
        *stages,
        inputs=Inputs({LLAMA: External(LLAMA, "hf", "abc", family)}, {}),
    )


def test_a_merge_shares_the_conversion_that_training_wants_and_adds_none() -> None:
    planned = merging()
    (inserted,) = (name for name, s in planned.items() if s.inserted)
    assert inserted.endswith("-to-megatron")
    assert planned["sum"].depends == (inserted, "mid") and planned["long"].depends == ("prepare", "sum")
    ports = planned["sum"].spec.inputs
    assert ports[LLAMA] == planned["mid"].spec.inputs["checkpoint"]
    assert ports["mid"].fingerprint == planned["mid"].spec.fingerprint
    assert {p.format for p in ports.values()} == {planned["sum"].spec.outputs["checkpoint"].format} == {"megatron"}
    assert planned["long"].spec.inputs["checkpoint"].fingerprint == planned["sum"].spec.fingerprint
    assert not planned["sum"].obstacles


def test_a_merge_in_hugging_faces_format_is_read_by_evaluation_as_it_is() -> None:
    reader = stage("evaluate", "evaluate", checkpoints=["soup"], benchmarks=["prepare/held-out"])
    rl = stage("rl", "rl", **RL, checkpoint="mid")
    planned = merging(reader, rl, stage("soup", "merge", **{**HALVES, "checkpoints": [LLAMA, "rl"], "format": "hf"}))
    assert planned["soup"].depends == ("rl",)
    assert planned["evaluate"].spec.inputs["soup"].fingerprint == planned["soup"].spec.fingerprint


def test_weights_and_order_decide_what_a_merge_is_and_verification_does_not() -> None:
    key = merging()["sum"].spec.fingerprint
    other = ({"weights": [0.85, 0.15]}, {"checkpoints": ["mid", LLAMA]}, {"format": "hf"})
    keys = [merging(**change)["sum"].spec.fingerprint for change in other]
    assert len({key, *keys}) == 4
    assert merging(verify=False)["sum"].spec.fingerprint == key


WIDER = {**MODEL, "name": "wider", "config": {"model_type": "llama", "hidden_size": 16}}


@pytest.mark.parametrize(
    ("stages", "config", "message"),
    [
        ([], {"checkpoints": [LLAMA, "md"]}, "stages.sum.checkpoints[1]: no stage md, did you mean mid?"),
        ([], {"checkpoints": ["mid", "prepare"]}, "makes tokenizer, tokens, prompts, not checkpoint"),
        ([], {"checkpoints": ["mid", "sum"]}, "cannot read what it makes itself"),
        ([], {"checkpoints": ["mid", "long"]}, "in a circle: sum -> long -> sum"),
        ([], {"family": "granite"}, "model type granite, but model m is llama; a merge is of one model"),
        (
            [stage("wide", "train", **{**TRAIN, "model": WIDER})],
            {"checkpoints": ["mid", "wide"]},
            "stages.sum.checkpoints[1]: wide trains model wider, mid model m; a merge is of one model",
        ),
        (
            [stage("wide", "train", **{**TRAIN, "model": WIDER}, checkpoint="sum")],
            {},
            "stages.wide.checkpoint: mid trains model m, this stage wider; give both one model",
        ),
    ],
)
def test_merges_that_are_refused(stages: list[Stage], config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        merging(*stages, **config)
    assert message in str(caught.value)


# ---------------------------------------------------------------------------------------- what is planned and not built

GPUS = configs.Resources(nodes=2, gpus_per_node=4, ntasks_per_node=4, time="6:00:00")


def with_backend(name: str, algorithm: str) -> tuple[Stage, ...]:
    lengths = {"max_prompt_length": 10, "end_strings": ["x"], "prompts_per_step": 8}
    rl = stage("rl", "rl", **{**RL, **lengths, "backend": name, "algorithm": algorithm}, checkpoint="mid")
    return (*(s for s in demo_like() if s.name != "rl"), replace(rl, resources=GPUS))


def test_aligner_reads_and_makes_nemo_and_what_stands_between_is_marked() -> None:
    planned = plan(*with_backend("nemo-aligner", "reinforce"))
    assert planned["rl"].spec.inputs["checkpoint"].format == "nemo"
    assert planned["rl"].spec.outputs["checkpoint"].format == "nemo"
    assert planned["rl"].depends == ("mid-to-nemo", "prepare")
    assert planned["evaluate"].spec.inputs["rl"].fingerprint == planned["rl-to-hf"].spec.fingerprint
    marked = {name for name, s in planned.items() if s.not_built}
    assert marked == {"rl"}
    assert "reward server" in str(planned["rl"].not_built)


def test_nemo_rl_goes_on_from_what_training_made_without_a_conversion() -> None:
    planned = plan(*with_backend("nemo-rl", "grpo"))
    assert planned["rl"].spec.inputs["checkpoint"].fingerprint == planned["mid"].spec.fingerprint
    assert planned["rl-to-hf"].spec.inputs["checkpoint"].format == "megatron"
    assert {name for name, s in planned.items() if s.not_built} == {"rl"}


def test_what_is_built_is_not_marked() -> None:
    assert not any(s.not_built or s.absent or s.obstacles for s in plan(*demo_like()).values())


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("prepare", {"sources": {"text": {"kind": "dataset", "path": "/d"}}}, "sources of kind dataset (text)"),
        ("prepare", {"problems": {"held-out": {"count": 5, "path": "/p"}}}, "published problem sets (held-out)"),
        ("prepare", {"tokenizer": {"path": "hf:a/b"}}, "fetching a tokenizer (hf:a/b)"),
        ("evaluate", {"samples": 4}, "several samples"),
        ("evaluate", {"top_p": 0.95}, "top_p"),
    ],
)
def test_what_a_worker_cannot_do_yet_is_marked_with_the_reason(name: str, change: dict[str, Any], reason: str) -> None:
    stages = {s.name: s for s in demo_like()}
    kept = {**PREPARE} if name == "prepare" else {"checkpoints": ["base"], "benchmarks": ["prepare/held-out"]}
    stages[name] = stage(name, stages[name].kind, **{**kept, **change})
    planned = plan(*stages.values())
    assert reason in str(planned[name].not_built)
    assert [n for n, s in planned.items() if s.not_built] == [name]


def test_an_absent_checkpoint_marks_the_conversion_that_reads_it() -> None:
    ref = "/models/absent"
    external = External(ref, "hf", f"absent: {ref}", None)
    stages = (stage("prepare", "prepare", **PREPARE), stage("mid", "train", **TRAIN, checkpoint=ref))
    planned = plan(*stages, inputs=Inputs({ref: external}, {}, (Absent(ref, None, "no such checkpoint"),)))
    ((name, marked),) = [(name, s) for name, s in planned.items() if s.absent]
    assert name.endswith("-to-megatron") and marked.absent == (ref,)
    there = plan(*stages, inputs=Inputs({ref: replace(external, fingerprint="abc")}, {}))
    assert there["mid"].spec.fingerprint != planned["mid"].spec.fingerprint


def test_absent_text_marks_the_stage_that_reads_it() -> None:
    inputs = Inputs({}, {}, (Absent("/text", "prepare", "no such file"), Absent("/other", "elsewhere", "no")))
    planned = plan(stage("prepare", "prepare", **PREPARE), inputs=inputs)
    assert planned["prepare"].absent == ("/text",) and "/text" in planned["prepare"].obstacles[0]


# --------------------------------------------------------------------------------------------------- parts of a job


def test_a_job_has_the_nodes_of_all_its_components() -> None:
    own = {"reward-server": configs.Component(nodes=3, cpus_per_task=2)}
    stages = with_backend("nemo-aligner", "reinforce")
    for placement, want in (("shared", {None: (5, 4)}), ("heterogeneous", {None: (2, 4), "reward-server": (3, 0)})):
        asked = replace(GPUS, components=own, placement=placement)
        rl = next(
            s
            for s in plan(*(replace(s, resources=asked) if s.name == "rl" else s for s in stages)).values()
            if s.spec.stage == "rl"
        )
        assert {name: (part.nodes, part.gpus_per_node) for name, part in rl.job_parts.items()} == want
        assert all(part.time == "6:00:00" for part in rl.job_parts.values())


def test_where_components_run_changes_no_fingerprint() -> None:
    stages = with_backend("nemo-aligner", "reinforce")
    own = {"reward-server": configs.Component(nodes=3)}
    changed = [replace(s, resources=replace(GPUS, components=own)) if s.name == "rl" else s for s in stages]
    assert plan(*stages)["rl"].spec.fingerprint == plan(*changed)["rl"].spec.fingerprint


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
