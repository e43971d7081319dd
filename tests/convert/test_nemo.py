"""NeMo 1 checkpoints: there and back with every bit, restored by megatron-core as NeMo calls it; what is refused."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_checkpoints import CONFIGS

from launcher.convert import conversion, nemo
from launcher.convert.__main__ import main, run
from launcher.convert.entry import checksum
from launcher.convert.files import in_folder
from launcher.convert.folders import open_checkpoint
from launcher.convert.torch_dist import TorchDistReader
from launcher.errors import UserError
from launcher.models.families import shape_of
from launcher.models.formats import vocabulary_unit

Checkpoints = Callable[..., Path]
NAMES = ["llama", "llama-tied", "Llama-3.1-8B", "Mistral-7B-v0.1", "Mistral-Small-24B-Base-2501"]
GRANITE = "granite-3.3-8b-base"


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((folder / nemo.CONFIG).read_text())
    return config


@pytest.mark.parametrize("target", ["folder", "archive.nemo"])
@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_gives_every_bit(name: str, target: str, tmp_path: Path, hf_checkpoint: Checkpoints) -> None:
    source = hf_checkpoint(name, "bfloat16")
    there = run(source, tmp_path / target, "nemo")
    back = run(tmp_path / target, tmp_path / "back", "hf")
    assert (tmp_path / target).is_file() == target.endswith(".nemo")
    assert (there["from"], there["to"], there["round_trip"], back["round_trip"]) == ("hf", "nemo", *["bit-exact"] * 2)
    for file in source.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name
    assert not list(tmp_path.glob("*.prism-*"))


def test_an_archive_holds_the_folder_and_no_links(tmp_path: Path, hf_checkpoint: Checkpoints) -> None:
    run(hf_checkpoint("llama"), tmp_path / "folder", "nemo")
    run(hf_checkpoint("llama"), tmp_path / "a.nemo", "nemo")
    with tarfile.open(tmp_path / "a.nemo", "r:") as archive:
        assert all(m.isreg() and m.name.startswith("./") for m in archive.getmembers())
        archive.extractall(tmp_path / "unpacked", filter="data")
    unpacked, folder = in_folder(tmp_path / "unpacked"), in_folder(tmp_path / "folder")
    assert unpacked.keys() == folder.keys() - {"conversion.json", "model_weights/__0_1.distcp"}
    assert sums(tmp_path / "unpacked") == sums(tmp_path / "folder")
    carried = [name for name in unpacked if name.startswith("hf/")]
    assert len(carried) == 4
    assert all(unpacked[name].read() == folder[name].read() for name in carried)


def test_an_archive_is_written_where_it_lies_and_needs_no_room_twice(
    tmp_path: Path, hf_checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed: list[int] = []
    seen: dict[str, int] = {}

    def pack(folder: Path, archive: Path) -> None:
        seen.update({name: span.size for name, span in in_folder(folder).items()})
        true_pack(folder, archive)

    true_pack = conversion.pack
    monkeypatch.setattr(conversion, "pack", pack)
    monkeypatch.setattr(conversion, "check_room", lambda _, size: needed.append(size))
    run(hf_checkpoint("llama"), tmp_path / "a.nemo", "nemo")
    run(hf_checkpoint("llama"), tmp_path / "folder", "nemo")
    assert needed[0] == needed[1]
    assert "model_weights/__0_0.distcp" not in seen
    assert seen["a.nemo"] > 200_000


def test_a_megatron_checkpoint_goes_straight_to_nemo_and_back(tmp_path: Path, hf_checkpoint: Checkpoints) -> None:
    run(hf_checkpoint("llama"), tmp_path / "megatron", "megatron")
    assert run(tmp_path / "megatron", tmp_path / "nemo", "nemo")["round_trip"] == "bit-exact"
    run(hf_checkpoint("llama"), tmp_path / "wanted", "nemo")
    assert sums(tmp_path / "nemo") == sums(tmp_path / "wanted")
    assert run(tmp_path / "nemo", tmp_path / "back", "megatron")["round_trip"] == "bit-exact"
    assert sums(tmp_path / "back") == sums(tmp_path / "megatron") != sums(tmp_path / "nemo")


def sums(folder: Path) -> dict[str, str]:
    reader = open_checkpoint(folder).reader
    return {name: checksum(reader.read(name)) for name in reader.entries}


# --------------------------------------------------------------------------------------------------- what NeMo does


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("name", [*NAMES, GRANITE])
def test_megatron_core_restores_it_as_nemo_does_and_gives_the_logits_of_transformers(
    name: str, tmp_path: Path, hf_checkpoint: Checkpoints
) -> None:
    """Every key that is asked for is there, `_extra_state` too; the model is built from model_config.yaml alone."""
    from megatron.core import dist_checkpointing
    from transformers import AutoModelForCausalLM

    source = hf_checkpoint(name, "bfloat16")
    run(source, tmp_path / "nemo", "nemo", fold=name == GRANITE)
    model, rows = build_as_nemo(config_of(tmp_path / "nemo"), CONFIGS[name]["vocab_size"])
    asked = {f"model.{k}": v for k, v in model.sharded_state_dict(prefix="model.", metadata=_metadata()).items()}
    loaded = dist_checkpointing.load(
        {"state_dict": asked}, str(tmp_path / "nemo" / nemo.WEIGHTS), strict="raise_unexpected"
    )["state_dict"]
    model.load_state_dict({k.replace("model.", ""): v for k, v in loaded.items()}, strict=True)
    size = (2, CONFIGS[name].get("sliding_window") or 60)
    ids = torch.randint(0, rows, size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = model.eval()(ids, torch.arange(size[1]).expand(size), None)
        wanted = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()(ids).logits
    assert ((found - wanted).abs().max() / wanted.abs().max()).item() <= 1e-4


def _metadata() -> dict[str, Any]:
    from launcher.workers.megatron.model import sharding_metadata

    return sharding_metadata()


def build_as_nemo(config: dict[str, Any], words: int) -> tuple[Any, int]:
    """megatron-core's model by NeMo's rules: keys named as TransformerConfig's fields are copied, some are translated.

    Returns the model and the rows of its vocabulary, which NeMo takes from `override_vocab_size`, else from the
    tokenizer's `words`, padded.
    """
    from dataclasses import fields

    import torch.nn.functional as F
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig

    from launcher.workers.megatron.layers import gpt_layers

    names = {f.name for f in fields(TransformerConfig)}
    copied = {k: v for k, v in config.items() if k in names} | {"window_size": None}  # local attention has none
    copied |= {"persist_layer_norm": False, "masked_softmax_fusion": False, "fp8": None}  # need a GPU
    translated = {
        "add_bias_linear": config["bias"],
        "activation_func": {"fast-swiglu": F.silu}[config["activation"]],
        "gated_linear_unit": config["activation"].endswith("glu"),
        "normalization": {"rmsnorm": "RMSNorm"}[config["normalization"]],
        "use_cpu_initialization": True,
    }
    built = TransformerConfig(**{**copied, **translated})
    unit = config["make_vocab_size_divisible_by"] * config["tensor_model_parallel_size"]
    rows = config.get("override_vocab_size", math.ceil(words / unit) * unit)
    llama3 = {"rope_scaling": True, "rope_scaling_factor": 8.0} if config["scale_positional_embedding"] else {}
    model = GPTModel(
        built,
        gpt_layers(built),
        vocab_size=rows,
        max_sequence_length=config["encoder_seq_length"],
        share_embeddings_and_output_weights=config["share_embeddings_and_output_weights"],
        position_embedding_type=config["position_embedding_type"],
        rotary_percent=config["rotary_percentage"],
        rotary_base=config["rotary_base"],
        seq_len_interpolation_factor=config["seq_len_interpolation_factor"],
        **llama3,
    )
    return model, words


#: Keys that Aligner or NeMo read without a default, beside the architecture's.
NEEDED = {
    "encoder_seq_length", "tensor_model_parallel_size", "pipeline_model_parallel_size", "gradient_as_bucket_view",
    "activations_checkpoint_granularity", "activations_checkpoint_method", "activations_checkpoint_num_layers",
    "activations_checkpoint_layers_per_pipeline", "sequence_parallel", "optim", "seed", "micro_batch_size",
    "global_batch_size", "tokenizer",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_configuration_says_what_config_json_says(name: str, tmp_path: Path, hf_checkpoint: Checkpoints) -> None:
    run(hf_checkpoint(name), tmp_path / "nemo", "nemo")
    found, hf = config_of(tmp_path / "nemo"), json.loads((hf_checkpoint(name) / "config.json").read_text())
    assert found.keys() >= NEEDED
    assert "${" not in (tmp_path / "nemo" / nemo.CONFIG).read_text()
    assert "name" not in found  # a name that NeMo does not know ends the restore
    assert found["mcore_gpt"] and found["transformer_engine"]
    same = {"hidden_size": "hidden_size", "ffn_hidden_size": "intermediate_size", "num_layers": "num_hidden_layers",
            "num_query_groups": "num_key_value_heads", "layernorm_epsilon": "rms_norm_eps"}  # fmt: skip
    assert {k: found[k] for k in same} == {k: hf[v] for k, v in same.items()}
    assert found["kv_channels"] == (hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"])
    assert found["scale_positional_embedding"] is (name == "Llama-3.1-8B")
    assert found["seq_len_interpolation_factor"] is None
    assert found.get("window_size") == ([31, 0] if name == "Mistral-7B-v0.1" else None)
    assert found["share_embeddings_and_output_weights"] is hf["tie_word_embeddings"]
    assert 300 % found["make_vocab_size_divisible_by"] == 0
    assert found["tokenizer"]["type"] == str(tmp_path / "nemo" / "hf")
    assert (tmp_path / "nemo" / "hf" / "tokenizer.json").is_file()


def test_the_rows_that_nemo_gives_its_vocabulary_are_those_of_the_file() -> None:
    assert [vocabulary_unit(n) for n in (128256, 32000, 131072, 49155, 300)] == [128, 128, 128, 1, 4]
    llama = shape_of({**CONFIGS["llama"], "vocab_size": 128256})
    assert nemo.model_config(llama, Path("/x"))["override_vocab_size"] == 128256
    assert "override_vocab_size" not in nemo.model_config(shape_of({**CONFIGS["llama"], "vocab_size": 49155}), Path())


def test_a_value_that_is_no_number_is_told() -> None:
    shape = shape_of(CONFIGS["llama"])
    text = yaml.safe_dump({**nemo.architecture(shape), "rotary_base": "much", "layernorm_epsilon": "1e-9"})
    with pytest.raises(UserError) as caught:
        nemo.check_config(text, "x.yaml", shape)
    first, second = sorted(caught.value.problems)
    assert first.startswith("x.yaml: layernorm_epsilon is 1e-09,") and second.startswith("x.yaml: rotary_base is much,")


# -------------------------------------------------------------------------------------------------------- after RL


def after_rl(folder: Path, tp: int, source: Path) -> None:
    """What Aligner leaves: more rows for the run's TP, optimizer keys, its own config, no config.json."""
    from launcher.convert.conversion import torch_dist_writer
    from launcher.convert.entry import Entry

    weights = source / nemo.WEIGHTS
    reader = TorchDistReader(weights, in_folder(weights), nemo.PREFIX)
    tensors = {name: reader.read(name) for name in reader.entries}
    rows = math.ceil(300 / (4 * tp)) * 4 * tp
    for name, tensor in tensors.items():
        if tensor.shape[0] == 300:
            tensors[name] = torch.cat([tensor, torch.zeros(rows - 300, 48, dtype=tensor.dtype)])
    folder.mkdir()
    entries = {name: Entry(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    writer = torch_dist_writer(folder, "nemo", entries, shape_of(CONFIGS["llama"]))
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    described = pickle.loads((folder / nemo.WEIGHTS / ".metadata").read_bytes())
    some = described.state_dict_metadata["model.decoder.final_layernorm.weight"]
    described.state_dict_metadata["optimizer.state.exp_avg.model.decoder.final_layernorm.weight"] = some
    (folder / nemo.WEIGHTS / ".metadata").write_bytes(pickle.dumps(described))
    config = {**config_of(source), "tensor_model_parallel_size": tp, "encoder_seq_length": 4096, "ppo": {"lr": 1}}
    (folder / nemo.CONFIG).write_text(yaml.safe_dump(config))


@pytest.mark.parametrize("tp", [2, 8])
def test_what_aligner_leaves_comes_back_with_the_config_that_is_named(
    tp: int, tmp_path: Path, hf_checkpoint: Checkpoints
) -> None:
    source = hf_checkpoint("llama", "bfloat16")
    run(source, tmp_path / "before", "nemo")
    after_rl(tmp_path / "after", tp, tmp_path / "before")
    with pytest.raises(
        UserError, match=r"after: no hf/config\.json in it; put the model's there, or name a folder that has it w"
    ):
        run(tmp_path / "after", tmp_path / "hf", "hf")
    record = run(tmp_path / "after", tmp_path / "hf", "hf", config=source)
    assert record["round_trip"] == "bit-exact"
    wanted = load_file(source / "model.safetensors")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert {n: checksum(t) for n, t in found.items()} == {n: checksum(t) for n, t in wanted.items()}


def test_a_directory_of_a_training_run_is_read_too(tmp_path: Path, hf_checkpoint: Checkpoints) -> None:
    run(hf_checkpoint("llama"), tmp_path / "nemo", "nemo")
    step = tmp_path / "megatron_gpt-step=20-consumed_samples=10240-last"
    shutil.copytree(tmp_path / "nemo" / nemo.WEIGHTS, step)
    run(step, tmp_path / "hf", "hf", config=hf_checkpoint("llama"))
    wanted = hf_checkpoint("llama") / "model.safetensors"
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == wanted.read_bytes()


# --------------------------------------------------------------------------------------------------------- granite


def test_granite_goes_folded_in_fp32_only_where_it_is_asked_for(tmp_path: Path, hf_checkpoint: Checkpoints) -> None:
    source = hf_checkpoint(GRANITE, "bfloat16")
    with pytest.raises(
        UserError, match="no setting for its multipliers. --fold-multipliers puts them into the weights"
    ):
        run(source, tmp_path / "no", "nemo")
    there = run(source, tmp_path / "there", "nemo", fold=True)
    assert there["types"] == ["float32"]
    assert there["round_trip"] == "bit-exact"
    assert "Not for training" in there["notes"][0]
    back = run(tmp_path / "there", tmp_path / "back", "hf")
    assert back["round_trip"] == "bit-exact"
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_folded_weights_that_were_trained_are_rounded_and_that_is_counted(
    tmp_path: Path, hf_checkpoint: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a step of training a weight is no multiple of 16 bits any more; a norm that it left alone still is."""
    source = hf_checkpoint(GRANITE, "bfloat16")
    run(source, tmp_path / "before", "nemo", fold=True)
    reader = open_checkpoint(tmp_path / "before").reader
    shutil.copytree(tmp_path / "before", tmp_path / "after", ignore=shutil.ignore_patterns(nemo.WEIGHTS))
    writer = conversion.torch_dist_writer(tmp_path / "after", "nemo", reader.entries, shape_of(CONFIGS[GRANITE]))
    for name in reader.entries:
        writer.add(name, reader.read(name) * (1 + 1e-4 * name.endswith("fc2.weight")))
    writer.close()
    assert main([str(tmp_path / "after"), str(tmp_path / "back"), "--to", "hf"]) == 0
    said = capsys.readouterr().out
    assert "round trip: rounded; each tensor read back is what was to be written" in said
    assert "2 of 14 tensors have lost bits by that" in said
    record = json.loads((tmp_path / "back" / "conversion.json").read_text())
    assert record["round_trip"] == "rounded"
    found, wanted = (load_file(f / "model.safetensors") for f in (tmp_path / "back", source))
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.allclose(found[name].float(), wanted[name].float() * 1.0001, rtol=2**-8)


def test_granite_in_fp32_is_not_folded(tmp_path: Path, hf_checkpoint: Checkpoints) -> None:
    with pytest.raises(UserError, match="multipliers can be taken out again with every bit only of weights in 16 bits"):
        run(hf_checkpoint(GRANITE), tmp_path / "no", "nemo", fold=True)


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["granite-4.0-h-micro-base", "granite-4.0-micro-base", "nemotron-h-tiny"])
def test_families_that_nemo_cannot_have_are_refused(name: str, tmp_path: Path, hf_checkpoint: Checkpoints) -> None:
    for fold in (False, True):
        with pytest.raises(UserError, match="does not go into format nemo; llama, mistral and granite 3 do"):
            run(hf_checkpoint(name), tmp_path / "no", "nemo", fold=fold)


def test_flags_that_do_not_fit_are_refused(tmp_path: Path, hf_checkpoint: Checkpoints) -> None:
    with pytest.raises(UserError, match="model type llama has no multipliers"):
        run(hf_checkpoint("llama"), tmp_path / "no", "nemo", fold=True)
    with pytest.raises(UserError, match="--fold-multipliers: is for --to nemo, not for megatron"):
        run(hf_checkpoint(GRANITE), tmp_path / "no", "megatron", fold=True)
    with pytest.raises(UserError, match="--parity: compares formats hf and megatron"):
        run(hf_checkpoint("llama"), tmp_path / "no", "nemo", parity=True)
    assert not list(tmp_path.iterdir())


def test_a_rope_factor_that_nemo_has_not_is_refused(tmp_path: Path, hf_checkpoint: Checkpoints) -> None:
    source = shutil.copytree(hf_checkpoint("Llama-3.1-8B"), tmp_path / "hf")
    text = (source / "config.json").read_text()
    (source / "config.json").write_text(text.replace('"factor": 8.0', '"factor": 32.0'))
    assert text != (source / "config.json").read_text()
    with pytest.raises(UserError, match="RoPE's factor is 32.0; NeMo has 8 built in"):
        run(source, tmp_path / "no", "nemo")


def rewrite(**changes: Any) -> Callable[[Path], Any]:
    return lambda folder: (folder / nemo.CONFIG).write_text(yaml.safe_dump({**config_of(folder), **changes}))


def forget(key: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        config = config_of(folder)
        del config[key]
        (folder / nemo.CONFIG).write_text(yaml.safe_dump(config))

    return change


def legacy(folder: Path) -> None:
    shutil.rmtree(folder / nemo.WEIGHTS)
    (folder / nemo.WEIGHTS).mkdir()
    (folder / nemo.WEIGHTS / "model_weights.ckpt").write_bytes(b"\x80 a pickle")


def zarr(folder: Path) -> None:
    (folder / nemo.WEIGHTS / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')


REFUSALS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another model": (rewrite(num_layers=3), "model_config.yaml: num_layers is 3, config.json makes it 2"),
    "absent norm": (forget("normalization"), "normalization is None, config.json makes it rmsnorm"),
    "linear scaling": (rewrite(seq_len_interpolation_factor=8), "seq_len_interpolation_factor is 8"),
    "no YAML": (lambda f: (f / nemo.CONFIG).write_text("a: [b"), "model_config.yaml: not YAML"),
    "a list": (lambda f: (f / nemo.CONFIG).write_text("- a"), "model_config.yaml: not a model's configuration"),
    "legacy": (legacy, "model_weights.ckpt is a pickle, which is never loaded"),
    "zarr": (zarr, "format zarr; only torch_dist is read"),
    "no metadata.json": (lambda f: (f / nemo.WEIGHTS / "metadata.json").unlink(), "no metadata.json"),
    "cut short": (lambda f: os.truncate(f / nemo.WEIGHTS / "__0_0.distcp", 99), "__0_0.distcp: 99 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_a_damaged_folder_is_refused(case: str, tmp_path: Path, hf_checkpoint: Checkpoints) -> None:
    change, message = REFUSALS[case]
    run(hf_checkpoint("llama"), tmp_path / "nemo", "nemo")
    change(tmp_path / "nemo")
    with pytest.raises(UserError) as refused:
        run(tmp_path / "nemo", tmp_path / "no", "hf")
    assert message in str(refused.value)
    assert not list(tmp_path.glob("no*"))


def test_a_damaged_archive_is_refused(
    tmp_path: Path, hf_checkpoint: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "a.nemo"
    run(hf_checkpoint("llama"), whole, "nemo")
    for name, content in (
        ("cut", whole.read_bytes()[:200_000]),
        ("text", b"no archive" * 200),
        ("gz", b"\x1f\x8b\x08"),
    ):
        (tmp_path / name).write_bytes(content)
        assert main([str(tmp_path / name), str(tmp_path / "no"), "--to", "hf"]) == 2
        assert f"{tmp_path / name}: " in (said := capsys.readouterr().err)
        assert "archive" in said or "cut short" in said
    assert not list(tmp_path.glob("no*"))
