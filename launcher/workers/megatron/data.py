"""Training data: megatron-core's own datasets over `NAME.bin`/`NAME.idx`, blended by weight, in a fixed order.

Sample number i of a blend depends on the sources, weights, sequence length, number of samples and seed alone, so a run
that has consumed n samples goes on with sample n, on any parallel layout.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType

from launcher.errors import UserError, WorldError
from launcher.references import item_of, split_ref
from launcher.store import sync_tree
from launcher.workers.megatron.documents import Batch
from launcher.workers.megatron.parallel import sum_over_ranks
from launcher.workers.megatron.samples import ConcatenatedDocuments, PackedBlend, Sample, write_packed

Packing = Literal["concatenate", "best-fit"]

_INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the token type, sequences, documents
_INDEX_MAGIC = b"MMIDIDX\x00\x00"


@dataclass(frozen=True)
class Source:
    """Token files that training reads: `prefix` plus .bin and .idx; `weight` is the share of tokens wanted."""

    name: str
    prefix: Path
    weight: float
    tokens: int


def read_sources(
    folders: Mapping[str, Path], seq_length: int, weights: Mapping[str, float], packing: Packing = "concatenate"
) -> tuple[Source, ...]:
    """The sources of a blend. `folders` maps a stage to its port `tokens`; `weights` maps STAGE/NAME to a weight.

    Raises UserError with everything that is wrong with the files.
    """
    problems: list[str] = []
    counts: list[int] = []
    for name in weights:
        prefix = _prefix(folders, name)
        try:
            counts.append(count_tokens(prefix))
        except UserError as error:
            problems += error.problems
            continue
        if counts[-1] <= seq_length and packing == "concatenate":
            problems.append(
                f"{prefix}.bin: {counts[-1]} tokens do not fill one sequence; add text or lower seq_length {seq_length}"
            )
    if problems:
        raise UserError(problems)
    return _sources(folders, weights, counts)


def told_sources(
    folders: Mapping[str, Path], weights: Mapping[str, float], found: Sequence[Source] | None
) -> tuple[Source, ...]:
    """The sources on every rank, as rank 0 `found` them: a rank that reads whole indexes itself takes minutes."""
    if not weights:
        return ()
    counts = sum_over_ranks([float(s.tokens) for s in found] if found is not None else [0.0] * len(weights))
    return _sources(folders, weights, [int(count) for count in counts])


def _prefix(folders: Mapping[str, Path], name: str) -> Path:
    return folders[split_ref(name)[0]] / item_of(name)


def _sources(folders: Mapping[str, Path], weights: Mapping[str, float], counts: Sequence[int]) -> tuple[Source, ...]:
    total = sum(weights.values())
    named = zip(weights.items(), counts, strict=True)
    return tuple(Source(name, _prefix(folders, name), weight / total, n) for (name, weight), n in named)


def count_tokens(prefix: Path) -> int:
    """Tokens in `prefix`.bin, after its index; raises UserError where the two are not whole and of one piece."""
    index, content = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    absent = next((p for p in (index, content) if not p.is_file()), None)
    if absent:
        known = ", ".join(sorted(p.stem for p in prefix.parent.glob("*.idx"))) or "none"
        raise UserError(f"{absent}: no such file; sources there: {known}")
    with index.open("rb") as file:
        head = file.read(_INDEX_HEADER.size)
    if len(head) < _INDEX_HEADER.size or not head.startswith(_INDEX_MAGIC):
        raise UserError(f"{index}: not an index of Megatron's IndexedDataset; make the prepare stage anew")
    _, _, code, sequences, documents = _INDEX_HEADER.unpack(head)
    if index.stat().st_size != len(head) + sequences * (4 + 8) + documents * 8:
        raise UserError(f"{index}: cut off or damaged; make the prepare stage anew")
    if code not in {kind.value for kind in DType}:
        raise UserError(f"{index}: token type {code} is unknown; make the prepare stage anew")
    width = DType.size(code)
    lengths, starts, bounds = _read_index(index, sequences, documents)
    ends = np.cumsum(lengths, dtype=np.int64) * width
    fits = (lengths > 0).all() and np.array_equal(starts[1:], ends[:-1]) and (starts[:1] == 0).all()
    fits = fits and (np.diff(bounds) >= 0).all() and bounds[:1].tolist() == [0] and bounds[-1] == sequences
    if not fits:
        raise UserError(f"{index}: damaged: lengths and places do not follow each other; make the prepare stage anew")
    tokens = int(lengths.sum(dtype=np.int64))
    wanted = tokens * width
    if content.stat().st_size != wanted:
        raise UserError(
            f"{content}: {content.stat().st_size} bytes, its index wants {wanted}; make the prepare stage anew"
        )
    return tokens


def _read_index(
    index: Path, sequences: int, documents: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Tokens of each sequence, the byte each starts at, and the first sequence of each document."""
    with index.open("rb") as file:
        file.seek(_INDEX_HEADER.size)
        return (
            np.fromfile(file, np.int32, sequences),
            np.fromfile(file, np.int64, sequences),
            np.fromfile(file, np.int64, documents),
        )


