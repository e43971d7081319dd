"""Values that no worker can take are refused before anything runs."""

from __future__ import annotations

import pytest

from launcher import cli

SUM = "stages.sum={kind: merge, checkpoints: [base, midtrain], weights: [0.15, 0.85]}"
CHANGES = [
    "prepare.problems.held-out.count=0",
    "prepare.sources.general.max_bytes=0",
    "midtrain.min_lr_ratio=5",
    "midtrain.weight_decay=-1",
    "midtrain.clip_grad=-1",
    "midtrain.adam_beta1=2",
    "midtrain.adam_eps=0",
    "midtrain.fp8_format=hybrid",  # the demo trains in fp32
    "midtrain.packing=first-fit",
    "rl-from-base.num_iterations=0",
    "rl-from-base.warmup_steps=-1",
    "rl-from-base.adam_beta2=1",
    "rl-from-base.beta=-1",
    "evaluate.max_new_tokens=0",
    "evaluate.batch_size=0",
    "analyze.thresholds=[]",
    "analyze.thresholds=[0]",
    "sum.checkpoints=[base]",
    "sum.checkpoints=[base,base]",
    "sum.weights=[1]",
    "sum.weights=[0,0]",
    "seed=-1",
    "base.seed=-1",
]


@pytest.mark.parametrize("change", CHANGES)
def test_the_key_and_its_place_are_named(change: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = [SUM] if change.startswith("sum.") else []
    assert cli.main(["check", "demo", *(x for s in [*given, change] for x in ("--set", s))]) == 2
    key = change.partition("=")[0].rpartition(".")[2]
    first = capsys.readouterr().err.splitlines()[0]
    assert f"--set {change}: " in first and f"{key}: " in first


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("parallelism.virtual_pipeline_model_parallel_size=2", "interleaved pipelines are not there yet"),
        ("num_layers_per_virtual_pipeline_stage=2", "interleaved pipelines are not there yet"),
        ("parallelism.expert_model_parallel_size=2", "models with experts are not there yet"),
        ("parallelism.tp_comm_overlap=true", "is not there yet; leave it out"),
    ],
)
def test_keys_of_megatron_that_are_not_there_say_so(key: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "demo", "--set", f"midtrain.{key}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"stages.midtrain.{key.partition('=')[0]}: " in line
    assert message in line and "unknown key" not in line


def test_what_only_our_own_loop_does_is_refused_beside_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    values = ("midtrain.entrypoint=pretrain_gpt.py", "midtrain.document_masking=true", "midtrain.packing=best-fit")
    assert cli.main(["check", "demo", *(word for value in values for word in ("--set", value))]) == 2
    told = capsys.readouterr().err
    assert "document_masking: is for our own loop" in told and "packing: best-fit is for our own loop" in told


def test_a_script_of_the_users_own_trains_what_it_will(capsys: pytest.CaptureFixture[str]) -> None:
    sets = ["midtrain.entrypoint=pretrain_gpt.py", "midtrain.trainable=attention"]
    assert cli.main(["check", "demo", *(word for change in sets for word in ("--set", change))]) == 2
    assert "stages.midtrain.trainable: is for our own loop" in capsys.readouterr().err
