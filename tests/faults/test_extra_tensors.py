"""What a file has beside the model: copies, buffers, heads of training are left out with a note, others refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.convert.__main__ import main, run
from launcher.convert.folders import open_checkpoint
from launcher.convert.torch_dist import TorchDistReader, TorchDistWriter
from launcher.errors import UserError
from launcher.models.checkpoints import obstacles
from launcher.models.torch_dist import checkpoint_dir

Checkpoints = Callable[..., Path]
Edit = Callable[[dict[str, torch.Tensor]], Any]
FAMILIES = ["llama", "Mistral-7B-v0.1", "granite-tiny", "granite-4.0-h-micro-base", "nemotron-h-tiny"]
TIED = ["llama-tied", "granite-3.3-8b-base", "granite-4.0-h-micro-base"]
EXTRA: dict[str, dict[str, torch.Tensor]] = {
    "rotary of each layer": {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(6) for i in range(2)},
    "rotary of the model": {"model.rotary_emb.inv_freq": torch.ones(6), "rope.freqs": torch.ones(6)},
    "masks": {
        "model.layers.0.self_attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        "model.layers.0.attn.masked_bias": torch.tensor(-1e4),
    },
    "counters": {
        "model.embeddings.position_ids": torch.arange(8)[None],
        "model.norm.num_batches_tracked": torch.tensor(3),
    },
    "several tokens": {"mtp.layers.0.eh_proj.weight": torch.ones(4, 8), "model.mtp.norm.weight": torch.ones(4)},
    "several tokens, as one more layer": {
        "model.layers.99.eh_proj.weight": torch.ones(4, 8),
        "model.layers.99.self_attn.q_proj.weight": torch.ones(4, 4),
    },
    "a head of values": {"v_head.summary.weight": torch.ones(1, 4), "v_head.summary.bias": torch.zeros(1)},
    "a classifier": {"score.weight": torch.ones(2, 4)},
}


def edited(source: Path, target: Path, edit: Edit) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def with_copy(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = next(t for n, t in tensors.items() if n.endswith("embed_tokens.weight")).clone()


def same_tensors(a: Path, b: Path) -> bool:
    x, y = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


@pytest.mark.parametrize("name", FAMILIES)
def test_buffers_and_heads_are_left_out_with_a_note(name: str, hf_checkpoint: Checkpoints, tmp_path: Path) -> None:
    source = hf_checkpoint(name)
    for number, (kind, extra) in enumerate(EXTRA.items()):
        folder = edited(source, tmp_path / f"{number}", lambda t, extra=extra: t.update(extra))  # type: ignore[misc]
        record = run(folder, tmp_path / f"{number}-out", "megatron")
        noted = json.loads((tmp_path / f"{number}-out" / "conversion.json").read_text())["notes"]
        assert noted == record["notes"]
        assert any(next(iter(extra)) in note and note.startswith(f"{len(extra)} ") for note in noted), kind
        assert record["round_trip"] == "bit-exact"
    run(tmp_path / "0-out", tmp_path / "back", "hf")
    assert same_tensors(tmp_path / "back", source)


@pytest.mark.parametrize("name", TIED)
@pytest.mark.parametrize("to", ["megatron", "nemo"])
def test_a_tied_copy_is_taken_either_way_round(
    name: str, to: str, hf_checkpoint: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = hf_checkpoint(name, "bfloat16")
    both = edited(source, tmp_path / "both", with_copy)
    fold = ["--fold-multipliers"] if name.startswith("granite") else []
    if to == "nemo" and "4.0" in name:
        assert main([str(both), str(tmp_path / "x"), "--to", to, *fold]) == 2  # NeMo has no hybrid models
        return
    flags = ["--to", to, *(fold if to == "nemo" else [])]
    assert main([str(both), str(tmp_path / "a"), *flags]) == 0
    assert "lm_head.weight is a copy of model.embed_tokens.weight" in capsys.readouterr().out

    def head_alone(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    assert main([str(edited(source, tmp_path / "head", head_alone)), str(tmp_path / "b"), *flags]) == 0
    assert "lm_head.weight was taken for model.embed_tokens.weight" in capsys.readouterr().out
    for made in ("a", "b"):
        run(tmp_path / made, tmp_path / f"{made}-hf", "hf")
        assert same_tensors(tmp_path / f"{made}-hf", source)


def test_a_copy_of_another_type_with_the_same_values_is_one(hf_checkpoint: Checkpoints, tmp_path: Path) -> None:
    def wide_copy(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].float()

    folder = edited(hf_checkpoint("llama-tied", "bfloat16"), tmp_path / "wide", wide_copy)
    assert run(folder, tmp_path / "out", "megatron")["tensors_in_source"] == len(
        load_file(folder / "model.safetensors")
    )


@pytest.mark.parametrize("name", TIED)
def test_a_tied_copy_that_differs_is_refused_by_name(name: str, hf_checkpoint: Checkpoints, tmp_path: Path) -> None:
    def other(tensors: dict[str, torch.Tensor]) -> None:
        with_copy(tensors)
        tensors["lm_head.weight"][17, 3] += 1

    folder = edited(hf_checkpoint(name), tmp_path / "other", other)
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight, to which config"):
        run(folder, tmp_path / "out", "megatron")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["llama-tied", "granite-4.0-h-micro-base"])
@pytest.mark.parametrize("differs", [False, True])
def test_torch_dist_with_an_output_layer_beside_its_embedding(
    name: str, differs: bool, hf_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """As Megatron-LM's converters write it, with a rotary table and heads; a copy may have other padding."""
    run(hf_checkpoint(name), tmp_path / "plain", "megatron")
    found = open_checkpoint(tmp_path / "plain")
    reader = found.reader
    tensors = {n: reader.read(n) for n in reader.entries}
    rows = found.shape.vocab_size
    copy = tensors["embedding.word_embeddings.weight"][:rows].clone()
    copy[5, 5] += 1 if differs else 0
    tensors |= {"output_layer.weight": copy, "rotary_pos_emb.inv_freq": torch.ones(4), "rm_head.weight": torch.ones(1)}
    rewrite(tmp_path / "plain", tensors, stacked=found.shape.hybrid_override_pattern is None)
    if differs:
        with pytest.raises(UserError, match=r"output_layer\.weight differs from embedding\.word_embeddings\.weight"):
            run(tmp_path / "plain", tmp_path / "out", "hf")
        return
    notes = run(tmp_path / "plain", tmp_path / "out", "hf")["notes"]
    assert [note.split()[0] for note in notes] == ["output_layer.weight", "1", "1"]
    assert same_tensors(tmp_path / "out", hf_checkpoint(name))