class _Tokenizer:
    """What GPTDataset asks of a tokenizer. No id is padding: sequences are packed, so none is ever padded or masked."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.pad, self.eod = vocab_size, -1, None
        self.unique_identifiers = {"vocab_size": vocab_size}


class Blend:
    """The samples of a run, by number. Build it on every rank at once; rank 0 makes the index that the others read.

    `folder` keeps the index for the attempts that follow. With `document_masking` batches tell of their documents.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        samples: int,
        seq_length: int,
        seed: int,
        vocab_size: int,
        folder: Path,
        *,
        document_masking: bool = False,
        packing: Packing = "concatenate",
    ) -> None:
        self.sources, self.samples, self.seq_length, self.vocab_size = tuple(sources), samples, seq_length, vocab_size
        self.document_masking, self.packing = document_masking, packing
        kind = [samples, seq_length, seed, document_masking, packing]
        key = json.dumps([[str(s.prefix), s.tokens, s.weight] for s in sources] + kind)
        cache = folder / hashlib.sha256(key.encode()).hexdigest()[:16]
        building = cache.with_name(f"{cache.name}.partial")
        # Rank 0's word: on a network file system others may not see yet what it sees.
        whole = sum_over_ranks([float(dist.get_rank() == 0 and cache.exists())]) == [1.0]
        if not whole and dist.get_rank() == 0:
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir(parents=True)
            if packing == "best-fit":
                write_packed(*self._blend(), samples, seq_length, seed, building)
        dist.barrier()
        place = cache if whole else building
        self._data: Any
        if packing == "best-fit":
            self._data = PackedBlend(self._blend()[0], place, seq_length)
        else:
            self._data = self._concatenated(seed, place)
        dist.barrier()
        if not whole and dist.get_rank() == 0:
            sync_tree(building)
            os.replace(building, cache)

    def _blend(self) -> tuple[list[str], list[float]]:
        return [str(s.prefix) for s in self.sources], [s.weight for s in self.sources]

    def _concatenated(self, seed: int, cache: Path) -> Any:
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=self.seq_length,
            blend=self._blend(),
            split="1,0,0",
            path_to_cache=str(cache),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            tokenizer=_Tokenizer(self.vocab_size),
        )
        kind = ConcatenatedDocuments if self.document_masking else GPTDataset
        builder = BlendedMegatronDatasetBuilder(kind, [self.samples, 0, 0], lambda: True, config)
        return builder.build()[0]

    def origin(self, sample: int) -> tuple[str, int]:
        """The source that a sample is from, and its number there."""
        if len(self.sources) == 1 and self.packing == "concatenate":
            return self.sources[0].name, sample
        return self.sources[self._data.dataset_index[sample]].name, int(self._data.dataset_sample_index[sample])

    def mix(self) -> list[dict[str, Any]]:
        """Of each source: the weight asked for, the tokens that the run draws and how many epochs these are.

        Of packed sources, the share of padding too, which is no part of the tokens.
        """
        drawn = [self.samples]
        if len(self.sources) > 1:
            drawn = np.bincount(self._data.dataset_index[: self.samples], minlength=len(self.sources)).tolist()
        rows = []
        for number, (source, count) in enumerate(zip(self.sources, drawn, strict=True)):
            row = {"source": source.name, "weight": source.weight}
            if self.packing == "best-fit":
                packed = self._data.datasets[number].packed
                tokens = round(count * self.seq_length * (1 - packed.padding))
                row |= {"tokens": tokens, "epochs": count / packed.sequences, "padding": packed.padding}
            else:
                tokens = count * self.seq_length
                row |= {"tokens": tokens, "epochs": tokens / source.tokens}
            rows.append(row)
        return rows

    def batch(self, first: int, count: int) -> Batch:
        """Samples first .. first + count. Raises UserError for a token that the model has not."""
        samples = [self._sample(i) for i in range(first, first + count)]
        tokens = torch.stack([s["tokens"] for s in samples])
        labels = torch.stack([s["labels"] for s in samples])
        highest = int(torch.maximum(tokens.max(), labels.max()))
        if highest >= self.vocab_size:
            names = ", ".join(sorted({self.origin(i)[0] for i in range(first, first + count)}))
            raise UserError(
                f"data: token id {highest} in {names} is outside the model's vocabulary of {self.vocab_size}; "
                "prepare the data with the model's own tokenizer"
            )
        if not self.document_masking and self.packing == "concatenate":
            return Batch(tokens, labels)
        mask = torch.stack([s["loss_mask"] for s in samples])
        return Batch(tokens, labels, mask, tuple(s["lengths"] for s in samples) if self.document_masking else None)

    def _sample(self, number: int) -> Sample:
        """A sample. Where it cannot be read, the error names its file."""
        try:
            sample: Sample = self._data[number]
            return sample
        except (OSError, ValueError, IndexError) as error:
            source, _ = self.origin(number)
            prefix = next(s.prefix for s in self.sources if s.name == source)
            told = f"{prefix}.bin: sample {number} cannot be read: {error}"
            raise (OSError(error.errno, told) if isinstance(error, OSError) else WorldError(told)) from error

    def without_text(self, first: int, count: int) -> Batch:
        """Samples first .. first + count as a pipeline stage wants them that has neither end of the model."""
        if not self.document_masking:
            return Batch()
        return Batch(lengths=tuple(self._lengths(i) for i in range(first, first + count)))

    def _lengths(self, number: int) -> list[int]:
        data = self._data
        if not hasattr(data, "dataset_index"):
            return list(data.lengths(number))
        return list(data.datasets[data.dataset_index[number]].lengths(int(data.dataset_sample_index[number])))

    def micro_batches(
        self, first: int, last: int, size: int, rank: int, ranks: int, *, text: bool = True
    ) -> Iterator[Batch]:
        """This data-parallel rank's micro-batches of the samples first .. last, `size` sequences each."""
        read = self.batch if text else self.without_text
        for start in range(first, last, size * ranks):
            yield read(start + rank * size, size)
