"""Conversions, both ways, bit by bit; what is written is what megatron-core writes and reads."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from real_models import REAL
from safetensors.torch import load_file, save_file
from tiny_checkpoints import CONFIGS
from torch import Tensor

from launcher.convert import conversion, torch_dist
from launcher.convert.conversion import convert
from launcher.convert.entry import Entry, checksum
from launcher.convert.files import in_folder
from launcher.convert.hf import INDEX, HfReader, HfWriter
from launcher.convert.torch_dist import TorchDistReader, TorchDistWriter
from launcher.errors import WorldError
from launcher.models.torch_dist import TRACKER, checkpoint_dir

Checkpoints = Callable[..., Path]


@pytest.fixture
def to_megatron(tmp_path: Path, hf_checkpoint: Checkpoints) -> Callable[..., Path]:
    def make(name: str, dtype: str = "float32") -> Path:
        target = new(tmp_path / f"{name}-megatron")
        convert(hf_checkpoint(name, dtype), target, "megatron")
        return target

    return make


def new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """Whether two checkpoints have the same tensors, types and bits."""
    assert found.keys() == wanted.keys()
    return all(checksum(t) == checksum(wanted[n]) and t.dtype == wanted[n].dtype for n, t in found.items())


def read_all(folder: Path) -> dict[str, Tensor]:
    reader = reader_of(folder)
    return {name: reader.read(name).clone() for name in reader.entries}


def reader_of(folder: Path) -> TorchDistReader:
    path = checkpoint_dir(folder)
    return TorchDistReader(path, in_folder(path))


# ------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_hf_to_megatron_and_back_gives_every_bit(
    name: str, dtype: str, tmp_path: Path, hf_checkpoint: Checkpoints
) -> None:
    source = hf_checkpoint(name, dtype)
    there = convert(source, new(tmp_path / "there"), "megatron")
    back = convert(tmp_path / "there", new(tmp_path / "back"), "hf")
    wanted = load_file(source / "model.safetensors")
    assert same(load_file(tmp_path / "back" / "model.safetensors"), wanted)
    assert there["round_trip"] == back["round_trip"] == "bit-exact"
    assert there["tensors_read"] == there["tensors_in_source"] == back["tensors_written"] == len(wanted)
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name


def test_types_are_the_sources_tensor_by_tensor(to_megatron: Callable[..., Path]) -> None:
    entries = reader_of(to_megatron("nemotron-h-tiny", "bfloat16")).entries
    wide = {name.rpartition(".")[2] for name, entry in entries.items() if entry.dtype == torch.float32}
    assert wide == {"A_log", "D"}


def test_padding_rows_are_zero_and_cut_again(to_megatron: Callable[..., Path], hf_checkpoint: Checkpoints) -> None:
    rows = reader_of(to_megatron("llama")).read("embedding.word_embeddings.weight")
    assert rows.shape[0] == 384
    assert not rows[300:].any()
    wanted = load_file(hf_checkpoint("llama") / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(rows[:300], wanted)


def test_the_same_conversion_gives_the_same_files(tmp_path: Path, hf_checkpoint: Checkpoints) -> None:
    for name in ("llama", "nemotron-h-tiny"):
        for turn in "ab":
            convert(hf_checkpoint(name), new(tmp_path / f"{name}-{turn}"), "megatron")
            convert(tmp_path / f"{name}-{turn}", new(tmp_path / f"{name}-{turn}-hf"), "hf")
        for suffix in ("", "-hf"):
            a, b = tmp_path / f"{name}-a{suffix}", tmp_path / f"{name}-b{suffix}"
            files = sorted(p.relative_to(a) for p in a.rglob("*") if p.is_file())
            assert files == sorted(p.relative_to(b) for p in b.rglob("*") if p.is_file())
            assert all((a / f).read_bytes() == (b / f).read_bytes() for f in files)


# ----------------------------------------------------------------------------------------------------- megatron-core


def core_checkpoint(folder: Path, name: str, precision: Any = "fp32") -> Path:
    """A checkpoint that megatron-core itself saves: random weights as a training starts with."""
    from launcher.models.families import shape_of
    from launcher.workers.megatron import checkpoint, hf_files
    from launcher.workers.megatron.model import build_model, initialize

    shape = shape_of(CONFIGS[name])
    model = build_model(shape, precision=precision)
    initialize(model, shape, 0.08, 3)
    with torch.no_grad():
        for name_of, parameter in model.named_parameters():
            if name_of.startswith(("embedding.", "output_layer.")):
                parameter[shape.vocab_size :] = 0  # padding, which a conversion cuts and makes again
    checkpoint.save_weights(new(folder), 5, model)
    hf_files.write(folder / "hf", None, None, CONFIGS[name], precision)
    return folder


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize(
    ("name", "precision"),
    [*((name, "bf16") for name in REAL), ("llama-tiny", "fp32"), ("nemotron-h-tiny", "fp32")],
)
def test_what_megatron_core_saves_comes_back_with_every_bit(name: str, precision: str, tmp_path: Path) -> None:
    saved = core_checkpoint(tmp_path / "core", name, precision)
    convert(saved, new(tmp_path / "hf"), "hf")
    convert(tmp_path / "hf", new(tmp_path / "back"), "megatron")
    assert same(read_all(tmp_path / "back"), read_all(saved))


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("name", ["llama-tiny", "nemotron-h-tiny"])
def test_keys_and_sizes_are_those_of_megatron_core(name: str, tmp_path: Path, to_megatron: Callable[..., Path]) -> None:
    from megatron.core.dist_checkpointing import load_tensors_metadata

    def tensors(folder: Path) -> dict[str, Any]:
        found = load_tensors_metadata(str(checkpoint_dir(folder)))
        return {key: (tuple(t.global_shape), t.dtype) for key, t in found.items()}

    assert tensors(to_megatron(name)) == tensors(core_checkpoint(tmp_path / "core", name))


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("name", ["llama", "granite-tiny", "nemotron-h-tiny"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_trainer_loads_it_and_saves_the_same_bits(
    name: str, precision: Any, tmp_path: Path, to_megatron: Callable[..., Path]
) -> None:
    from launcher.models.families import shape_of
    from launcher.workers.megatron import checkpoint
    from launcher.workers.megatron.model import build_model

    source = to_megatron(name, "bfloat16" if precision == "bf16" else "float32")
    model = build_model(shape_of(json.loads((source / "hf" / "config.json").read_text())), precision=precision)
    checkpoint.load_weights(source, model)
    checkpoint.save_weights(new(tmp_path / "again"), 1, model)
    assert same(read_all(tmp_path / "again"), read_all(source))


# ------------------------------------------------------------------------------------------------------ run_config.yaml


@pytest.mark.parametrize(
    ("name", "provider", "activation"),
    [
        ("Llama-3.1-8B", "gpt_provider.GPTModelProvider", "torch.nn.functional.silu"),
        ("Mistral-7B-v0.1", "gpt_provider.GPTModelProvider", "torch.nn.functional.silu"),
        ("nemotron-h-tiny", "mamba.mamba_provider.MambaModelProvider", "megatron.core.activations.squared_relu"),
    ],
)
def test_run_config_says_what_bridge_builds(
    name: str, provider: str, activation: str, to_megatron: Callable[..., Path]
) -> None:
    found = yaml.safe_load((to_megatron(name, "bfloat16") / "release" / "run_config.yaml").read_text())
    model, config = found["model"], CONFIGS[name]
    assert model["_target_"] == f"megatron.bridge.models.{provider}"
    assert model["activation_func"] == {"_target_": activation, "_call_": False}
    assert (model["bf16"], model["params_dtype"]["_target_"]) == (True, "torch.bfloat16")
    assert (model["hidden_size"], model["vocab_size"]) == (config["hidden_size"], config["vocab_size"])
    assert isinstance(model["layernorm_epsilon"], float)
    window = config.get("sliding_window")
    assert model.get("window_size") == ([window - 1, 0] if window else None)
    assert model.get("rope_scaling_factor") == (8.0 if name == "Llama-3.1-8B" else None)
    assert not found["checkpoint"]["save_rng"]


def test_run_config_names_the_weights_type(to_megatron: Callable[..., Path]) -> None:
    model = yaml.safe_load((to_megatron("llama") / "release" / "run_config.yaml").read_text())["model"]
    assert (model["bf16"], model["fp16"], model["params_dtype"]["_target_"]) == (False, False, "torch.float32")


@pytest.mark.parametrize("name", ["granite-tiny", "granite-4.0-h-micro-base"])
def test_granite_gets_no_run_config(name: str, to_megatron: Callable[..., Path]) -> None:
    assert not (to_megatron(name) / "release" / "run_config.yaml").exists()


# ------------------------------------------------------------------------------------------------ layouts on the disk


def test_layers_under_keys_of_their_own_are_read_too(
    tmp_path: Path, to_megatron: Callable[..., Path], hf_checkpoint: Checkpoints
) -> None:
    stacked = to_megatron("Mistral-7B-v0.1")
    tensors, folder = read_all(stacked), new(tmp_path / "separate")
    (folder / TRACKER).write_text("release")
    writer = TorchDistWriter(
        folder / "release", {n: Entry(tuple(t.shape), t.dtype) for n, t in tensors.items()}, stacked=False
    )
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    shutil.copytree(stacked / "hf", folder / "hf")
    keys = pickle.loads((folder / "release" / ".metadata").read_bytes()).state_dict_metadata
    assert "decoder.layers.1.mlp.linear_fc2.weight" in keys
    convert(folder, new(tmp_path / "hf"), "hf")
    wanted = load_file(hf_checkpoint("Mistral-7B-v0.1") / "model.safetensors")
    assert same(load_file(tmp_path / "hf" / "model.safetensors"), wanted)


@pytest.mark.parametrize("rows", [512, 2048])
def test_a_vocabulary_padded_for_tensor_parallelism_is_read(
    rows: int, tmp_path: Path, to_megatron: Callable[..., Path], hf_checkpoint: Checkpoints
) -> None:
    """Megatron-LM pads to a multiple of 128 x TP: 512 rows for 300 at TP=2, 2048 at TP=16."""
    source = to_megatron("llama")
    tensors = read_all(source)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        tensors[name] = torch.cat([tensors[name][:300], torch.randn(rows - 300, 48)])
    shutil.rmtree(source / "release")
    writer = TorchDistWriter(
        source / "release", {n: Entry(tuple(t.shape), t.dtype) for n, t in tensors.items()}, stacked=True
    )
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    convert(source, new(tmp_path / "hf"), "hf")
    assert same(
        load_file(tmp_path / "hf" / "model.safetensors"), load_file(hf_checkpoint("llama") / "model.safetensors")
    )


def test_shards_are_read_by_their_index(tmp_path: Path, hf_checkpoint: Checkpoints) -> None:
    whole = hf_checkpoint("llama")
    folder = shutil.copytree(whole, tmp_path / "sharded")
    (folder / "model.safetensors").unlink()
    tensors = load_file(whole / "model.safetensors")
    names = [f"model-{1 + i % 3:05d}-of-00003.safetensors" for i in range(len(tensors))]
    places = dict(zip(tensors, names, strict=True))
    for name in set(names):
        save_file({k: t for k, t in tensors.items() if places[k] == name}, folder / name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    convert(folder, new(tmp_path / "megatron"), "megatron")
    convert(whole, new(tmp_path / "wanted"), "megatron")
    assert same(read_all(tmp_path / "megatron"), read_all(tmp_path / "wanted"))


def test_a_file_larger_than_memory_is_opened(tmp_path: Path) -> None:
    size = 4 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    header = json.dumps({"weight": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + size)  # one hole: it takes no room
    assert HfReader(tmp_path).entries["weight"].shape == (size // 4,)


def test_a_large_checkpoint_is_written_in_shards(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(7, i + 1, dtype=[torch.bfloat16, torch.float32][i % 2]) for i in range(9)}
    writer = HfWriter(tmp_path, {n: Entry(tuple(t.shape), t.dtype) for n, t in tensors.items()}, shard_bytes=300)
    for name in sorted(tensors, reverse=True):
        writer.add(name, tensors[name])
    writer.close()
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert all(sum(t.nbytes for t in load_file(f).values()) <= 300 for f in files)
    reader = HfReader(tmp_path)
    assert same({name: reader.read(name) for name in reader.entries}, tensors)


# ------------------------------------------------------------------------------------------------------ verification


@pytest.mark.parametrize("to", ["megatron", "hf"])
def test_a_wrong_bit_on_the_disk_is_found(
    to: Any, tmp_path: Path, hf_checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = hf_checkpoint("granite-3.3-8b-base")
    if to == "hf":
        convert(source, new(tmp_path / "megatron"), "megatron")
        source = tmp_path / "megatron"
    writer = TorchDistWriter if to == "megatron" else HfWriter
    true_add = writer.add

    def add(self: Any, name: str, tensor: Tensor, lane: int) -> None:
        if "layers.1" in name and "input_layernorm" in name or "1.self_attention.linear_qkv.layer_norm" in name:
            tensor = tensor.clone()
            tensor[5] = torch.nextafter(tensor[5], torch.tensor(9.0))
        true_add(self, name, tensor, lane)

    monkeypatch.setattr(writer, "add", add)
    with pytest.raises(WorldError, match=r"read back, not the bytes that were converted"):
        convert(source, new(tmp_path / "target"), to)
    assert convert(source, new(tmp_path / "blind"), to, verify=False)["round_trip"] == "not run"


def test_it_is_the_disk_that_is_read_back(
    tmp_path: Path, hf_checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the reading back begins, the file is synced and is asked out of the cache."""
    done: list[str] = []
    true_sync, true_advise, true_read = os.fsync, os.posix_fadvise, TorchDistReader.read

    def noted(what: str, file: int) -> None:
        done.append(f"{what} {Path(os.readlink(f'/proc/self/fd/{file}')).name}")

    monkeypatch.setattr(os, "fsync", lambda file: (noted("sync", file), true_sync(file)))
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *a: (noted(f"advise {a[-1]}", file), true_advise(file, *a)))
    monkeypatch.setattr(TorchDistReader, "read", lambda self, name: (done.append("read"), true_read(self, name))[1])
    convert(hf_checkpoint("llama"), new(tmp_path / "target"), "megatron")
    for file in ("__0_0.distcp", "__0_1.distcp"):
        places = [done.index(f"sync {file}"), done.index(f"advise {os.POSIX_FADV_DONTNEED} {file}"), done.index("read")]
        assert places == sorted(places)


