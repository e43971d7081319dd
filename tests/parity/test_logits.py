"""transformers' model and megatron-core's, same weights through the conversion, same tokens: the same logits."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import CONFIGS, word_tokenizer
from torch import Tensor

from launcher.convert.__main__ import run
from launcher.convert.conversion import convert
from launcher.errors import WorldError
from launcher.models.families import shape_of

pytestmark = pytest.mark.usefixtures("megatron")

#: Largest difference of logits over the largest logit, in fp32: sums in another order, nothing more.
TOLERANCE = 1e-4


def tokens(name: str) -> Tensor:
    """Two rows of 100 tokens: some chunks of the Mamba scan, beyond sliding windows, and far enough for RoPE."""
    config = CONFIGS[name]
    return torch.randint(2, config["vocab_size"], (2, 100), generator=torch.Generator().manual_seed(11))


def megatron_logits(folder: Path, ids: Tensor, **changes: Any) -> Tensor:
    """Logits of the trainer's model with the weights of a folder of format megatron; `changes` are of its shape."""
    from launcher.workers.megatron import checkpoint
    from launcher.workers.megatron.model import build_model

    shape = replace(shape_of(json.loads((folder / "hf" / "config.json").read_text())), **changes)
    model = build_model(shape).eval()
    checkpoint.load_weights(folder, model)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        logits: Tensor = model(ids, positions, None)
    return logits[..., : shape.vocab_size]


def hf_logits(folder: Path, ids: Tensor, clamp_dt: bool = False) -> Tensor:
    """Logits of transformers' model, loaded as the stages that evaluate load it.

    transformers keeps Mamba's dt above `time_step_min` (0.001), which neither the paper's kernels nor megatron-core do;
    that is taken off unless `clamp_dt`.
    """
    from launcher.workers.checkpoints import load_model

    model, _ = load_model(folder)
    for layer in model.model.layers:
        mixer = getattr(layer, "mixer", None)
        if hasattr(mixer, "time_step_limit") and not clamp_dt:
            mixer.time_step_limit = (0.0, float("inf"))
    with torch.no_grad():
        logits: Tensor = model(ids).logits
    return logits


def difference(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|."""
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture
def converted(tmp_path: Path, hf_checkpoint: Callable[..., Path]) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        target = tmp_path / name
        target.mkdir()
        convert(hf_checkpoint(name), target, "megatron")
        return target

    return make


@pytest.mark.parametrize("name", CONFIGS)
def test_megatron_core_gives_the_logits_of_transformers(
    name: str, converted: Callable[[str], Path], hf_checkpoint: Callable[..., Path]
) -> None:
    ids = tokens(name)
    wanted = hf_logits(hf_checkpoint(name), ids)
    found = megatron_logits(converted(name), ids)
    assert difference(found, wanted) <= TOLERANCE
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))


@pytest.mark.parametrize("name", ["llama-tiny", "granite-tiny", "nemotron-h-tiny"])
def test_transformers_gives_the_logits_of_what_megatron_core_saved(name: str, tmp_path: Path) -> None:
    from launcher.workers.megatron import checkpoint, hf_files
    from launcher.workers.megatron.model import build_model, initialize

    shape, ids = shape_of(CONFIGS[name]), tokens(name)
    model = build_model(shape).eval()
    initialize(model, shape, 0.2, 5)
    with torch.no_grad():
        for parameter in model.parameters():  # the initial norms and D are all 1
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        found = model(ids, torch.arange(ids.shape[1]).expand_as(ids), None)
    for folder in ("megatron", "hf"):
        (tmp_path / folder).mkdir()
    checkpoint.save_weights(tmp_path / "megatron", 1, model)
    word_tokenizer(shape.vocab_size).save_pretrained(tmp_path / "tokenizer")
    hf_files.write(tmp_path / "megatron" / "hf", None, tmp_path / "tokenizer", CONFIGS[name], "fp32")
    convert(tmp_path / "megatron", tmp_path / "hf", "hf")
    assert difference(found, hf_logits(tmp_path / "hf", ids)) <= TOLERANCE


# What follows shows that the comparison above would see a setting that was lost on the way.


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Llama-3.1-8B", {"rope_scaling": None}),
        ("llama-tiny", {"rotary_base": 20000.0}),
        ("llama-tiny", {"norm_epsilon": 1e-3}),
        ("granite-tiny", {"embedding_multiplier": 11.0}),
        ("granite-tiny", {"residual_multiplier": 0.51}),
        ("granite-tiny", {"attention_multiplier": 0.21}),
        ("granite-tiny", {"logits_scaling": 4.01}),
        ("nemotron-h-tiny", {"norm_epsilon": 1e-3}),
    ],
)
def test_a_lost_setting_would_be_seen(
    name: str, changes: dict[str, Any], converted: Callable[[str], Path], hf_checkpoint: Callable[..., Path]
) -> None:
    ids = tokens(name)
    found = megatron_logits(converted(name), ids, **changes)
    assert difference(found, hf_logits(hf_checkpoint(name), ids)) > 5 * TOLERANCE


def test_transformers_lower_bound_of_dt_is_the_one_difference_of_nemotron_h(
    converted: Callable[[str], Path], hf_checkpoint: Callable[..., Path]
) -> None:
    """With its bound of 0.001 transformers differs from megatron-core as it differs from itself without the bound."""
    ids, folder = tokens("nemotron-h-tiny"), hf_checkpoint("nemotron-h-tiny")
    ours = megatron_logits(converted("nemotron-h-tiny"), ids)
    bounded, free = hf_logits(folder, ids, clamp_dt=True), hf_logits(folder, ids)
    assert difference(ours, bounded) > 5 * TOLERANCE
    assert difference(ours - bounded, free - bounded) <= 100 * TOLERANCE


def test_the_converted_folder_generates(tmp_path: Path, converted: Callable[[str], Path]) -> None:
    """Greedy decoding with a cache gives, token by token, the argmax of megatron-core's logits."""
    from launcher.workers.checkpoints import load_model

    for name in ("llama-tiny", "nemotron-h-tiny"):
        source, target = converted(name), tmp_path / f"{name}-hf"
        target.mkdir()
        convert(source, target, "hf")
        model, tokenizer = load_model(target)
        for layer in model.model.layers:
            if hasattr(getattr(layer, "mixer", None), "time_step_limit"):
                layer.mixer.time_step_limit = (0.0, float("inf"))
        prompt = torch.tensor([tokenizer.encode("t5 t9 t77 t300 t42")])
        assert prompt.tolist() == [[5, 9, 77, 300, 42]]
        whole = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, eos_token_id=None
        )
        logits = megatron_logits(source, whole)
        assert torch.equal(logits.argmax(-1)[0, 4:-1], whole[0, 5:])


