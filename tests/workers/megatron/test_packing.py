"""Best-fit packing against the algorithm written out plainly, piece by piece."""

from __future__ import annotations

import numpy as np
import pytest

from launcher.workers.megatron.packing import Packed, pack


def rooms(sizes: list[int], places: int) -> list[int]:
    """The room that best-fit decreasing leaves in each sequence."""
    left: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [room for room in left if room >= size]
        if fitting:
            left.remove(min(fitting))
        left.append((min(fitting) if fitting else places) - size)
    return sorted(left)


def held(packed: Packed) -> list[list[tuple[int, int, int]]]:
    """Of each sequence: document, offset and size of its pieces."""
    pieces = list(zip(packed.document.tolist(), packed.offset.tolist(), packed.size.tolist(), strict=True))
    return [pieces[a:b] for a, b in zip(packed.bounds[:-1], packed.bounds[1:], strict=True)]


@pytest.mark.parametrize("seed", range(40))
def test_it_is_best_fit_decreasing_and_holds_every_prediction_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    places = int(rng.integers(3, 60))
    lengths = rng.integers(1, 2 * places, rng.integers(1, 200)).astype(np.int32)
    packed = pack(lengths, places, seed)
    sequences = held(packed)
    left = [places - sum(size for *_, size in pieces) for pieces in sequences]
    assert sorted(left) == rooms(packed.size.tolist(), places)
    assert packed.padding == pytest.approx(sum(left) / (places * len(sequences)))
    predicted = sorted((d, offset + 1 + i) for p in sequences for d, offset, size in p for i in range(size))
    assert predicted == [(d, i) for d, length in enumerate(lengths) for i in range(1, length)]


def test_only_documents_that_do_not_fit_are_cut() -> None:
    packed = pack(np.array([11, 12, 25, 1, 2], np.int32), 10, 0)
    pieces = sorted(piece for sequence in held(packed) for piece in sequence)
    assert pieces == [(0, 0, 10), (1, 0, 10), (1, 10, 1), (2, 0, 10), (2, 10, 10), (2, 20, 4), (4, 0, 1)]
    assert packed.sequences == 5


def test_the_seed_says_which_of_equal_documents_goes_where() -> None:
    lengths = np.random.default_rng(0).integers(2, 9, 300).astype(np.int32)
    first, again, other = (pack(lengths, 20, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.document, again.document)
    assert not np.array_equal(first.document, other.document)
    assert np.array_equal(first.size, other.size)


def test_nothing_to_predict_is_no_sequence() -> None:
    assert pack(np.ones(5, np.int32), 10, 0).sequences == 0
