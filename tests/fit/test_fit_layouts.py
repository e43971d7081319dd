"""Which layouts can work, which fit, in which order; and the command."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from launcher.cli import main
from launcher.fit.gpus import GPUS
from launcher.fit.memory import Layout
from launcher.fit.search import GIB, Task, find_layouts, layout_problems
from launcher.models.families import parameter_count, shape_of
from launcher.recipe.load import read_model
from tests.test_cli import CHECKOUT, prism

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu", "rope_theta": 500000.0,
}  # fmt: skip
GRANITE_H: dict[str, Any] = {
    "model_type": "granitemoehybrid", "hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 8192, "shared_intermediate_size": 8192, "vocab_size": 100352,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "hidden_act": "silu",
    "num_local_experts": 0, "position_embedding_type": "nope", "mamba_d_state": 128, "mamba_n_heads": 64,
    "mamba_d_head": 64, "mamba_n_groups": 1, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 256,
    "mamba_conv_bias": True, "mamba_proj_bias": False,
    "layer_types": ["attention" if i in (5, 15, 25, 35) else "mamba" for i in range(40)],
}  # fmt: skip


def task(config: dict[str, Any] = LLAMA, gpu: str = "h100-80gb", **changes: Any) -> Task:
    given = Task(
        shape=shape_of(config), gpu=GPUS[gpu], gpus=32, seq_length=8192, global_batch_size=128, train_iters=1000
    )  # fmt: skip
    return replace(given, **changes)


def test_what_fits_comes_first_and_the_fastest_of_it() -> None:
    found = find_layouts(task())
    fits = [f.fits for f in found]
    assert True in fits and False in fits and fits == sorted(fits, reverse=True)
    fitting = [f for f in found if f.fits]
    assert fitting[0].step_seconds <= min(f.step_seconds for f in fitting) * 1.03
    assert all(f.needed <= 0.95 * 79.2 * GIB for f in fitting)


def test_an_8b_model_needs_splitting_on_80_gib_and_not_on_141() -> None:
    """Megatron-Bridge's recipe for 8 H100 splits the sequence for the same reason."""
    one = {"tp": 1, "pp": 1, "cp": 1, "micro_batch_size": 1}
    for gpu, want in (("h100-80gb", False), ("h200-141gb", True)):
        plain = [f for f in find_layouts(task(gpu=gpu, gpus=8, fixed=one)) if f.layout.recompute == "none"]
        assert [f.fits for f in plain] == [want]


def test_granite_4_h_has_one_mamba_group_and_no_tensor_parallelism() -> None:
    assert {f.layout.tp for f in find_layouts(task(GRANITE_H))} == {1}
    problems = layout_problems(task(GRANITE_H), Layout(gpus=32, tp=2, global_batch_size=128))
    assert problems == ["tensor_model_parallel_size: 2 does not divide the model's 1 Mamba groups"]


def test_every_kind_of_recomputation_is_offered() -> None:
    for one in (task(), task(GRANITE_H)):
        assert {f.layout.recompute for f in find_layouts(one)} == {"none", "mlp", "full"}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tp": 16}, "more than the 8 GPUs of a node"),
        ({"pp": 3}, "pipeline_model_parallel_size: 3 does not divide the model's 32 layers"),
        ({"cp": 3}, "does not divide 32 GPUs"),
        ({"micro_batch_size": 3}, "no multiple of 32 data-parallel replicas x micro_batch_size 3"),
    ],
)
def test_layouts_that_cannot_work_say_why(sizes: dict[str, int], message: str) -> None:
    problems = layout_problems(task(), Layout(gpus=32, global_batch_size=128, **sizes))
    assert any(message in problem for problem in problems)


def test_tensor_parallel_ranks_stay_within_a_node() -> None:
    """Of nodes of 6 GPUs some ranks of 4 would stand astride two."""
    six = task(gpus=24, gpus_per_node=6, global_batch_size=96)
    assert {f.layout.tp for f in find_layouts(six)} == {1, 2}
    layout = Layout(gpus=24, tp=4, global_batch_size=96)
    assert layout_problems(six, layout) == ["tensor_model_parallel_size: 4 does not divide the 6 GPUs of a node"]
    assert layout_problems(replace(six, gpus=4), replace(layout, gpus=4)) == []


def test_long_sequences_are_split_where_short_ones_are_not() -> None:
    assert {f.layout.cp for f in find_layouts(task())} == {1}
    assert 4 in {f.layout.cp for f in find_layouts(task(seq_length=32768))}


def test_a_step_takes_longer_with_recomputation_a_pipeline_and_a_lower_share_of_the_peak() -> None:
    found = {(f.layout.tp, f.layout.pp, f.layout.recompute, f.layout.micro_batch_size): f for f in find_layouts(task())}
    plain = found[2, 1, "none", 1].step_seconds
    assert found[2, 1, "full", 1].step_seconds == pytest.approx(plain / 0.75)
    assert found[2, 2, "none", 1].step_seconds == pytest.approx(plain * (1 + 1 / 16))
    slow = find_layouts(task(mfu=0.21, fixed={"tp": 2, "pp": 1, "micro_batch_size": 1}))
    assert slow[0].step_seconds == pytest.approx(plain * 2)
    assert slow[0].gpu_hours == pytest.approx(slow[0].step_seconds * 1000 * 32 / 3600)