def test_padding_that_is_not_zero_is_found(
    tmp_path: Path, hf_checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_add = TorchDistWriter.add

    def add(self: TorchDistWriter, name: str, tensor: Tensor, lane: int) -> None:
        true_add(self, name, tensor.index_fill(0, torch.tensor([383]), 1.0) if len(tensor) == 384 else tensor, lane)

    monkeypatch.setattr(TorchDistWriter, "add", add)
    with pytest.raises(WorldError, match=r"embedding\.word_embeddings\.weight"):
        convert(hf_checkpoint("llama"), new(tmp_path / "target"), "megatron")


def test_progress_counts_bytes_moved_and_verified(tmp_path: Path, hf_checkpoint: Checkpoints) -> None:
    seen: list[tuple[int, int]] = []
    size = sum(t.nbytes for t in load_file(hf_checkpoint("llama") / "model.safetensors").values())
    convert(hf_checkpoint("llama"), new(tmp_path / "a"), "megatron", progress=lambda *at: seen.append(at))
    assert (seen[0], seen[-1]) == ((0, 2 * size), (2 * size, 2 * size))
    assert seen == sorted(seen)
    assert len(seen) == 1 + 2 * 15
    seen.clear()
    convert(hf_checkpoint("llama"), new(tmp_path / "b"), "megatron", False, lambda *at: seen.append(at))
    assert (seen[0], seen[-1], len(seen)) == ((0, size), (size, size), 1 + 15)


def test_memory_holds_two_of_the_largest_tensors(
    tmp_path: Path, hf_checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read and made and is not gone yet never takes more than twice the largest tensor."""
    import threading
    import weakref

    alive: dict[int, weakref.ref[Tensor]] = {}
    lock, peak, largest = threading.Lock(), 0, 384 * 48 * 4

    def count(tensor: Tensor) -> Tensor:
        nonlocal peak
        with lock:
            alive[id(tensor)] = weakref.ref(tensor)
            storages = {
                t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for ref in list(alive.values())
                if (t := ref()) is not None
            }
            peak = max(peak, sum(storages.values()))
        return tensor

    true_read, true_back, true_links = HfReader.read_together, TorchDistReader.read, conversion.links
    monkeypatch.setattr(HfReader, "read_together", lambda self, names: [count(t) for t in true_read(self, names)])
    monkeypatch.setattr(TorchDistReader, "read", lambda self, name: count(true_back(self, name)))

    def counting_links(*args: Any) -> Any:
        return tuple(replace(k, forward=lambda t, f=k.forward: [count(x) for x in f(t)]) for k in true_links(*args))

    monkeypatch.setattr(conversion, "links", counting_links)
    convert(hf_checkpoint("llama"), new(tmp_path / "target"), "megatron")
    assert largest < peak <= 2 * largest


# -------------------------------------------------------------------------------- checkpoints of a training, whole


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama-tiny", "dp_reshardable"), ("granite-tiny", "fully_reshardable"), ("nemotron-h-tiny", "fully_reshardable")],
)
def test_weights_come_out_of_a_training_checkpoint_with_its_optimizer(name: str, kind: str, tmp_path: Path) -> None:
    """Saved by megatron-core's own `dist_checkpointing.save`: model, distributed optimizer, schedule, one step on."""
    from megatron.core import dist_checkpointing
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from launcher.models.families import shape_of
    from launcher.workers.megatron import checkpoint, hf_files
    from launcher.workers.megatron.model import build_model, initialize, sharding_metadata
    from launcher.workers.megatron.optimizer import _mend_order

    shape = shape_of(CONFIGS[name])
    model = build_model(shape, precision="bf16")
    initialize(model, shape, 0.08, 3)
    wrapped = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True), model
    )
    settings = OptimizerConfig(optimizer="adam", lr=1e-3, bf16=True, use_distributed_optimizer=True)
    optimizer = get_megatron_optimizer(settings, [wrapped])
    for parameter in model.parameters():
        parameter.main_grad.fill_(0.01)
    _mend_order(optimizer)
    optimizer.step()
    checkpoint.save_weights(new(tmp_path / "weights"), 5, model)
    metadata = {**sharding_metadata(), "distrib_optim_sharding_type": kind}
    weights = model.sharded_state_dict(metadata=metadata)
    state = {
        **weights,
        "optimizer": optimizer.sharded_state_dict(weights, metadata=metadata),
        "iteration": 7,
        "checkpoint_version": 3.0,
        "opt_param_scheduler": {"num_steps": 56},
        "args": argparse.Namespace(seq_length=128),
    }
    whole = new(tmp_path / "training")
    dist_checkpointing.save(state, str(new(whole / "iter_0000007")))
    (whole / TRACKER).write_text("7")
    keys = pickle.loads((whole / "iter_0000007" / ".metadata").read_bytes()).state_dict_metadata
    assert any(key.startswith("optimizer.") for key in keys)
    hf_files.write(whole / "hf", None, None, CONFIGS[name], "bf16")
    assert same(read_all(whole), read_all(tmp_path / "weights"))
    record = convert(whole, new(tmp_path / "hf"), "hf")
    assert record["round_trip"] == "bit-exact"
    assert record["tensors_read"] == len(read_all(tmp_path / "weights"))


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("stacked", [True, False])
def test_both_layouts_of_megatron_core_are_read(stacked: bool, tmp_path: Path) -> None:
    """One tensor for all layers, as a GPT model is saved by default, and one for each layer."""
    from megatron.core import dist_checkpointing

    from launcher.models.families import shape_of
    from launcher.workers.megatron import hf_files
    from launcher.workers.megatron.model import build_model, initialize, sharding_metadata

    shape = shape_of(CONFIGS["Mistral-Small-24B-Base-2501"])
    model = build_model(shape)
    initialize(model, shape, 0.08, 4)
    folder = new(tmp_path / "core")
    state = model.sharded_state_dict(metadata={**sharding_metadata(), "non_homogeneous_layers": not stacked})
    dist_checkpointing.save(state, str(new(folder / "iter_0000001")))
    (folder / TRACKER).write_text("1")
    keys = pickle.loads((folder / "iter_0000001" / ".metadata").read_bytes()).state_dict_metadata
    assert ("decoder.layers.mlp.linear_fc2.weight" in keys) is stacked
    assert ("decoder.layers.1.mlp.linear_fc2.weight" in keys) is not stacked
    hf_files.write(folder / "hf", None, None, CONFIGS["Mistral-Small-24B-Base-2501"], "fp32")
    convert(folder, new(tmp_path / "hf"), "hf")
    live = {k: v for k, v in model.state_dict().items() if v is not None and "_extra_state" not in k}
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert torch.equal(found["model.layers.1.mlp.down_proj.weight"], live["decoder.layers.1.mlp.linear_fc2.weight"])
    assert torch.equal(found["model.norm.weight"], live["decoder.final_layernorm.weight"])
    assert len(found) == 2 * 9 + 3


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("name", [*REAL, "llama-tied"])
def test_megatron_core_loads_ours_with_strict_checks(
    name: str, tmp_path: Path, to_megatron: Callable[..., Path]
) -> None:
    """All that the model asks for is there, states that Transformer Engine wants too; what is not there is missed."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from launcher.models.families import shape_of
    from launcher.workers.megatron.model import build_model, sharding_metadata

    source = checkpoint_dir(to_megatron(name))
    shape = shape_of(CONFIGS[name])
    model = build_model(shape)
    asked = model.sharded_state_dict(metadata=sharding_metadata())
    objects = {value.unique_key for value in asked.values() if isinstance(value, ShardedObject)}
    assert objects
    assert objects <= set(torch_dist.extra_states(shape))
    loaded = dist_checkpointing.load(dict(asked), str(source), strict="raise_unexpected")
    model.load_state_dict({key: loaded[key] for key in asked}, strict=True)
    described = pickle.loads((source / ".metadata").read_bytes())
    last = next(key for key in described.state_dict_metadata if key.startswith("decoder.final_"))
    del described.state_dict_metadata[last]
    (source / ".metadata").write_bytes(pickle.dumps(described))
    with pytest.raises(Exception, match="final_"):
        dist_checkpointing.load(dict(asked), str(source), strict="raise_unexpected")
