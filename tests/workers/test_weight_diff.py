"""Weight change between checkpoints, against the formulas written out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.errors import UserError
from launcher.workers import weight_diff
from launcher.workers.weight_diff import (
    THRESHOLDS,
    compare,
    describe,
    module_rows,
    rows,
    run_by_hand,
    tensor_files,
    weight_change,
)


def naive(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> dict[str, float]:
    """The measures of two models, over all elements at once."""
    a = np.concatenate([before[k].ravel() for k in sorted(before)]).astype(np.float32)
    b = np.concatenate([after[k].ravel() for k in sorted(before)]).astype(np.float32)
    change = np.abs(b - a)
    found = {str(t): float(np.mean(change > np.float32(t) * np.abs(a))) for t in THRESHOLDS}
    found["l2"] = float(np.linalg.norm((b - a).astype(np.float64)) / np.linalg.norm(a.astype(np.float64)))
    return found | {"bits": float(np.mean(a != b)), "largest": float(change.max()), "elements": a.size}


def random_pair(seed: int, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Two models: relative changes from 1e-5 to 1, some weights zero before, some untouched."""
    generator = torch.Generator().manual_seed(seed)
    before, after = {}, {}
    for name, shape in (("model.layers.0.mlp.up_proj.weight", (37, 41)), ("model.norm.weight", (19,)), ("s", ())):
        old = torch.randn(shape, generator=generator)
        old = torch.where(torch.rand(shape, generator=generator) < 0.1, 0.0, old)
        size = 10 ** (5 * torch.rand(shape, generator=generator) - 5)
        new = old * (1 + size) + (old == 0) * size
        new = torch.where(torch.rand(shape, generator=generator) < 0.3, old, new)
        before[name], after[name] = old.to(dtype), new.to(dtype)
    return before, after


def write(folder: Path, tensors: dict[str, torch.Tensor], name: str = "model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / name)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("piece", [1 << 22, 100])
def test_all_measures_are_those_of_the_formulas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, piece: int
) -> None:
    monkeypatch.setattr(weight_diff, "_PIECE", piece)
    before, after = random_pair(piece, dtype)
    whole, _ = weight_change(write(tmp_path / "a", before), write(tmp_path / "b", after))
    wanted = naive(*({k: t.float().numpy() for k, t in m.items()} for m in (before, after)))
    found = rows(whole, {"from": "a", "to": "b"})
    assert [r["threshold"] for r in found] == list(THRESHOLDS)
    for row in found:
        assert row["changed_fraction"] == pytest.approx(wanted[str(row["threshold"])], abs=1e-12)
        assert row["relative_l2"] == pytest.approx(wanted["l2"], rel=1e-6)
        assert row["bits_changed_fraction"] == wanted["bits"]
        assert row["largest_change"] == pytest.approx(wanted["largest"])
        assert (row["elements"], row["from"], row["to"]) == (wanted["elements"], "a", "b")
    fractions = [r["changed_fraction"] for r in found]
    assert fractions == sorted(fractions, reverse=True)
    assert 0 < fractions[-1] < fractions[0] < 1


def test_zeros_and_bounds() -> None:
    before = torch.tensor([0.0, 0.0, -0.0, 1.0, 1.0, 1.0, -2.0])
    after = torch.tensor([0.0, 1e-30, 0.0, 1.0, 1.5, 1.25, -2.5])
    change = compare(before, after, (0.25, 0.5))
    # More than the threshold, not equal to it; a zero that became anything has changed; -0 is 0.
    assert change.changed == [2, 1]
    assert (change.bits, change.elements) == (4, 7)
    nothing = compare(torch.zeros(3), torch.ones(3), (0.25,))
    assert (nothing.changed, nothing.relative_l2) == ([3], None)
    same = compare(before, before.clone(), (0.25,))
    assert (same.changed, same.bits, same.relative_l2, same.largest) == ([0], 0, 0.0, 0.0)
    assert compare(torch.zeros(0, 4), torch.zeros(0, 4), (0.1,)).elements == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, value: float) -> None:
    before, after = random_pair(0, torch.float32)
    after["model.norm.weight"][3] = value
    with pytest.raises(UserError, match=r"model\.norm\.weight in .*nan or infinity"):
        weight_change(write(tmp_path / "a", before), write(tmp_path / "b", after))