def rewrite(folder: Path, tensors: dict[str, torch.Tensor], stacked: bool) -> None:
    from launcher.convert.entry import Entry

    target = checkpoint_dir(folder)
    shutil.rmtree(target)
    entries = {n: Entry(tuple(t.shape), t.dtype) for n, t in tensors.items()}
    writer = TorchDistWriter(target, entries, stacked=stacked)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()


def test_what_could_change_the_model_is_refused(hf_checkpoint: Checkpoints, tmp_path: Path) -> None:
    for number, name in enumerate(
        ("model.layers.0.self_attn.q_proj.bias", "lm_head.bias", "model.layers.0.self_attn.bias", "model.more.weight")
    ):
        folder = edited(hf_checkpoint("llama"), tmp_path / f"{number}", lambda t, n=name: t.update({n: torch.ones(48)}))  # type: ignore[misc]
        with pytest.raises(UserError, match="is no tensor of this model"):
            run(folder, tmp_path / "out", "megatron")


def test_merges_leave_them_out_of_either_side(hf_checkpoint: Checkpoints, tmp_path: Path) -> None:
    source = hf_checkpoint("granite-3.3-8b-base")
    rich = edited(source, tmp_path / "rich", lambda t: (with_copy(t), t.update(EXTRA["rotary of each layer"])))
    for number, pair in enumerate([(source, rich), (rich, source)]):
        target = tmp_path / f"merged-{number}"
        assert main(["merge", *map(str, pair), "--weights", "0.5,0.5", "-o", str(target)]) == 0
        assert same_tensors(target, source)
        notes = json.loads((target / "conversion.json").read_text())["notes"]
        assert [note.startswith(f"{rich}: ") for note in notes] == [True, True]
    other = edited(rich, tmp_path / "other", lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(UserError, match=r"lm_head\.weight differs from"):
        from launcher.convert.merge import merge

        merge([source, other], [0.5, 0.5], tmp_path / "never")


def test_a_diff_leaves_them_out_of_either_side(hf_checkpoint: Checkpoints, tmp_path: Path) -> None:
    source = hf_checkpoint("llama-tied")
    rich = edited(source, tmp_path / "rich", lambda t: (with_copy(t), t.update(EXTRA["rotary of each layer"])))
    elements = sum(t.numel() for t in load_file(source / "model.safetensors").values())
    for pair in ((source, rich), (rich, source), (rich, rich)):
        done = subprocess.run(
            [sys.executable, "-m", "launcher.workers.weight_diff", *map(str, pair), "--json"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert {(row["elements"], row["bits_changed_fraction"]) for row in found["weights"]} == {(elements, 0.0)}
        assert any(note.startswith(f"{rich}: lm_head.weight is a copy") for note in found["notes"])
    other = edited(rich, tmp_path / "other", lambda t: t["lm_head.weight"].add_(1))
    from launcher.workers.weight_diff import weight_change

    with pytest.raises(UserError, match=r"other: lm_head\.weight differs from model\.embed_tokens\.weight"):
        weight_change(source, other)


def test_models_that_transformers_loads_are_looked_at_first(
    hf_checkpoint: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It drops what it does not know without a word."""
    from launcher.workers.checkpoints import load_model, quiet

    quiet()
    rich = edited(hf_checkpoint("llama-tied"), tmp_path / "rich", with_copy)
    load_model(rich)
    assert f"{rich}: lm_head.weight is a copy of model.embed_tokens.weight" in capsys.readouterr().out
    other = edited(rich, tmp_path / "other", lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(UserError, match=r"lm_head\.weight differs from"):
        load_model(other)
    biased = edited(rich, tmp_path / "biased", lambda t: t.update({"lm_head.bias": torch.ones(300)}))
    with pytest.raises(UserError, match=r"lm_head\.bias \[300\] float32 is no tensor of this model"):
        load_model(biased)


WRAPPED: dict[str, tuple[Callable[[str], str], str]] = {
    "compiled": (lambda n: f"_orig_mod.{n}", "names in all carry _orig_mod., put in by torch.compile"),
    "parallel": (lambda n: f"module.{n}", "names in all carry module., put in by"),
    "both": (lambda n: f"module._orig_mod.{n}", "names in all carry module. and _orig_mod., put in by"),
    "inside": (
        lambda n: n.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
        "names in all carry _checkpoint_wrapped_module., put in by",
    ),
    "a larger model": (lambda n: f"language_model.{n}", "lie under language_model., in another model; save that part"),
    "no language head": (lambda n: n.removeprefix("model."), "lack model. before them, as of a model without its"),
    "an adapter": (lambda n: f"base_model.model.{n}".replace("q_proj.", "q_proj.lora_A."), "are an adapter's; merge"),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_names_of_wrappers_are_refused_once_with_the_mend(
    case: str, hf_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    rename, message = WRAPPED[case]

    def wrap(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[rename(name)] = tensors.pop(name)

    folder = edited(hf_checkpoint("llama-tied"), tmp_path / "wrapped", wrap)
    with pytest.raises(UserError) as error:
        run(folder, tmp_path / "out", "megatron")
    (problem,) = error.value.problems
    assert message in problem and str(folder) in problem
    assert not (tmp_path / "out").exists()


def test_a_trainer_reads_what_it_starts_from_first(hf_checkpoint: Checkpoints, tmp_path: Path) -> None:
    """A model that ties its output weights would start from other ones than the file's."""
    from launcher.convert.folders import check_beside

    run(hf_checkpoint("llama-tied"), tmp_path / "plain", "megatron")
    assert check_beside(tmp_path / "plain") == ()
    reader = TorchDistReader(tmp_path / "plain" / "release", open_files(tmp_path / "plain" / "release"))
    tensors = {n: reader.read(n) for n in reader.entries}
    tensors["output_layer.weight"] = tensors["embedding.word_embeddings.weight"] + 1
    rewrite(tmp_path / "plain", tensors, stacked=True)
    with pytest.raises(UserError, match=r"output_layer\.weight differs from embedding\.word_embeddings\.weight"):
        check_beside(tmp_path / "plain")


def open_files(folder: Path) -> Any:
    from launcher.models.spans import directly_in

    return directly_in(folder)


def test_one_file_and_an_index_of_others_are_two_models(tmp_path: Path, hf_checkpoint: Checkpoints) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(hf_checkpoint("llama"), folder)
    found = load_file(folder / "model.safetensors")
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(found, "model-00001-of-00001.safetensors")}))
    assert len(obstacles(folder)) == 1 and "remove the one that is not the model" in obstacles(folder)[0]
    (folder / "model.safetensors").unlink()
    assert obstacles(folder) == []
    save_file({"x": torch.ones(2)}, folder / "consolidated.safetensors")
    notes = run(folder, tmp_path / "made", "megatron")["notes"]
    assert notes == ["files of tensors beside the model were not read: consolidated.safetensors"]


def test_plain_tensors_under_a_config_of_few_bits_are_refused(tmp_path: Path, hf_checkpoint: Checkpoints) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(hf_checkpoint("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    (problem,) = obstacles(folder)
    assert "its tensors are plain, and config.json has a quantization_config" in problem
