"""A checkpoint of format nemo, folder or archive, is what a recipe's stages start from; refused as early as others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tiny_checkpoints import CONFIGS

from launcher.cli import main as prism
from launcher.convert.__main__ import run

RECIPE = """
stages:
  prepare:
    kind: prepare
    tokenizer: {path: ./hf}
    sources: {text: {kind: files, path: ./text.txt}}
    problems: {p: {count: 6}}
  mid:
    kind: train
    model: ./model.yaml
    checkpoint: ./src
    data: {prepare/text: 1.0}
    seq_length: 32
    global_batch_size: 2
    micro_batch_size: 2
    train_iters: 2
    lr: 1.0e-3
    precision: fp32
  scores:
    kind: evaluate
    checkpoints: [./src]
    benchmarks: [prepare/p]
"""
Checkpoints = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, hf_checkpoint: Checkpoints) -> Path:
    """A recipe beside checkpoints of both forms of format nemo."""
    folder = tmp_path_factory.mktemp("nemo")
    shutil.copytree(hf_checkpoint("llama"), folder / "hf")
    run(folder / "hf", folder / "folder", "nemo")
    run(folder / "hf", folder / "archive.nemo", "nemo")
    (folder / "model.yaml").write_text(yaml.safe_dump({"name": "tiny", "family": "llama", "config": CONFIGS["llama"]}))
    (folder / "text.txt").write_text("t2 t3 t4")
    (folder / "r.yaml").write_text(RECIPE)
    return folder


@pytest.fixture
def recipe(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "own")
    return tmp_path / "own" / "r.yaml"


def source(recipe: Path, name: str) -> Path:
    return (recipe.parent / name).rename(recipe.parent / "src")


def checked(recipe: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = prism(["check", str(recipe), "--cluster", "local"])
    return code, capsys.readouterr().err


@pytest.mark.parametrize("name", ["folder", "archive.nemo"])
def test_check_takes_it_and_the_plan_converts_it(recipe: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    source(recipe, name)
    assert checked(recipe, capsys) == (0, "")
    assert prism(["plan", str(recipe), "--cluster", "local", "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)
    into = {row["stage"]: row for row in plan["stages"] if row["stage"].startswith("src-")}
    assert sorted(name.rpartition("-")[2] for name in into) == ["hf", "megatron"]


def without(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def wider(folder: Path) -> None:
    config = yaml.safe_load((folder / "model_config.yaml").read_text())
    (folder / "model_config.yaml").write_text(yaml.safe_dump({**config, "hidden_size": 64}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("hf"), "no hf/config.json in it; put the model's there, or convert it first: prism-launch convert"),
        (without("model_weights/__0_0.distcp"), "__0_0.distcp: not there, though .metadata names it"),
        (without("model_weights"), "no metadata.json; save the checkpoint in torch_dist format"),
        (wider, "model_config.yaml: hidden_size is 64, config.json makes it 48"),
        (lambda f: (f / "model_weights/metadata.json").write_text('{"sharded_backend": "zarr"}'), "format zarr; only"),
    ],
)
def test_check_refuses_what_the_conversion_would(
    recipe: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], object], message: str
) -> None:
    change(source(recipe, "folder"))
    code, said = checked(recipe, capsys)
    assert code == 2 and "r.yaml:11: stages.mid.checkpoint" in said and message in said, said


def test_files_that_are_no_checkpoint_are_refused(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = source(recipe, "archive.nemo").read_bytes()
    for wrong in (content[: len(content) // 2], (recipe.parent / "hf" / "model.safetensors").read_bytes(), b""):
        (recipe.parent / "src").write_bytes(wrong)
        code, said = checked(recipe, capsys)
        assert code == 2 and "stages.mid.checkpoint" in said and "src" in said, said


def test_a_hub_is_said_to_be_not_built(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.write_text(RECIPE.replace("./src", "hf:org/model"))
    code, said = checked(recipe, capsys)
    assert code == 2 and "hf:org/model: fetching from a hub is not built yet" in said
