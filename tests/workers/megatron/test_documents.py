"""Masked documents: what each of a packed sequence gives is what it gives alone, and nothing reaches another."""

from __future__ import annotations

import pytest
import torch
import train_stages as ts
from torch import Tensor

from launcher.configs import Parallelism
from launcher.models.families import shape_of
from launcher.workers.megatron import layers
from launcher.workers.megatron.attention import TorchAttention
from launcher.workers.megatron.documents import Batch, model_inputs, packed_documents
from launcher.workers.megatron.model import build_model, initialize, transformer_config
from launcher.workers.megatron.parallel import process_groups

#: Of two sequences; one document fills all of the second but one token.
LENGTHS = ([3, 17, 1, 19], [39, 1])
MODELS = {
    "llama": ("llama-tiny", {}),
    "granite": ("granite-tiny", {}),
    "hybrid": ("nemotron-h-tiny", {}),
    "window": ("llama-tiny", {"model_type": "mistral", "sliding_window": 8}),
}


def models(name: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same weights with and without masking of documents."""
    base, changes = MODELS[name]
    shape = shape_of(ts.model(base, **changes)["config"])
    both = [build_model(shape, document_masking=masked) for masked in (True, False)]
    for model in both:
        initialize(model, shape, 0.2, 0)
    return both[0], both[1]


def a_batch(seed: int = 0) -> Batch:
    torch.manual_seed(seed)
    tokens, labels = torch.randint(0, 512, (2, 2, 40))
    return Batch(tokens, labels, torch.ones(2, 40), LENGTHS)


def losses(model: torch.nn.Module, batch: Batch) -> list[Tensor]:
    """Of each document, its losses."""
    inputs, _ = model_inputs(batch, torch.arange(40))
    return list(model(**inputs).flatten().split([n for row in LENGTHS for n in row]))


def alone(model: torch.nn.Module, batch: Batch) -> list[Tensor]:
    tokens, labels = (t.flatten().split([n for row in LENGTHS for n in row]) for t in (batch.tokens, batch.labels))
    return [
        model(t[None], torch.arange(len(t))[None], None, labels=want[None])[0]
        for t, want in zip(tokens, labels, strict=True)
    ]


@pytest.mark.parametrize("name", list(MODELS))
def test_a_document_has_the_losses_and_gradients_that_it_has_alone(name: str) -> None:
    batch = a_batch()
    with process_groups():
        masked, plain = models(name)
        mine, theirs = losses(masked, batch), alone(plain, batch)
        torch.cat(mine).sum().backward()
        torch.cat(theirs).sum().backward()
        unmasked = plain(batch.tokens, torch.arange(40).expand(2, -1), None, labels=batch.labels).flatten()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for (key, a), b in zip(masked.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4 * float(b.grad.abs().max()), msg=key)
    assert (unmasked - torch.cat(theirs)).abs().max() > 0.1, "these weights would let documents see each other"


@pytest.mark.parametrize("name", list(MODELS))
def test_no_gradient_reaches_another_document(name: str) -> None:
    batch = a_batch(1)
    with process_groups():
        masked, _ = models(name)
        found: list[Tensor] = []
        masked.embedding.register_forward_hook(lambda _m, _i, out: found.append(out))
        begin = 0
        for number, length in enumerate(n for row in LENGTHS for n in row):
            # megatron-core's cross-entropy can go backward once.
            (gradient,) = torch.autograd.grad(losses(masked, batch)[number].sum(), found.pop())
            touched, end = gradient.abs().sum((1, 2)) > 0, begin + length
            assert touched[begin:end].all()
            assert not touched[:begin].any() and not touched[end:].any()
            begin = end


def test_what_kernels_are_told() -> None:
    told = packed_documents((3, 130, 2))
    assert told.qkv_format == "thd" and told.cu_seqlens_q.dtype == torch.int32
    assert told.cu_seqlens_q.tolist() == told.cu_seqlens_kv.tolist() == [0, 3, 133, 135]
    assert told.max_seqlen_q == told.max_seqlen_kv == 192
    assert told.seq_idx is not None and told.seq_idx.tolist() == [[0] * 3 + [1] * 130 + [2] * 2]


def test_squares_are_of_documents_or_of_whole_sequences() -> None:
    batch = a_batch()
    assert batch.squares == 9 + 289 + 1 + 361 + 39**2 + 1
    assert Batch(batch.tokens, batch.labels).squares == 2 * 1600


@pytest.mark.parametrize("masked", [True, False])
def test_documents_over_context_parallel_ranks_are_not_left_to_transformer_engine(
    monkeypatch: pytest.MonkeyPatch, masked: bool
) -> None:
    """Its causal attention would pass over the mask in silence. It is not installed here: a plain stack stands in."""
    shape = shape_of(ts.model("granite-4.0-micro")["config"])  # a pattern without Mamba
    stack = layers.hybrid_layers(transformer_config(shape), shape)
    plain = stack.submodules.attention_layer.submodules.self_attention.submodules.core_attention
    monkeypatch.setattr(layers, "kernels", lambda: "transformer-engine")
    monkeypatch.setattr(layers, "fused_hybrid_stack", lambda: stack)
    found = layers.hybrid_layers(transformer_config(shape, Parallelism(context_parallel_size=2)), shape, masked)
    attention = found.submodules.attention_layer.submodules.self_attention.submodules.core_attention
    assert plain is not TorchAttention and attention is (TorchAttention if masked else plain)
