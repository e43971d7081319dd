"""Samples that know their documents, over tokens that are their own places in the text."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import launcher.workers.megatron  # noqa: F401  must come before megatron.core
from launcher.errors import UserError
from launcher.workers.megatron.data import Blend, read_sources
from launcher.workers.megatron.parallel import process_groups
from launcher.workers.tokens import write_indexed

PLACES = 24
ALL = dict[str, Any](document_masking=True, packing="best-fit")


def write(folder: Path, name: str, lengths: list[int], first: int = 0) -> list[range]:
    """A source whose token number i is i, and its documents."""
    ends = np.cumsum(lengths) + first
    documents = [range(end - n, end) for n, end in zip(lengths, ends.tolist(), strict=True)]
    write_indexed(folder / name, documents, np.dtype(np.int32))
    return documents


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[range]]]:
    folder = tmp_path_factory.mktemp("counted")
    rng = np.random.default_rng(3)
    one = write(folder, "one", [*rng.integers(1, 60, 80).tolist(), 200, 1, 1, 2])
    return folder, {"one": one, "two": write(folder, "two", rng.integers(2, 10, 150).tolist(), 10_000)}


def blend(folder: Path, index: Path, weights: dict[str, float], samples: int, **options: Any) -> Blend:
    packing = options.get("packing", "concatenate")
    sources = read_sources({"prepare": folder}, PLACES, {f"prepare/{n}": w for n, w in weights.items()}, packing)
    return Blend(sources, samples, PLACES, options.pop("seed", 0), 20_000, index, **options)


def parts(data: Blend, first: int, count: int) -> list[tuple[list[int], list[int], list[float]]]:
    """Tokens, labels and mask of each document of these samples, padding as one too."""
    batch = data.batch(first, count)
    assert batch.lengths is not None and batch.loss_mask is not None
    found = []
    for row, lengths in enumerate(batch.lengths):
        assert sum(lengths) == PLACES and min(lengths) > 0
        split = (t[row].split(lengths) for t in (batch.tokens, batch.labels, batch.loss_mask))
        found += [(a.tolist(), b.tolist(), c.tolist()) for a, b, c in zip(*split, strict=True)]
    return found


def test_laid_end_to_end_a_document_is_told_apart_and_its_last_token_has_no_loss(
    text: tuple[Path, dict[str, list[range]]], tmp_path: Path
) -> None:
    folder, documents = text
    place = {token: (d, token == of[-1]) for d, of in enumerate(documents["one"]) for token in of}
    samples = sum(map(len, documents["one"])) // PLACES * 2
    with process_groups():
        masked = blend(folder, tmp_path, {"one": 1.0}, samples, document_masking=True)
        plain = blend(folder, tmp_path, {"one": 1.0}, samples)
        assert torch.equal(masked.batch(0, samples).tokens, plain.batch(0, samples).tokens)
        assert plain.batch(0, 4).lengths is None
        found = parts(masked, 0, samples)
    lasts = 0
    for tokens, labels, mask in found:
        assert len({place[t][0] for t in tokens}) == 1 and tokens == list(range(tokens[0], tokens[-1] + 1))
        assert mask == [float(not place[t][1]) for t in tokens]
        assert all(label == token + 1 for token, label, counts in zip(tokens, labels, mask, strict=True) if counts)
        lasts += mask.count(0.0)
    assert lasts > 100


def test_packed_documents_are_whole_and_every_prediction_comes_once_an_epoch(
    text: tuple[Path, dict[str, list[range]]], tmp_path: Path
) -> None:
    folder, documents = text
    ends = {of[-1] for of in documents["one"]}
    whole = {of[0]: len(of) for of in documents["one"] if 1 < len(of) <= PLACES + 1}
    with process_groups():
        probe = blend(folder, tmp_path / "probe", {"one": 1.0}, 1, **ALL)
        epoch = probe._data.datasets[0].packed.sequences
        data = blend(folder, tmp_path / "index", {"one": 1.0}, 2 * epoch + 3, **ALL)
        found = [parts(data, first, count) for first, count in [(0, epoch), (epoch, epoch), (2 * epoch, 3)]]
        (row,) = data.mix()
    for of_epoch in found[:2]:
        predicted = []
        for tokens, labels, mask in of_epoch:
            if mask[0]:
                assert tokens == list(range(tokens[0], tokens[-1] + 1)) and labels == [t + 1 for t in tokens]
                assert not ends & set(tokens), "the last token of a document takes no place"
                assert mask == [1.0] * len(mask)
                predicted += labels
            else:
                assert tokens == labels == [0] * len(tokens) and mask == [0.0] * len(mask)
        assert sorted(predicted) == sorted(t for of in documents["one"] for t in of[1:])
        begun = {tokens[0]: len(tokens) + 1 for tokens, _, mask in of_epoch if mask[0]}
        assert {first: begun[first] for first in whole} == whole
    assert [t for t, *_ in found[0]] != [t for t, *_ in found[1]]
    predictions = sum(len(of) - 1 for of in documents["one"])
    assert row["padding"] == pytest.approx(1 - predictions / (epoch * PLACES))
    assert row["epochs"] == pytest.approx(2 + 3 / epoch)
    assert row["tokens"] == pytest.approx((2 + 3 / epoch) * predictions, abs=1)


def test_packed_blends_follow_the_weights_in_tokens_and_the_seed(
    text: tuple[Path, dict[str, list[range]]], tmp_path: Path
) -> None:
    folder, _ = text
    with process_groups():
        mixed = blend(folder, tmp_path / "a", {"one": 1.0, "two": 3.0}, 400, **ALL)
        again = blend(folder, tmp_path / "a", {"one": 1.0, "two": 3.0}, 400, **ALL)  # from the index that is kept
        other = blend(folder, tmp_path / "a", {"one": 1.0, "two": 3.0}, 400, seed=1, **ALL)
        rows, batches = mixed.mix(), [b.batch(0, 400) for b in (mixed, again, other)]
        origins = Counter(mixed.origin(i)[0] for i in range(400))
    tokens = [row["tokens"] for row in rows]
    assert tokens[1] / sum(tokens) == pytest.approx(0.75, abs=0.005)
    assert all(0 < row["padding"] < 0.01 for row in rows)
    seen = sum(float(m.sum()) for m in (batches[0].loss_mask,) if m is not None)
    assert sum(tokens) == pytest.approx(seen, rel=0.02)  # epochs that are not whole have sequences of their own
    assert origins["prepare/one"] / 400 == pytest.approx(1 - origins["prepare/two"] / 400)
    assert torch.equal(batches[0].tokens, batches[1].tokens) and batches[0].lengths == batches[1].lengths
    assert not torch.equal(batches[0].tokens, batches[2].tokens)


def test_a_source_below_one_sequence_is_padded_and_one_without_predictions_refused(tmp_path: Path) -> None:
    write(tmp_path, "short", [5, 4])
    write(tmp_path, "empty", [1, 1, 1])
    with process_groups():
        short = blend(tmp_path, tmp_path / "index", {"short": 1.0}, 3, **ALL)
        assert short.mix() == [
            {"source": "prepare/short", "weight": 1.0, "tokens": 21, "epochs": 3.0, "padding": 1 - 7 / PLACES}
        ]
        assert short.batch(0, 3).loss_mask.sum() == 21  # type: ignore[union-attr]
        with pytest.raises(UserError, match=r"empty\.bin: no document has two tokens"):
            blend(tmp_path, tmp_path / "index", {"empty": 1.0}, 3, **ALL)
    with pytest.raises(UserError, match="do not fill one sequence"):
        read_sources({"prepare": tmp_path}, PLACES, {"prepare/short": 1.0})
