"""Best-fit packing: whole documents into sequences of one length, with as little padding as may be.

Best-fit decreasing (Ding et al. 2024, arXiv 2404.10830, section 3): the longest document first, each into the fullest
sequence that has room. Documents of one length are alike, and so are sequences with the same room, so they are placed
many at a time: the work goes with the number of lengths, not of documents.

A document of n tokens takes n - 1 places, for its last token is predicted and never read from.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

#: What a sequence holds, the longest first: pairs of a size and how many pieces of it.
Content = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Packed:
    """Pieces of documents in the order of the sequences that hold them.

    Sequence i holds the pieces `bounds[i]` .. `bounds[i + 1]`: of document `document`, from its token `offset` on,
    `size` places. `places` is the length of a sequence.
    """

    document: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int32]
    size: npt.NDArray[np.int32]
    bounds: npt.NDArray[np.int64]
    places: int

    @property
    def sequences(self) -> int:
        """How many sequences there are."""
        return len(self.bounds) - 1

    @property
    def padding(self) -> float:
        """The share of places that hold nothing."""
        return 1 - int(self.size.sum(dtype=np.int64)) / (self.sequences * self.places)


def pack(lengths: npt.NDArray[np.int32], places: int, seed: int) -> Packed:
    """Pack documents of so many tokens each. The seed says which of those that are as long as each other goes where.

    A document of more than `places` + 1 tokens is cut: each piece but the last fills a sequence, and the token that
    one ends by predicting is the first that the next reads.
    """
    document, offset, size = _pieces(lengths, places)
    order = np.random.default_rng(seed).permutation(len(size))
    order = order[np.argsort(size[order], kind="stable")].astype(np.int32 if len(size) < 2**31 else np.int64)
    counts = np.bincount(size, minlength=places + 1)
    begins = np.cumsum(counts) - counts  # of each size, where its pieces not yet placed begin in `order`
    taken, held = np.empty_like(order), []
    done = 0
    for content, sequences in best_fit(counts, places):
        row = sum(count for _, count in content)
        block = taken[done : done + sequences * row].reshape(sequences, row)
        column = 0
        for of_size, count in content:
            first = begins[of_size]
            block[:, column : column + count] = order[first : first + sequences * count].reshape(sequences, count)
            begins[of_size] += sequences * count
            column += count
        done += sequences * row
        held.append((row, sequences))
    rows = np.array(held, np.int64).reshape(-1, 2)
    bounds = np.concatenate([[0], np.cumsum(np.repeat(rows[:, 0], rows[:, 1]))])
    return Packed(document[taken], offset[taken], size[taken], bounds, places)


def _pieces(lengths: npt.NDArray[np.int32], places: int) -> tuple[npt.NDArray[np.int32], ...]:
    """The document, first token and size of each piece; documents of one token have nothing to predict and none."""
    wanted = lengths.astype(np.int32) - 1
    count = -(-wanted // places)
    document = np.repeat(np.arange(len(lengths), dtype=np.int32), count)
    number = np.arange(len(document), dtype=np.int64) - np.repeat(np.cumsum(count, dtype=np.int64) - count, count)
    offset = (number * places).astype(np.int32)
    return document, offset, np.minimum(wanted[document] - offset, places)


def best_fit(counts: npt.NDArray[np.int64], places: int) -> Iterator[tuple[Content, int]]:
    """Best-fit decreasing over `counts[s]` pieces of each size s; yields contents and how many sequences have them."""
    open_: dict[int, list[tuple[Content, int]]] = {places: [((), int(counts.sum()))]}  # by the room that is left
    rooms = [places]
    for size in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[size])
        while left:
            room = rooms[bisect_left(rooms, size)]
            group = open_[room]
            content, sequences = group.pop()
            # Once the fullest with room has taken one, it is still the fullest, so it takes all it has room for.
            each = min(room // size, left)
            used = min(sequences, left // each)
            if sequences > used:
                group.append((content, sequences - used))
            elif not group:
                del open_[room]
                rooms.remove(room)
            rest = room - each * size
            if rest not in open_:
                open_[rest] = []
                insort(rooms, rest)
            open_[rest].append(((*content, (size, each)), used))
            left -= used * each
    return (filled for room in rooms for filled in open_[room] if filled[0])
