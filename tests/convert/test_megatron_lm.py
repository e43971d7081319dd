"""Megatron-LM's own `--load` of what is converted, and conversion of what its own `save_checkpoint` writes.

MEGATRON_LM names a checkout of core_v0.16.1. Its argument parser, builders, checkpointing and optimizer run as they
are, on a CPU; `mlm_side.py` says what stands in for CUDA and Transformer Engine.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import REPOSITORY
from torch import Tensor

from launcher.configs import ModelConfig, Parallelism, TrainConfig
from launcher.convert.__main__ import run
from launcher.convert.files import in_folder
from launcher.convert.torch_dist import TorchDistReader
from launcher.models.families import shape_of
from launcher.models.torch_dist import checkpoint_dir
from launcher.workers.megatron_arguments import Paths, script_arguments

CHECKOUT = os.environ.get("MEGATRON_LM", "")
pytestmark = pytest.mark.skipif(
    not CHECKOUT, reason="MEGATRON_LM is not set: a checkout of Megatron-LM core_v0.16.1; make test-megatron-lm"
)
#: Parts of Mamba's in_proj and conv1d, which are one tensor each in the model.
ORDER = ("z", "x", "B", "C", "dt")
SIDE = Path(__file__).with_name("mlm_side.py")
ON_A_CPU = (
    *("--mock-data", "--distributed-backend", "gloo", "--use-cpu-initialization", "--no-rope-fusion"),
    *("--no-masked-softmax-fusion", "--no-gradient-accumulation-fusion", "--no-persist-layer-norm"),
    *("--no-bias-swiglu-fusion", "--no-bias-dropout-fusion"),
    "--no-check-for-nan-in-loss-and-grad",  # which wants Megatron-LM's own loop around a step
)
TOKENS = (torch.arange(48).view(2, 24) * 7) % 300
MODELS = ("llama", "llama-tied", "Llama-3.1-8B", "Mistral-7B-v0.1", "Mistral-Small-24B-Base-2501", "nemotron-h-tiny")


def arguments(source: Path, load: Path, save: Path, tp: int = 1) -> list[str]:
    """The arguments that a train stage with an entrypoint gets, less those of data, and gloo for NCCL."""
    config = json.loads((source / "config.json").read_text())
    train = TrainConfig(
        model=ModelConfig(name="m", family=config["model_type"], config=config),
        data={"p/a": 1.0},
        train_iters=10,
        global_batch_size=1,
        seq_length=32,
        precision="fp32",
        parallelism=Parallelism(tensor_model_parallel_size=tp),
        entrypoint="pretrain_gpt.py",
    )
    shape = shape_of(config)
    if shape.family == "granite":  # its weights load too, though the script has no words for its multipliers
        plain = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}
        shape = replace(shape, attention_multiplier=None, **plain)
    words = list(script_arguments(train, shape, 7, Paths({}, source, save, load, is_start=True)))
    at = words.index("--data-path")
    return [*words[:at], *words[at + 1 :], *ON_A_CPU]


def megatron_lm(verb: str, folder: Path, words: list[str], ranks: int = 1) -> tuple[list[dict[str, Tensor]], Tensor]:
    """What Megatron-LM's model holds, rank by rank, and its logits for TOKENS."""
    folder.mkdir()
    torch.save(TOKENS, folder / "tokens")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = "pretrain_mamba.py" if "--is-hybrid-model" in words else "pretrain_gpt.py"
    command = [sys.executable, "-W", "ignore", str(SIDE), verb, CHECKOUT, str(folder / "out"), script, *words]
    running = [
        subprocess.Popen(
            command,
            env={
                **os.environ, "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "MLM_TOKENS": str(folder / "tokens"),
                "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(SIDE.parent)]),
                "CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTORCH_DISABLE_MODULE_LOAD": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    logs = [process.communicate(timeout=300)[0] for process in running]
    assert not any(p.returncode for p in running), "\n".join(logs)[-6000:]
    held = [load_file(folder / f"out.{rank}.safetensors") for rank in range(ranks)]
    return held, torch.load(folder / "out.logits")


def reference_logits(folder: Path) -> Tensor:
    """transformers', with the lower bound of dt off that Megatron does not have."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    with torch.no_grad():
        logits: Tensor = model(TOKENS).logits
    return logits


def in_files(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint under the names of the model's parameters."""
    path = checkpoint_dir(folder)
    reader = TorchDistReader(path, in_folder(path))
    whole: dict[str, dict[str, Tensor]] = {}
    for name in reader.entries:
        head, _, last = name.rpartition(".")
        joined, part = (head, last) if last in ORDER else (name, "")
        whole.setdefault(joined, {})[part] = reader.read(name)
    return {name: torch.cat([parts[k] for k in ("", *ORDER) if k in parts]) for name, parts in whole.items()}


def close(found: Tensor, wanted: Tensor) -> bool:
    found = found[..., : wanted.shape[-1]]
    return float((found - wanted).abs().max() / wanted.abs().max()) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_megatron_lm_loads_every_parameter(name: str, tmp_path: Path, hf_checkpoint: Callable[..., Path]) -> None:
    source = hf_checkpoint(name)
    run(source, tmp_path / "converted", "megatron")
    (held,), logits = megatron_lm("load", tmp_path / "run", arguments(source, tmp_path / "converted", tmp_path / "no"))
    wanted = in_files(tmp_path / "converted")
    assert held.keys() == wanted.keys()
    assert [n for n, t in wanted.items() if not torch.equal(held[n], t)] == []
    assert close(logits, reference_logits(source))


def test_granites_weights_load_though_its_multipliers_are_not_there(
    tmp_path: Path, hf_checkpoint: Callable[..., Path]
) -> None:
    source = hf_checkpoint("granite-tiny")
    run(source, tmp_path / "converted", "megatron")
    (held,), logits = megatron_lm("load", tmp_path / "run", arguments(source, tmp_path / "converted", tmp_path / "no"))
    wanted = in_files(tmp_path / "converted")
    assert held.keys() == wanted.keys()
    assert [n for n, t in wanted.items() if not torch.equal(held[n], t)] == []
    assert not close(logits, reference_logits(source))  # the reason why such a script is refused in a recipe


@pytest.mark.parametrize(("name", "ranks"), [("llama", 2), ("Mistral-7B-v0.1", 1), ("nemotron-h-tiny", 1)])
def test_what_megatron_lm_saves_converts_to_hf(
    name: str, ranks: int, tmp_path: Path, hf_checkpoint: Callable[..., Path]
) -> None:
    """Saved after a step: with optimizer, generators' states and arguments, which are a pickle that is never read."""
    source = hf_checkpoint(name)
    run(source, tmp_path / "converted", "megatron")
    words = arguments(source, tmp_path / "converted", tmp_path / "saved", ranks)
    held, logits = megatron_lm("train", tmp_path / "run", words, ranks)
    written = {p.name for p in (tmp_path / "saved" / "iter_0000007").iterdir()}
    assert {".metadata", "common.pt", "metadata.json"} <= written
    with pytest.raises(pickle.UnpicklingError, match="Namespace"):
        torch.load(tmp_path / "saved" / "iter_0000007" / "common.pt", weights_only=True)
    record = run(tmp_path / "saved", tmp_path / "hf", "hf", config=source)
    assert record["round_trip"] == "bit-exact"
    if ranks == 1:
        saved = in_files(tmp_path / "saved")
        assert [n for n, t in saved.items() if not torch.equal(held[0][n], t)] == []
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(after[n], t) for n, t in before.items())
    assert close(logits, reference_logits(tmp_path / "hf"))
