"""Training samples that know their documents: megatron-core's, laid end to end, and best-fit packed ones.

Where a document ends is the index's word (`NAME.idx`, one sequence a document), not that of a token that a text might
hold too. A sample is a dict: `tokens`, `labels`, `loss_mask`, s each; `lengths` of its documents, which sum to s.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset

from launcher.errors import UserError
from launcher.workers.megatron.packing import Packed, pack

_PIECES = ("document", "offset", "size", "bounds")


class Sample(TypedDict):
    """A training sample; megatron-core's own have more keys, and no lengths."""

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    lengths: list[int]


class ConcatenatedDocuments(GPTDataset):
    """megatron-core's samples; the last token of a document has no loss, for what it would predict is another's."""

    def __getitem__(self, idx: int) -> Sample:
        """The sample of a number."""
        sample: Sample = super().__getitem__(idx)
        starts = self._starts(idx)
        sample["loss_mask"] = sample["loss_mask"].clone()  # megatron-core keeps the first it gives
        sample["loss_mask"][starts - 1] = 0.0
        sample["lengths"] = self.lengths(idx)
        return sample

    def lengths(self, idx: int) -> list[int]:
        """The lengths of a sample's documents, without reading any of them."""
        places, starts = self.config.sequence_length, self._starts(idx)
        bounds = [0, *starts[starts < places].tolist(), places]
        return [b - a for a, b in zip(bounds[:-1], bounds[1:], strict=True)]

    def _starts(self, idx: int) -> npt.NDArray[np.int64]:
        """Where documents begin in a sample, but for the first; one may begin right behind it."""
        row = self.shuffle_index[idx]
        (first, begin), (last, _) = self.sample_index[row], self.sample_index[row + 1]
        # The last of them reaches to the end of the sample, however much longer it is.
        whole = self.dataset.sequence_lengths[self.document_index[first:last]]
        starts: npt.NDArray[np.int64] = np.cumsum(whole, dtype=np.int64) - begin
        return starts


class PackedDocuments:
    """Best-fit packed sequences of one source, in an order of their own each epoch. `folder` is what `write` left."""

    def __init__(self, prefix: str, folder: Path, places: int) -> None:
        document, offset, size, bounds = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in _PIECES)
        self.packed = Packed(document, offset, size, bounds, places)
        self.order = np.load(folder / "order.npy", mmap_mode="r")
        self._text = IndexedDataset(prefix)

    def __getitem__(self, idx: int) -> Sample:
        """The sample of a number."""
        packed = self.packed
        row = self.order[idx]
        held = slice(*packed.bounds[row : row + 2].tolist())
        tokens, labels = np.zeros((2, packed.places), np.int64)
        sizes, end = packed.size[held].tolist(), 0
        for document, offset, size in zip(packed.document[held], packed.offset[held], sizes, strict=True):
            text = self._text.get(int(document), int(offset), size + 1)
            tokens[end : end + size], labels[end : end + size] = text[:-1], text[1:]
            end += size
        mask = torch.ones(packed.places)
        mask[end:] = 0.0
        return {
            "tokens": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "loss_mask": mask,
            "lengths": self.lengths(idx),
        }

    def lengths(self, idx: int) -> list[int]:
        """The lengths of a sample's documents and of its padding, without reading any of them."""
        row = self.order[idx]
        found = self.packed.size[slice(*self.packed.bounds[row : row + 2].tolist())].tolist()
        padding = self.packed.places - sum(found)
        return [*found, padding] if padding else found


class PackedBlend:
    """Packed sources, blended by weight as megatron-core blends; a sample is of one source."""

    def __init__(self, prefixes: Sequence[str], folder: Path, places: int) -> None:
        self.datasets = [PackedDocuments(p, folder / str(i), places) for i, p in enumerate(prefixes)]
        self.dataset_index = np.load(folder / "dataset_index.npy", mmap_mode="r")
        self.dataset_sample_index = np.load(folder / "dataset_sample_index.npy", mmap_mode="r")

    def __getitem__(self, idx: int) -> Sample:
        """The sample of a number."""
        return self.datasets[int(self.dataset_index[idx])][int(self.dataset_sample_index[idx])]


def write_packed(
    prefixes: Sequence[str], weights: Sequence[float], samples: int, places: int, seed: int, folder: Path
) -> None:
    """Pack every source and blend `samples` sequences of them, `weights` being shares of tokens.

    Raises UserError for a source that has nothing to predict.
    """
    packs = []
    for number, prefix in enumerate(prefixes):
        text = IndexedDataset(prefix)
        packs.append(pack(text.sequence_lengths.copy(), places, seed + number))
        if not packs[-1].sequences:
            raise UserError(f"{prefix}.bin: no document has two tokens, so there is none to predict; add text")
    index, numbers = np.zeros(samples, np.int16), np.zeros(samples, np.int64)
    shares = np.array([w / (1 - p.padding) for w, p in zip(weights, packs, strict=True)])
    helpers.build_blending_indices(index, numbers, shares / shares.sum(), len(packs), samples, False)
    np.save(folder / "dataset_index.npy", index)
    np.save(folder / "dataset_sample_index.npy", numbers)
    drawn = np.bincount(index, minlength=len(packs)).tolist()
    for number, (packed, count) in enumerate(zip(packs, drawn, strict=True)):
        own = folder / str(number)
        own.mkdir()
        for name in _PIECES:
            np.save(own / f"{name}.npy", getattr(packed, name))
        np.save(own / "order.npy", _order(packed.sequences, count, seed + number))


def _order(sequences: int, count: int, seed: int) -> npt.NDArray[np.int64]:
    """The numbers of `count` sequences, every one of them once an epoch."""
    rng = np.random.default_rng([seed, 1])
    epochs = [rng.permutation(sequences) for _ in range(max(1, -(-count // sequences)))]
    return np.concatenate(epochs)[: max(count, 1)]