# ------------------------------------------------------------------------------------------------------------ --parity


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Nemotron-H-8B-Base-8K"])
def test_parity_is_measured_and_recorded(name: str, hf_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Run in this process, whose process groups are set aside."""
    with without_process_groups():
        there = run(hf_checkpoint(name, "bfloat16"), tmp_path / "megatron", "megatron", parity=True)
        back = run(tmp_path / "megatron", tmp_path / "hf", "hf", parity=True)
    assert there["parity"] == back["parity"] == json.loads((tmp_path / "hf" / "conversion.json").read_text())["parity"]
    found = there["parity"]
    assert 0 < found["largest_relative_difference"] <= TOLERANCE
    assert found["top1_agreement"] == 1.0
    assert found["prompts"] == 4
    hybrid = name.startswith("Nemotron")
    assert ("taken off" in found.get("dt_clamp", "")) is hybrid
    assert ("largest_relative_difference_with_dt_clamp" in found) is hybrid


def test_parity_that_fails_leaves_nothing(
    hf_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table that swaps the queries with the keys of a group passes the round trip; the logits tell."""
    from launcher.convert import links

    true = links.to_megatron, links.to_hf

    def turned(row: Any, shape: Any, tensors: Any) -> Any:
        made = true[0](row, shape, tensors)
        return [made[0].flip(0)] if row.transform == "qkv" else made

    def back(row: Any, shape: Any, tensors: Any) -> Any:
        return true[1](row, shape, [tensors[0].flip(0)] if row.transform == "qkv" else tensors)

    monkeypatch.setattr(links, "to_megatron", turned)
    monkeypatch.setattr(links, "to_hf", back)
    with (
        without_process_groups(),
        pytest.raises(WorldError, match=r"parity: logits of .* differ by \d\.\d+ of the larg"),
    ):
        run(hf_checkpoint("Llama-3.1-8B"), tmp_path / "megatron", "megatron", parity=True)
    assert not list(tmp_path.glob("megatron*"))
    assert run(hf_checkpoint("Llama-3.1-8B"), tmp_path / "blind", "megatron")["round_trip"] == "bit-exact"


@contextlib.contextmanager
def without_process_groups() -> Iterator[None]:
    """Let `--parity` make its own, and give the module's fixture others to end."""
    from launcher.workers.megatron import parallel

    torch.distributed.destroy_process_group()
    parallel.parallel_state.destroy_model_parallel()
    try:
        yield
    finally:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        parallel.parallel_state.initialize_model_parallel()


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Mistral-7B-v0.1", "granite-4.0-h-micro-base"])
def test_a_document_of_a_packed_sequence_is_to_transformers_a_text_of_its_own(
    name: str, converted: Callable[[str], Path], hf_checkpoint: Callable[..., Path]
) -> None:
    from launcher.workers.megatron import checkpoint
    from launcher.workers.megatron.documents import packed_documents
    from launcher.workers.megatron.model import build_model

    folder, ids, lengths = converted(name), tokens(name).view(1, -1), (7, 110, 1, 82)
    shape = shape_of(json.loads((folder / "hf" / "config.json").read_text()))
    model = build_model(shape, document_masking=True).eval()
    checkpoint.load_weights(folder, model)
    with torch.no_grad():
        logits = model(ids, None, None, packed_seq_params=packed_documents(lengths))[..., : shape.vocab_size]
    for mine, document in zip(logits.split(lengths, 1), ids.split(lengths, 1), strict=True):
        assert difference(mine, hf_logits(hf_checkpoint(name), document)) < TOLERANCE