def test_the_command_lists_by_megatrons_names(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    wanted = ("fit", str(tmp_path), "--gpus", "32", "--gpu", "h100-80gb", "--seq-length", "8192")
    done = prism(*wanted, "--global-batch-size", "128", "--tensor-model-parallel-size", "2", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["parameters"] == 8_030_261_248 and told["flops_per_token"] == pytest.approx(51.47e9, rel=1e-3)
    first = told["layouts"][0]
    assert first["fits"] and first["tensor_model_parallel_size"] == 2 and first["data_parallel_size"] == 16
    assert sum(first["memory"].values()) == pytest.approx(first["memory_gib"], abs=0.2)
    shown = prism(*wanted, COLUMNS="80")
    assert shown.returncode == 0 and "8,030,261,248 parameters" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--gpus", "32", "--tensor-model-parallel-size", "3"), 2, "does not divide the model's 32 attention heads"),
        (("--gpus", "1", "--seq-length", "8192"), 1, "Nothing fits"),
        (("--gpus", "8", "--gpu", "h100"), 2, "did you mean h100-80gb?"),
        (("--gpus", "0"), 2, "--gpus: must be a number above 0, got 0"),
        (("--gpus", "7"), 2, "128 is no multiple of 7 data-parallel replicas x micro_batch_size 1; 133 is"),
        (("--gpus", "7", "--global-batch-size", "133", "--json"), 0, '"data_parallel_size": 7'),
        (("--gpus", "6", "--global-batch-size", "1000000"), 2, "no multiple of 6"),
        (("--gpus", "100", "--global-batch-size", "1000000", "--micro-batch-size", "4"), 0, "tokens, 3 steps"),
        (
            ("--gpus", "8", "--seq-length", "8191", "--tensor-model-parallel-size", "2"),
            2,
            "do not divide seq_length 8191",
        ),
        (("--gpus", "8", "--seq-length", "131073"), 2, "131073 is beyond the 131072 positions of"),
        (("--gpus", "8", "--precision", "fp32"), 0, "no public run tells how fast fp32 is"),
        (("--gpus", "13", "--gpus-per-node", "5", "--json"), 2, "no multiple of 13 data-parallel replicas"),
        (("--gpus", "8", "--tokens", "nan"), 2, "--tokens: must be a number above 0, got nan"),
        (("--gpus", "8", "--tokens", "inf"), 2, "--tokens: must be a number above 0, got inf"),
        (("--gpus", "8", "--gpu-memory-gib", "nan"), 2, "--gpu-memory-gib: must be a number above 0"),
        (("--gpus", "8", "--mfu", "nan"), 2, "--mfu: must be a number above 0"),
        (("--gpus", "8", "--mfu", "40"), 2, "a share of the peak"),
    ],
)
def test_the_commands_exit_code_says_whether_anything_fits(
    words: tuple[str, ...], code: int, message: str, tmp_path: Any
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    done = prism("fit", str(tmp_path / "config.json"), *words)
    assert done.returncode == code and message in done.stdout + done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", [path.stem for path in sorted((CHECKOUT / "recipes" / "models").glob("*.yaml"))])
def test_every_shipped_model_has_layouts_and_its_parameters(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """That the parameters are transformers' own, one by one, is held in tests/models/test_published.py."""
    shape = shape_of(read_model(name).config)
    length = str(min(8192, shape.max_position_embeddings))
    code = main(["fit", name, "--gpus", "64", "--seq-length", length, "--global-batch-size", "64", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert code == 0 and told["parameters"] == parameter_count(shape)
    for f in told["layouts"]:
        sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
        assert math.prod(f[size] for size in sizes) * f["data_parallel_size"] == 64
        assert f["fits"] is (f["memory_gib"] <= 0.95 * 79.2) and f["step_seconds"] > 0
    ordered = [f["fits"] for f in told["layouts"]]
    assert ordered == sorted(ordered, reverse=True)
    assert main(["fit", name, "--gpus", "64", "--seq-length", str(shape.max_position_embeddings + 1)]) == 2
    assert f"beyond the {shape.max_position_embeddings} positions of {name}" in capsys.readouterr().err


def test_models_that_are_none_are_refused(tmp_path: Any) -> None:
    done = prism("fit", "llama-tinny", "--gpus", "1")
    assert done.returncode == 2 and "did you mean llama-tiny?" in done.stderr
    file = tmp_path / "config.json"
    for text in ("{", "[]", '{"model_type": "gpt2"}', '{"model_type": "llama"}'):
        file.write_text(text)
        done = prism("fit", str(tmp_path), "--gpus", "1")
        assert done.returncode == 2 and f"{file}: " in done.stderr
