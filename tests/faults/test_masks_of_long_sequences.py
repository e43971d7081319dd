"""What attention sees at 131,072 tokens: no mask that grows with the square of the sequence, on whatever layout."""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
import torch

import launcher.workers.megatron  # noqa: F401  must come before megatron.core
from launcher.workers.megatron import attention
from launcher.workers.megatron.attention import TorchAttention, context_positions, pieces

LENGTHS = ([48], [5, 1, 20, 22], [1] * 48, [24, 24], [47, 1])


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("window", [None, 0, 3, 11])
def test_pieces_see_what_a_mask_of_all_would_show(lengths: list[int], size: int, window: int | None) -> None:
    total = sum(lengths)
    ends = list(accumulate(lengths))
    document = torch.tensor([next(i for i, end in enumerate(ends) if place < end) for place in range(total)])
    for rank in range(size):
        mine = context_positions(total, size, rank)
        distance = mine[:, None] - torch.arange(total)[None, :]
        wanted = (distance >= 0) & (document[mine][:, None] == document[None, :])
        wanted &= (distance <= window) if window is not None else True
        found = torch.zeros_like(wanted)
        rows = 0
        for piece in pieces(lengths, size, rank, window, most=4):
            own = torch.arange(piece.keys.start, piece.keys.stop)
            queries = mine[piece.rows]
            assert queries[-1] == own[-1], "the last query's own key is the last"
            apart = queries[:, None] - own[None, :]
            found[piece.rows, piece.keys] = (apart >= 0) & (window is None or apart <= window)
            rows += len(queries)
        assert rows == len(mine) and torch.equal(found, wanted)


@pytest.mark.parametrize("size", [1, 4, 8])
def test_at_full_length_no_piece_is_large_with_a_window_and_few_are_without(size: int) -> None:
    total, window = 131072, 4095
    for rank in {0, size - 1}:
        cut = pieces([total], size, rank, window)
        areas = [(p.rows.stop - p.rows.start) * (p.keys.stop - p.keys.start) for p in cut]
        assert max(areas) <= 4096 * (4096 + window), "a mask of 32 MiB, and not of 16 GiB"
        assert len({(p.rows.stop - p.rows.start, p.keys.stop - p.keys.start) for p in cut}) <= 3, "made once for all"
        assert len(pieces([total], size, rank)) == (1 if size == 1 else 2)
        assert len(pieces([1024] * 128, size, rank)) == 128 // size


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Attention by the book: one mask for all, keys repeated over the heads of a group."""
    repeat = query.shape[2] // key.shape[2]
    q, k, v = query, key.repeat_interleave(repeat, 2), value.repeat_interleave(repeat, 2)
    scores = torch.einsum("sbhc,tbhc->bhst", q, k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return torch.einsum("bhst,tbhc->sbhc", weights, v).flatten(2)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("lengths", [[20], [3, 9, 8]])
def test_values_and_gradients_are_those_of_one_mask(
    monkeypatch: pytest.MonkeyPatch, window: int | None, lengths: list[int]
) -> None:
    from launcher.workers.megatron.model import transformer_config

    monkeypatch.setattr(attention, "_ROWS", 4)
    monkeypatch.setattr(attention.pieces, "__defaults__", (1, 0, None, 4))
    from real_models import twin

    from launcher.models.families import shape_of

    config = transformer_config(shape_of(twin("Llama-3.1-8B")))
    config.window_size, config.kv_channels = (window, 0) if window else None, 8
    made = TorchAttention(config, 1, None, "self")
    total = sum(lengths)
    torch.manual_seed(0)
    q, k, v = (torch.randn(total, 2, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    distance = torch.arange(total)[:, None] - torch.arange(total)[None, :]
    seen = (distance >= 0) & (document[:, None] == document[None, :])
    seen &= (distance <= window) if window else True
    found, wanted = made._attend_all(q, k, v, lengths), plain(q, k, v, seen)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (found, wanted))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