def test_sharded_folders_compare_with_whole_ones(tmp_path: Path) -> None:
    before, after = random_pair(1, torch.float32)
    whole, _ = weight_change(write(tmp_path / "a", before), write(tmp_path / "b", after))
    names = sorted(after)
    write(tmp_path / "c", {names[0]: after[names[0]]}, "model-1.safetensors")
    write(tmp_path / "c", {n: after[n] for n in names[1:]}, "model-2.safetensors")
    write(tmp_path / "c", {"other": torch.ones(2)}, "consolidated.safetensors")
    index = {n: "model-1.safetensors" if n == names[0] else "model-2.safetensors" for n in names}
    (tmp_path / "c" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert weight_change(tmp_path / "a", tmp_path / "c")[0] == whole
    (tmp_path / "c" / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-2\.safetensors: not there, though"):
        tensor_files(tmp_path / "c")
    (tmp_path / "c" / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match="not an index of safetensors files"):
        tensor_files(tmp_path / "c")


def test_folders_that_cannot_be_compared(tmp_path: Path) -> None:
    before, after = random_pair(2, torch.float32)
    a = write(tmp_path / "a", before)
    b = write(
        tmp_path / "b", {**{k: t for k, t in after.items() if k != "s"}, "more": torch.ones(2), "x": torch.ones(1)}
    )
    with pytest.raises(UserError) as caught:
        weight_change(a, b)
    assert f"{a}: s and 1 in all" in str(caught.value)
    assert f"{b}: more and 2 in all" in str(caught.value)
    c = write(tmp_path / "c", {**after, "model.norm.weight": torch.ones(20)})
    with pytest.raises(UserError, match=r"model\.norm\.weight: \[19\] in .*, \[20\] in "):
        weight_change(a, c)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: holds no \.safetensors file"):
        weight_change(a, tmp_path / "empty")
    (c / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match="not readable as safetensors"):
        weight_change(a, c)


def test_modules_of_every_family(models: dict[str, Path]) -> None:
    llama = {describe(name)[1] for name in tensor_files(models["a"])}
    assert llama == {"embedding", "attention", "mlp", "norm", "lm_head"}
    by_layer: dict[int | None, set[str]] = {}
    for name in tensor_files(models["nemotron"]):
        layer, module = describe(name)
        by_layer.setdefault(layer, set()).add(module)
    kinds = {"M": "mamba", "-": "mlp", "*": "attention"}
    for layer, kind in enumerate("M-M*M-"):
        assert by_layer[layer] == {kinds[kind], "norm"}
    assert by_layer[None] == {"embedding", "norm", "lm_head"}
    hybrid = {
        "model.layers.3.mamba.in_proj.weight": (3, "mamba"),
        "model.layers.3.mamba.D": (3, "mamba"),
        "model.layers.11.self_attn.o_proj.weight": (11, "attention"),
        "model.layers.2.shared_mlp.input_linear.weight": (2, "mlp"),
        "model.layers.2.post_attention_layernorm.weight": (2, "norm"),
        "model.rotary.inv_freq": (None, "other"),
    }
    assert {name: describe(name) for name in hybrid} == hybrid


def test_modules_sum_to_the_whole(models: dict[str, Path]) -> None:
    whole, parts = weight_change(models["a"], models["b"])
    tensors = load_file(models["a"] / "model.safetensors")
    assert sum(p.elements for p in parts.values()) == whole.elements == sum(t.numel() for t in tensors.values())
    for i in range(len(THRESHOLDS)):
        assert sum(p.changed[i] for p in parts.values()) == whole.changed[i]
    found = module_rows(parts, {"from": "a", "to": "b"})
    assert {r["threshold"] for r in found} == {0.01}
    keys = [(r["layer"], r["module"]) for r in found]
    assert len(keys) == len(set(keys)) == len(parts)
    assert keys[0] == (0, "attention")
    assert keys[-1][0] is None


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher.workers.weight_diff", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])


def test_by_hand(models: dict[str, Path]) -> None:
    done = run(str(models["a"]), str(models["b"]), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    whole, parts = weight_change(models["a"], models["b"])
    head = {"from": str(models["a"]), "to": str(models["b"])}
    assert found == {"weights": rows(whole, head), "weights_by_module": module_rows(parts, head)}


def test_mistakes_by_hand_are_text_and_exit_code_2(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_by_hand(lambda: weight_diff.main([str(models["a"]), str(tmp_path), "--json"])) == 2
    out, errors = capsys.readouterr()
    assert out == ""
    assert errors == f"prism-launch: {tmp_path}: holds no .safetensors file; a Hugging Face checkpoint is wanted\n"


def test_text_by_hand(models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert weight_diff.main([str(models["a"]), str(models["b"])]) == 0
    lines = capsys.readouterr().out.splitlines()
    whole, parts = weight_change(models["a"], models["b"])
    assert lines[0] == f"{whole.elements} elements, relative L2 {whole.relative_l2:.3g}"
    assert f"  changed by more than 1.0%: {whole.changed[2] / whole.elements:.2%}" in lines
    assert len(lines) == 2 + len(THRESHOLDS) + 1 + len(parts)


def test_a_file_where_a_folder_is_wanted_is_a_users_mistake(
    models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = models["a"] / "model.safetensors"
    assert run_by_hand(lambda: weight_diff.main([str(file), str(models["a"])])) == 2
    assert capsys.readouterr().err.startswith(f"prism-launch: {file}: holds no .safetensors file")


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    assert run_by_hand(main) == 2
    assert capsys.readouterr().err == f"prism-launch: {tmp_path}: Permission denied\n"
