"""What a job would refuse by the headers of a checkpoint is refused by `check`, in the same words, and bounded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_checkpoints import CONFIGS

from launcher.cli import main as prism
from launcher.convert.__main__ import main as convert
from launcher.convert.__main__ import run

Checkpoints = Callable[..., Path]
Change = Callable[[Path], Any]
TRAIN = {
    "kind": "train", "checkpoint": "./src", "data": {"prepare/t": 1.0}, "seq_length": 32, "global_batch_size": 2,
    "micro_batch_size": 2, "train_iters": 2, "lr": 1e-3, "precision": "fp32",
}  # fmt: skip


def config(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        path = next(p for p in (folder / "hf" / "config.json", folder / "config.json") if p.exists())
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def change(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        edit(found)
        save_file(found, folder / "model.safetensors")

    return change


def renamed(rename: Callable[[str], str]) -> Change:
    return tensors(lambda t: [t.__setitem__(rename(n), t.pop(n)) for n in list(t)])


def fp8(found: dict[str, torch.Tensor]) -> None:
    for name in [n for n in found if n.endswith("_proj.weight")]:
        found[name] = found[name].to(torch.float8_e4m3fn)
        found[f"{name}_scale"] = torch.ones(1)


def classifier(found: dict[str, torch.Tensor]) -> None:
    del found["lm_head.weight"]
    found["score.weight"] = torch.ones(2, 48)


def mistral3(folder: Path) -> None:
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({"model_type": "mistral3", "text_config": {**text, "model_type": "mistral"}, "vision_config": {}})
    )


def adapter_beside_config(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')


def packed(found: dict[str, torch.Tensor]) -> None:
    for name in [n for n in found if n.endswith("_proj.weight")]:
        del found[name]
        found[f"{name}_packed"] = torch.ones(4, 4, dtype=torch.int32)


def index(folder: Path) -> None:
    names = {n: f"model-{i % 40:05d}.safetensors" for i, n in enumerate(f"t{i}" for i in range(400))}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


NORM = "model.layers.1.input_layernorm.weight"
HF: dict[str, tuple[Change, str]] = {
    "eight bits": (tensors(fp8), "is of type F8_E4M3; only F64, F32, F16, BF16 are covered"),
    "four bits, packed": (tensors(packed), "_packed is of type I32; only F64"),
    "a classifier": (tensors(classifier), "lm_head.weight [300, 48] is missing; config.json does not tie it"),
    "compiled": (renamed(lambda n: f"_orig_mod.{n}"), "names in all carry _orig_mod."),
    "images and text": (mistral3, "model type mistral3 is not covered; there is llama, mistral, granite"),
    "an adapter and a config": (adapter_beside_config, "an adapter (adapter_config.json) and no whole model; merge it"),
    "shards are missing": (index, "model-00000.safetensors: not there, though model.safetensors.index.json names it"),
    "a tensor is missing": (tensors(lambda t: t.pop(NORM)), f"{NORM} [48] is missing"),
    "a wrong shape": (tensors(lambda t: t.update({NORM: torch.ones(47)})), f"{NORM} is [47], config.json makes it"),
    "an unknown tensor": (tensors(lambda t: t.update(more=torch.ones(3))), "more [3] float32 is no tensor of"),
    "another RoPE": (config(rope_parameters={"rope_type": "yarn"}), "RoPE of type yarn is not covered"),
    "cut short": (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 90), "not a whole safetensors file"),
    "a byte is missing": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1]),
        "not a whole safetensors file",
    ),
}


def recipe(folder: Path, model: str, **stages: Any) -> Path:
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text("words")
    family = str(CONFIGS[model]["model_type"])
    prepare = {
        "kind": "prepare", "tokenizer": {"path": "tok"}, "sources": {"t": {"kind": "files", "path": "text/"}},
        "problems": {"p": {"count": 16}},
    }  # fmt: skip
    path = folder / "r.yaml"
    body = {
        "model": {"name": "x", "family": family, "config": CONFIGS[model]},
        "stages": {"prepare": prepare, **stages},
    }
    path.write_text(yaml.safe_dump(body, sort_keys=False))
    return path


@pytest.fixture
def folder(tmp_path: Path, hf_checkpoint: Checkpoints) -> Path:
    shutil.copytree(hf_checkpoint("llama"), tmp_path / "tok", ignore=shutil.ignore_patterns("*.safetensors", "config*"))
    shutil.copytree(hf_checkpoint("llama"), tmp_path / "src")
    return tmp_path


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    out, errors = capsys.readouterr()
    return (out + errors).splitlines()


def test_a_whole_checkpoint_passes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prism(["check", str(recipe(folder, "llama", train=TRAIN))]) == 0, said(capsys)


@pytest.mark.parametrize("case", HF)
def test_check_says_what_convert_says(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = HF[case]
    change(folder / "src")
    assert convert([str(folder / "src"), str(folder / "dst"), "--to", "megatron"]) == 2
    by_convert = [line.removeprefix("prism-launch: ") for line in said(capsys)]
    assert message in "\n".join(by_convert)
    path = recipe(folder, "llama", train=TRAIN)
    for command in ("check", "plan"):
        assert prism([command, str(path)]) == 2
        lines = said(capsys)
        assert any(message in line and f"{path}:" in line and "stages.train.checkpoint" in line for line in lines)
        assert len(lines) <= 25 and len(by_convert) <= 21
    for line in (line for line in by_convert if not line.endswith(" more")):  # each counts in its own list
        if "image" not in case and "adapter" not in case:
            assert any(line in told for told in lines), (line, lines)


def lose_data(folder: Path) -> None:
    (folder / "release" / "__0_0.distcp").unlink()


def evil(folder: Path) -> None:
    (folder / "release" / ".metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR.")


MEGATRON: dict[str, tuple[Change, str]] = {
    "data gone": (lose_data, "__0_0.distcp: not there, though .metadata names it"),
    "data cut": (lambda f: (f / "release" / "__0_0.distcp").write_bytes(b"x"), "__0_0.distcp: 1 bytes,"),
    "foreign code": (evil, ".metadata: refused: it names os.system, which is no part of a checkpoint"),
    "more layers": (config(num_hidden_layers=3), "num_layers is 3, the stage's model has 2"),
    "more layers, and tensors": (
        config(num_hidden_layers=3),
        "layers.2.mlp.linear_fc1.weight [128, 48] is mis",
    ),
    "another vocabulary": (config(vocab_size=512), "embedding.word_embeddings.weight is [384, 48], config.json makes"),
    "no config": (lambda f: (f / "hf" / "config.json").unlink(), "no hf/config.json in it"),
    "no such iteration": (
        lambda f: (f / "latest_checkpointed_iteration.txt").write_text("7"),
        "iter_0000007: named by latest_checkpointed_iteration.txt",
    ),
}


@pytest.mark.parametrize("case", MEGATRON)
def test_a_megatron_checkpoint_is_looked_at_too(
    case: str, folder: Path, hf_checkpoint: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(folder / "src")
    run(hf_checkpoint("llama"), folder / "src", "megatron")
    path = recipe(folder, "llama", train=TRAIN)
    assert prism(["check", str(path)]) == 0, said(capsys)
    change, message = MEGATRON[case]
    change(folder / "src")
    capsys.readouterr()
    assert prism(["check", str(path)]) == 2
    assert any(message in line and "stages.train.checkpoint" in line for line in said(capsys))


def test_the_model_that_a_stage_names_is_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(folder, "llama-tied", train=TRAIN)
    assert prism(["check", str(path)]) == 2
    assert any("kv_channels is 12, the stage's model has 16" in line for line in said(capsys))


RL = {"kind": "rl", "checkpoint": "./src", "prompts": "prepare/p", "max_steps": 1}


@pytest.mark.parametrize("case", ["eight bits", "a tensor is missing", "cut short", "an adapter and a config"])
def test_reinforcement_learning_and_evaluation_refuse_early(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate = {"kind": "evaluate", "checkpoints": ["./src"], "benchmarks": ["prepare/p"]}
    path = recipe(folder, "llama", rl={**RL, "backend": "trl"}, evaluate=evaluate)
    assert prism(["check", str(path)]) == 0, said(capsys)
    change, message = HF[case]
    change(folder / "src")
    assert prism(["check", str(path)]) == 2
    lines = said(capsys)
    assert any(message in line and "stages.rl.checkpoint" in line for line in lines)
    assert any(message in line and "stages.evaluate.checkpoints[0]" in line for line in lines)


def test_families_that_only_transformers_knows_still_pass(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config(model_type="qwen3")(folder / "src")
    assert prism(["check", str(recipe(folder, "llama", rl={**RL, "backend": "trl"}))]) == 0, said(capsys)


@pytest.mark.parametrize("name", ["granite-3.3-8b-base", "nemotron-h-tiny"])
def test_what_nemo_cannot_have_is_refused_early(
    name: str, folder: Path, hf_checkpoint: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(folder / "src")
    shutil.copytree(hf_checkpoint(name), folder / "src")
    path = recipe(folder, name, rl={**RL, "backend": "nemo-aligner", "max_prompt_length": 8})
    assert prism(["check", str(path)]) == 2
    message = "NeMo has no setting for its multipliers" if "granite" in name else "does not go into format nemo"
    assert any(message in line and "stages.rl.checkpoint" in line for line in said(capsys))
    profile = folder / "site.yaml"
    profile.write_text("scheduler: slurm\npartition: gpu\n")
    words = ["convert", str(folder / "src"), str(folder / "dst"), "--to", "nemo", "--cluster", str(profile)]
    assert prism([*words, "--root", str(folder / "root")]) == 2
    assert any(message in line for line in said(capsys))
    assert not (folder / "dst").is_symlink()


def test_advice_is_said_once_and_mends(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors(fp8)(folder / "src")
    for method, words in (
        ("compressed-tensors", "CompressedTensorsConfig(run_compressed=False)"),
        ("fp8", "FineGrainedFP8Config(dequantize=True)"),
        ("gptq", "config.json says gptq"),
    ):
        config(quantization_config={"quant_method": method})(folder / "src")
        assert convert([str(folder / "src"), str(folder / "dst"), "--to", "megatron"]) == 2
        assert [words in line for line in said(capsys)].count(True) == 1
    mistral3(folder / "src")
    assert convert([str(folder / "src"), str(folder / "dst"), "--to", "megatron"]) == 2
    (line,) = said(capsys)
    assert "Its text_config is of model type mistral, which is: save that part alone" in line


def test_an_adapter_alone_is_told_as_such(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter_beside_config(folder / "src")
    (folder / "src" / "config.json").unlink()
    path = recipe(folder, "llama", train=TRAIN)
    for words in (
        ["check", str(path)],
        ["fit", str(folder / "src"), "--gpus", "8", "--gpu", "h100-80gb", "--seq-length", "64"],
    ):
        assert prism(words) == 2
        assert any(
            "src: an adapter (adapter_config.json) and no whole model; merge it" in line for line in said(capsys)
        )
    assert convert([str(folder / "src"), str(folder / "dst"), "--to", "megatron"]) == 2
    assert any("an adapter (adapter_config.json) and no whole model" in line for line in said(capsys))
