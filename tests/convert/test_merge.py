"""Linear combinations of checkpoints: the numbers, the format kept, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.convert import merge as merging
from launcher.convert.__main__ import main, run
from launcher.convert.hf import HfWriter
from launcher.convert.merge import combine, merge
from launcher.errors import UserError, WorldError


@pytest.fixture
def pair(tmp_path: Path, hf_checkpoint: Callable[..., Path]) -> tuple[Path, Path]:
    """Two checkpoints of one model."""
    a = hf_checkpoint("llama", "bfloat16")
    b = shutil.copytree(a, tmp_path / "b")
    generator = torch.Generator().manual_seed(5)
    tensors = load_file(a / "model.safetensors")
    changed = {n: (t.float() + torch.randn(t.shape, generator=generator)).bfloat16() for n, t in tensors.items()}
    save_file(changed, b / "model.safetensors", {"format": "pt"})
    return a, b


def folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize("weights", [(0.15, 0.85), (1.0, -0.5), (0.3, 0.3)])
def test_the_sum_is_made_in_fp32_and_rounded_once(
    weights: tuple[float, float], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    record = merge(pair, weights, folder(tmp_path / "out"))
    a, b, found = (load_file(p / "model.safetensors") for p in (*pair, tmp_path / "out"))
    assert found.keys() == a.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, (a[name].float() * weights[0] + b[name].float() * weights[1]).bfloat16()), name
    assert (tmp_path / "out" / "config.json").read_bytes() == (pair[0] / "config.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert record["tensors_read"] == 2 * record["tensors_written"] == 42
    assert record["read_back"] == "the bytes that were computed"


def test_all_of_one_and_nothing_of_the_other_is_the_one(pair: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = load_file(pair[1] / "model.safetensors")
    tensors["model.norm.weight"][:2] = torch.tensor([-0.0, float("nan")])
    save_file(tensors, pair[1] / "model.safetensors", {"format": "pt"})
    merge(pair, (1.0, 0.0), folder(tmp_path / "first"))
    merge(pair, (0.0, 1.0), folder(tmp_path / "second"))
    for source, name in zip(pair, ("first", "second"), strict=True):
        assert (tmp_path / name / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_megatrons_format_gives_the_same_sum(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for number, source in enumerate(pair):
        run(source, tmp_path / f"m{number}", "megatron")
    merge([tmp_path / "m0", tmp_path / "m1"], (0.15, 0.85), folder(tmp_path / "merged"))
    run(tmp_path / "merged", tmp_path / "hf", "hf")
    merge(pair, (0.15, 0.85), folder(tmp_path / "wanted"))
    files = [tmp_path / name / "model.safetensors" for name in ("hf", "wanted")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_tensor_larger_than_a_piece_is_summed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "_PIECE", 7)
    tensors = [torch.randn(5, 9, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    wanted = tensors[0] * 2.0 + tensors[1] * 0.5 + tensors[2] * -1.0
    torch.testing.assert_close(combine(tensors, (2.0, 0.5, -1.0)), wanted)


def test_the_command(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = map(str, pair)
    assert main(["merge", a, b, "--weights", "0.15,0.85", "-o", str(tmp_path / "out")]) == 0
    assert "42 tensors read, 21 written" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["weights"] == [0.15, 0.85]
    for weights, message in (
        ("half", "--weights: half is not numbers"),
        ("nan,1", "--weights: nan,1 is not numbers"),
        ("1,inf", "--weights: 1,inf is not numbers"),
        ("1", "2 checkpoints and 1 weights"),
    ):
        assert main(["merge", a, b, "--weights", weights, "-o", str(tmp_path / "no")]) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("no*"))


def test_checkpoints_that_are_not_of_one_model_are_refused(
    pair: tuple[Path, Path], tmp_path: Path, hf_checkpoint: Callable[..., Path]
) -> None:
    run(pair[0], tmp_path / "megatron", "megatron")
    for other, message in (
        (hf_checkpoint("llama-tied"), "config.json describes another model than that of"),
        (tmp_path / "megatron", "of format megatron"),
        (tmp_path / "absent", "no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            merge((pair[0], other), (0.5, 0.5), tmp_path)
    tensors = load_file(pair[1] / "model.safetensors")
    tensors["more"] = torch.ones(2)
    save_file(tensors, pair[1] / "model.safetensors")
    with pytest.raises(UserError, match=r"more \[2\] float32 is no tensor of this model"):
        merge(pair, (0.5, 0.5), tmp_path)


def test_a_wrong_bit_on_the_disk_is_found(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_add = HfWriter.add

    def add(self: Any, name: str, tensor: torch.Tensor, lane: int) -> None:
        true_add(self, name, tensor + 1 if name == "model.norm.weight" else tensor, lane)

    monkeypatch.setattr(HfWriter, "add", add)
    with pytest.raises(WorldError, match=r"model\.norm\.weight: read back, not what was computed"):
        merge(pair, (0.5, 0.5), folder(tmp_path / "out"))


def test_infinity_is_told(pair: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = load_file(pair[1] / "model.safetensors")
    tensors["model.norm.weight"][3] = float("inf")
    save_file(tensors, pair[1] / "model.safetensors", {"format": "pt"})
    assert merge(pair, (0.5, 0.5), folder(tmp_path / "out"))["not_finite"] == ["model.norm.weight"]
    assert merge(pair, (1.0, 0.0), folder(tmp_path / "first"))["not_finite"] == []
