"""Loading Hugging Face checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.errors import UserError
from launcher.workers.checkpoints import load_model, quiet


def copy_of(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target / "copy"))


def test_loads_every_tensor_in_fp32(models: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(models["a"], tmp_path)
    tensors = {name: t.bfloat16() for name, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model, tokenizer = load_model(folder)
    assert {name: t.dtype for name, t in model.state_dict().items()} == dict.fromkeys(tensors, torch.float32)
    assert all(torch.equal(t, tensors[name].float()) for name, t in model.state_dict().items())
    assert not model.training
    # Llama's own default is 2; every program must end where the tokenizer's end token comes.
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 1


def test_incomplete_checkpoints_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    quiet()
    folder = copy_of(models["a"], tmp_path)
    tensors = load_file(folder / "model.safetensors")
    lost = {n: t for n, t in tensors.items() if "layers.1.mlp" not in n}
    save_file(lost, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"not whole: model\.layers\.1\.mlp\.down_proj\.weight and 3 tensors"):
        load_model(folder)
    save_file({**tensors, "lm_head.weight": torch.ones(7, 3)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="copy"):
        load_model(folder)
    (folder / "model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="cannot load it"):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot load it"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not JSON"):
        load_model(folder)
    with pytest.raises(UserError, match="no config.json"):
        load_model(tmp_path)


def test_pickled_weights_are_not_read(models: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(models["a"], tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot load it"):
        load_model(folder)


def test_tokenizers_without_padding_or_end(models: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(models["a"], tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    model, tokenizer = load_model(folder)
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id == 1
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="names no eos_token"):
        load_model(folder)


def test_tokenizer_of_another_model_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(models["a"], tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    extra = {"id": 300, "content": "<more>", "special": False, "normalized": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    tokenizer["added_tokens"].append(extra | flags)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="301 tokens in the tokenizer, 300 in the model"):
        load_model(folder)
