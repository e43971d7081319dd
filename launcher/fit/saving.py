"""A save of a training's progress and a resume from it: bytes, host memory, files and time at any scale. Pure.

Each rank writes its own share of the optimizer's state and of the weights that are not trained, in a file of its own,
and reads the same again. `tests/scale` counts all of it on up to eight ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from launcher.fit.layers import Architecture, layer_parameters, rank_parameters, stages_of
from launcher.fit.memory import Layout

#: Bytes of a trained parameter in a checkpoint to resume from: fp32 weight or master weight, and two moments.
STATE_BYTES = 12
#: Bytes of host memory that are taken at a time; the last are rounded up to a power of two where they are pinned.
_CHUNK = 1 << 28
#: Bytes of the index for a parameter's part, and for a range of it: 205 and 27 seen.
_PART, _PIECE = 300, 40
#: megatron-core's bucket of gradients: at least so many elements, and so many for each data-parallel rank.
_BUCKET, _BUCKET_A_RANK = 40_000_000, 1_000_000
#: Bytes a second between a GPU and pinned memory, when all of a node copy at once.
_COPY = 10e9


@dataclass(frozen=True)
class Saving:
    """What one save takes. A resume on the same layout reads what `rank_bytes` and `total_bytes` say.

    total_bytes: on disk; rank_bytes: written by the busiest rank; host_bytes: of a node's memory, from the first save
    on; index_bytes: of the one file that every rank reads at a resume; files: a file a rank, index and tracker.
    """

    total_bytes: float
    rank_bytes: float
    host_bytes: float
    index_bytes: float
    files: int

    @property
    def stall_seconds(self) -> float:
        """What the training waits: the copy off the GPU."""
        return self.rank_bytes / _COPY

    def seconds(self, bytes_per_second: float) -> float:
        """Until a save that is waited for, as at the time limit, is on a file system that takes so much."""
        return self.stall_seconds + (self.total_bytes + self.index_bytes) / bytes_per_second

    def bandwidth(self, seconds: float) -> float:
        """Bytes a second that the file system must take for a save to end in so many seconds, such as `save_s`."""
        left = seconds - self.stall_seconds
        return (self.total_bytes + self.index_bytes) / left if left > 0 else math.inf


def saving_of(
    a: Architecture, layout: Layout, *, gpus_per_node: int = 8, trainable: Literal["all", "attention"] = "all"
) -> Saving:
    """What a save takes under a layout. Raises ValueError where the layers do not divide over the stages."""
    shards = layout.dp * layout.cp
    stages = [_stage_bytes(a, layout, stage, trainable) for stage in range(layout.pp)]
    total = sum(stages) * layout.tp - _written_once(a, layout, trainable)
    share = max(stages) / shards
    rest = share % _CHUNK
    host = share - rest + (2 ** math.ceil(math.log2(rest)) if rest > 1 else rest)
    return Saving(total, share, host * min(gpus_per_node, layout.gpus), _index_bytes(a, layout), layout.gpus + 2)


def _stage_bytes(a: Architecture, layout: Layout, stage: int, trainable: str) -> float:
    """Bytes of the state that a tensor-parallel rank of a stage and its data-parallel peers hold together."""
    count = rank_parameters(a, layout.tp, layout.pp, stage)
    if trainable == "all":
        return STATE_BYTES * count
    attention = stages_of(a, layout.pp)[stage].count("*") * (layer_parameters(a, "*", layout.tp) - a.hidden)
    return STATE_BYTES * attention + layout.width * (count - attention)


def _written_once(a: Architecture, layout: Layout, trainable: str) -> float:
    """Bytes that several ranks hold and one writes: norms under tensor parallelism, a tied matrix at both ends."""
    width = STATE_BYTES if trainable == "all" else layout.width
    norms = a.hidden * (len(a.pattern) + 1) * (layout.tp - 1)
    return width * (norms + (a.padded_vocab * a.hidden if a.tied and layout.pp > 1 else 0))


def _index_bytes(a: Architecture, layout: Layout) -> float:
    shards = layout.dp * layout.cp
    parts = 8 * len(a.pattern) + 3
    buckets = sum(
        math.ceil(rank_parameters(a, layout.tp, layout.pp, stage) / max(_BUCKET, _BUCKET_A_RANK * shards))
        if stage == 0
        else 1
        for stage in range(layout.pp)
    )
    return layout.tp * (parts * (_PART + _PIECE) + buckets * shards * _PIECE)
