"""Initial weights, parameter counts and what the ends of a model do."""

from __future__ import annotations

import math

import pytest
import torch
import train_stages as ts
from torch import Tensor, nn

from launcher.errors import UserError
from launcher.models.families import shape_of
from launcher.models.shape import ModelShape
from launcher.workers.megatron import model as m
from launcher.workers.megatron.parallel import process_groups


def shape(name: str, **changes: object) -> ModelShape:
    return shape_of(ts.model(name, **changes)["config"])


def initial(of: ModelShape, seed: int = 0, std: float = 0.08) -> dict[str, Tensor]:
    """Every initial weight, by its key in a checkpoint (and layer)."""
    module = m.build_model(of)
    for parameter in module.parameters():
        parameter.data.fill_(float("nan"))
    m.initialize(module, of, std, seed)
    return {f"{piece.key}/{piece.global_offset}": piece.data.clone() for piece in m.sharded_tensors(module)}


@pytest.mark.parametrize("name", ["llama-tiny", "granite-tiny", "nemotron-h-tiny"])
def test_initial_weights_are_as_asked(name: str) -> None:
    """All are set; matrices have the standard deviation asked for, norms are 1; the seed decides, and nothing else."""
    of = shape(name)
    with process_groups():
        weights, again, other = initial(of), initial(of), initial(of, seed=1)
        wider = initial(of, std=0.16)
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    assert all(torch.equal(weight, again[key]) for key, weight in weights.items())
    matrices = [k for k, w in weights.items() if w.squeeze().dim() >= 2 and "conv1d" not in k]
    assert len(matrices) >= 10
    for key in matrices:
        size = weights[key].numel()
        assert weights[key].std().item() == pytest.approx(0.08, rel=6 / math.sqrt(2 * size)), key
        assert abs(weights[key].mean().item()) < 6 * 0.08 / math.sqrt(size), key
        assert not torch.equal(weights[key], other[key])
        torch.testing.assert_close(wider[key], 2 * weights[key])
    norms = [w for k, w in weights.items() if "norm" in k]
    assert norms and all((w == 1).all() for w in norms)


def test_mamba_parameters_are_initialised_as_its_authors_do() -> None:
    with process_groups():
        weights = initial(shape("nemotron-h-tiny"))
    for key, weight in weights.items():
        if "A_log" in key:
            assert ((weight.exp() >= 1) & (weight.exp() <= 16)).all()
        elif "dt_bias" in key:
            dt = nn.functional.softplus(weight)
            assert ((dt > 0.99e-3) & (dt < 0.101)).all()
            assert dt.max() > 3 * dt.min()
        elif ".D/" in key:
            assert (weight == 1).all()
        elif "conv1d" in key:
            assert weight.abs().max() <= 0.5  # 1 / sqrt(kernel of 4)


def test_rows_that_pad_the_vocabulary_are_zero_and_never_predicted() -> None:
    of = shape("llama-tiny", vocab_size=500)
    assert of.padded_vocab_size == 512
    with process_groups():
        module = m.build_model(of)
        m.initialize(module, of, 0.08, 0)
        ends = [module.embedding.word_embeddings.weight, module.output_layer.weight]
        assert all((end[500:] == 0).all() and (end[:500] != 0).any(1).all() for end in ends)
        tokens = torch.arange(8)[None]
        logits = module(tokens, tokens, None)
        assert torch.isinf(logits[..., 500:]).all()
        assert torch.isfinite(logits[..., :500]).all()
        module(tokens, tokens, None, labels=tokens).sum().backward()
        assert (ends[1].grad[500:] == 0).all()
        assert all(torch.isfinite(p.grad).all() for p in module.parameters())


def test_granite_multipliers_each_change_the_logits() -> None:
    """Against the same weights with a multiplier left out; the logits' scale by its definition."""
    names = {
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 0.3,
        "logits_scaling": 1.0,
    }
    tokens = torch.arange(8)[None]
    logits = {}
    with process_groups():
        for name, value in {"": 0.0, **names}.items():
            of = shape("granite-tiny", **({name: value} if name else {}))
            module = m.build_model(of)
            m.initialize(module, of, 0.08, 0)
            logits[name] = module(tokens, tokens, None).detach()
    torch.testing.assert_close(logits["logits_scaling"], 4.0 * logits[""])
    for name in names:
        assert (logits[name] - logits[""]).abs().max() > 1e-3, name


def test_rope_scaling_that_megatron_core_does_not_know_is_refused() -> None:
    with process_groups(), pytest.raises(UserError, match="RoPE of type yarn|rope"):
        m.build_model(shape("llama-tiny", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}))
