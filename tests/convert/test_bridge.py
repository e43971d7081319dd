"""Megatron-Bridge loads what is converted and writes it back, and what it imports converts back, bit by bit.

MEGATRON_BRIDGE_PYTHON names a Python with Megatron-Bridge, which wants another transformers than we do. It runs on a
CPU; `bridge_side.py` says what stands in for CUDA and Transformer Engine.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from tiny_checkpoints import CONFIGS, REPOSITORY

from launcher.convert.__main__ import run
from launcher.convert.entry import checksum

PYTHON = os.environ.get("MEGATRON_BRIDGE_PYTHON", "")
needs_bridge = pytest.mark.skipif(
    not PYTHON, reason="MEGATRON_BRIDGE_PYTHON is not set: a Python with Megatron-Bridge; make test-bridge"
)
SIDE = Path(__file__).with_name("bridge_side.py")
MODELS = ("Llama-3.1-8B", "llama-tied", "Mistral-7B-v0.1", "Mistral-Small-24B-Base-2501", "Nemotron-H-8B-Base-8K")


def bridge(*words: object) -> None:
    """Run Bridge's half; its output on failure."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(SIDE.parent)])}
    done = subprocess.run(
        [PYTHON, "-W", "ignore", str(SIDE), *map(str, words)], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


def as_published(source: Path, target: Path) -> Path:
    """The checkpoint with config and tokenizer as transformers 4 has them, which wrote those on the Hub."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    rope = config.pop("rope_parameters", None)
    if rope:
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    if config["model_type"] == "nemotron_h":
        # transformers 5 adds numbers of experts, which this model has none of
        config = {**CONFIGS[source.name], "architectures": config["architectures"], "dtype": config["dtype"]}
        config["auto_map"] = {
            "AutoConfig": "nemotron_h.NemotronHConfig",
            "AutoModelForCausalLM": "nemotron_h.NemotronHForCausalLM",
        }
        (target / "nemotron_h.py").write_text(_REMOTE_CODE)
    (target / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((target / "tokenizer_config.json").read_text())
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    (target / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return target


#: In place of the code that Nemotron-H's own folder has; transformers 4 knows no such model. Only names are asked for.
_REMOTE_CODE = """from transformers import PretrainedConfig, PreTrainedModel


class NemotronHConfig(PretrainedConfig):
    model_type = "nemotron_h"


class NemotronHForCausalLM(PreTrainedModel):
    config_class = NemotronHConfig
"""


def same(found: Path, wanted: Path) -> bool:
    """The same tensors, types and bits, but for what Bridge does: it leaves rows in that pad the vocabulary, and has
    Mamba's fp32 parameters in the model's type.
    """
    a, b = (load_file(folder / "model.safetensors") for folder in (found, wanted))
    assert a.keys() == b.keys()
    for name, tensor in b.items():
        rows, a[name] = a[name][len(tensor) :], a[name][: len(tensor)]
        assert not rows.any()
        if name.endswith(("A_log", ".D")):
            b[name] = tensor.to(a[name].dtype)
    return all(checksum(a[n]) == checksum(t) and a[n].dtype == t.dtype for n, t in b.items())


@needs_bridge
@pytest.mark.parametrize("name", MODELS)
def test_bridge_exports_what_was_converted(name: str, tmp_path: Path, hf_checkpoint: Callable[..., Path]) -> None:
    source = as_published(hf_checkpoint(name, "bfloat16"), tmp_path / "in")
    run(source, tmp_path / "converted", "megatron")
    bridge("export", source, tmp_path / "converted" / "release", tmp_path / "out")
    assert same(tmp_path / "out", source)


@needs_bridge
@pytest.mark.parametrize("name", MODELS)
def test_what_bridge_imports_comes_back(name: str, tmp_path: Path, hf_checkpoint: Callable[..., Path]) -> None:
    source = as_published(hf_checkpoint(name, "bfloat16"), tmp_path / "in")
    bridge("import", source, tmp_path / "imported")
    run(tmp_path / "imported", tmp_path / "out", "hf", config=source)
    assert same(tmp_path / "out", source)
    theirs = yaml.safe_load((tmp_path / "imported" / "iter_0000000" / "run_config.yaml").read_text())["model"]
    run(source, tmp_path / "converted", "megatron")
    ours = yaml.safe_load((tmp_path / "converted" / "release" / "run_config.yaml").read_text())["model"]
    theirs["hybrid_override_pattern"] = theirs.get("hybrid_layer_pattern") or theirs.get("hybrid_override_pattern")
    differ = {key for key, value in ours.items() if theirs[key] != value}
    # Bridge's window is one token longer than transformers'; its class for Mistral is this one with other defaults.
    assert differ <= {"should_pad_vocab", "make_vocab_size_divisible_by", "window_size", "_target_"}
