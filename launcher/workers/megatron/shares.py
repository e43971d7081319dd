"""What of a training's state this rank holds, and how progress names, keeps and finds it again.

A rank's share of a parameter is a flat range of the part that its tensor-parallel rank holds: of the master weight and
the moments the range that the distributed optimizer gave it, of a weight that is not trained an equal range for each
data-parallel rank. Shares are named by the model's global tensors, as a checkpoint of weights names them. So nothing
depends on buckets, on data, context or pipeline parallelism, or on which layers hold the parameter; and `tiles` say
which boxes of global tensors a part consists of, so that another tensor-parallel size finds its own in it.
"""

from __future__ import annotations

import json
import math
import os
import socket
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory, apply_factories
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor, nn

from launcher.errors import UserError
from launcher.workers.megatron.model import sharding_metadata

#: Raised whenever older progress could not be read as it was meant.
VERSION = 1
INDEX = "progress.json"
#: What is there, and no index, in progress of megatron-core's format, as older versions wrote it.
_OLDER = ".metadata"
#: Bytes copied to or from a GPU at a time; a power of two, to which pinned memory is rounded up.
CHUNK = 1 << 28
_OPEN_FILES = 32


@dataclass(frozen=True)
class Tile:
    """A box of a global tensor, whole rows of a part; a layer of a stacked tensor is named in the key."""

    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def row(self) -> int:
        """Elements of a row."""
        return math.prod(self.shape[1:])


@dataclass(frozen=True)
class Share:
    """The range [start, start + count) of a part: flat tensors by what they are, such as param and exp_avg, all live.

    `tiles` follow each other in the part. `main` is false where another rank, not a data-parallel one, holds the same.
    """

    name: str
    tiles: tuple[Tile, ...]
    start: int
    count: int
    states: Mapping[str, Tensor]
    main: bool


def trained(sharded: Mapping[str, Any], optimizer: ChainedOptimizer) -> list[Share]:
    """This rank's shares of what is trained, `param` in fp32; `sharded` is the model's sharded state dict."""
    entries = {id(entry.data): entry for entry in _tensors(sharded)}
    found = []
    for part in optimizer.chained_optimizers:
        for parameter in part.model_param_gbuf_map:
            place = part._get_model_param_range_map(parameter)["param"]
            states = part._get_main_param_and_optimizer_states(parameter)
            flat = {name: tensor.detach() for name, tensor in states.items() if name != "step"}
            found.append(_share(entries[id(parameter)], place.start, place.end, flat))
    return found


def frozen(sharded: Mapping[str, Any]) -> list[Share]:
    """This rank's shares of weights and buffers that are not trained."""
    rank, ranks = _data_parallel()
    found = []
    for entry in _tensors(sharded):
        if not entry.data.requires_grad:
            flat, each = entry.data.detach().view(-1), -(-entry.data.numel() // ranks)
            start, end = min(rank * each, flat.numel()), min((rank + 1) * each, flat.numel())
            found.append(_share(entry, start, end, {"param": flat[start:end]}))
    return found


def objects(sharded: Mapping[str, Any]) -> Iterator[tuple[str, ShardedObject]]:
    """What modules keep beside tensors, by the name in the state dict: FP8's scales, where there are any."""
    return ((name, value) for name, value in sharded.items() if isinstance(value, ShardedObject))


def exchange_frozen(sharded: Mapping[str, Any]) -> None:
    """Let every data-parallel rank hold all of the weights that are not trained, of which each has read its share."""
    rank, ranks = _data_parallel()
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    for entry in _tensors(sharded):
        if ranks > 1 and not entry.data.requires_grad:
            flat, each = entry.data.detach().view(-1), -(-entry.data.numel() // ranks)
            whole = torch.zeros(each * ranks, dtype=flat.dtype, device=flat.device)
            whole[: flat.numel()] = flat
            torch.distributed.all_gather_into_tensor(whole, whole[rank * each : (rank + 1) * each].clone(), group=group)
            flat.copy_(whole[: flat.numel()])


def is_main(replica: Sequence[int]) -> bool:
    """Whether no rank but data-parallel ones holds the same as this one."""
    return not any(replica[:-1])


def _data_parallel() -> tuple[int, int]:
    return (
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
        parallel_state.get_data_parallel_world_size(with_context_parallel=True),
    )


def _tensors(sharded: Mapping[str, Any]) -> Iterator[ShardedTensor | ShardedTensorFactory]:
    return (v for v in nested_values(dict(sharded)) if isinstance(v, ShardedTensor | ShardedTensorFactory))


def _share(entry: ShardedTensor | ShardedTensorFactory, start: int, end: int, states: Mapping[str, Tensor]) -> Share:
    made = {"": entry}
    apply_factories(made)
    # A Mamba mixer's in_proj is five tensors of a checkpoint, a gated fc1 two boxes of one.
    pieces = sorted(nested_values(made), key=lambda piece: piece.data.storage_offset())
    at = entry.data.storage_offset()
    for piece in pieces:
        if piece.data.storage_offset() != at or not piece.data.is_contiguous():
            raise RuntimeError(f"{entry.key}: its part of {piece.key} is no range of rows")
        at += piece.data.numel()
    layer = _layer(pieces[0])
    tiles = tuple(
        Tile(p.key + _layer(p), tuple(p.global_offset[p.prepend_axis_num :]), tuple(p.data.shape)) for p in pieces
    )
    return Share(entry.key + layer, tiles, start, end - start, states, is_main(entry.replica_id))


def _layer(piece: ShardedTensor) -> str:
    return "".join(f"[{index}]" for index in piece.global_offset[: piece.prepend_axis_num])


# -------------------------------------------------------------------------------------------------------- to a file


@dataclass
class Content:
    """The bytes of this rank's file, in memory of their own, and what they are."""

    chunks: list[Tensor]
    plan: dict[str, Any]


def copy(model: nn.Module, optimizer: ChainedOptimizer, room: Sequence[Tensor] = ()) -> Content:
    """Copy what this rank is to write off the live tensors, into the chunks of an earlier copy where they are as large.

    megatron-core and the GPU may go on once it returns.
    """
    sharded = model.sharded_state_dict(metadata=sharding_metadata())
    held = [share for share in [*trained(sharded, optimizer), *frozen(sharded)] if share.main and share.count]
    tensors: list[Tensor] = []
    shares, kept, position = [], {}, 0
    for share in held:
        types = {name: _type_name(tensor) for name, tensor in share.states.items()}
        tiles = [[t.key, t.offset, t.shape] for t in share.tiles]
        part = zlib.crc32(json.dumps(tiles).encode())
        # Of a part's many ranges the first says what the part is: rank 0 hears of all of them.
        first = [types, tiles] if not share.start else None
        shares.append([share.name, part, share.start, share.count, position, first])
        tensors += share.states.values()
        position += sum(_bytes(tensor) for tensor in share.states.values())
    for _, value in objects(sharded):
        if isinstance(value.data, Tensor) and value.data.numel() and not any(value.replica_id):
            kept[value.unique_key] = [position, _bytes(value.data)]
            tensors.append(value.data)
            position += _bytes(value.data)
    plan = {"shares": shares, "objects": kept, "step": _step(optimizer), "bytes": position}
    return Content(_copied(tensors, position, room), plan)


def _copied(tensors: Sequence[Tensor], size: int, room: Sequence[Tensor]) -> list[Tensor]:
    """The bytes of tensors one after the other, in chunks; pinned where they come from a GPU."""
    pinned = any(tensor.is_cuda for tensor in tensors)
    chunks = list(room)
    if sum(chunk.numel() for chunk in chunks) != size:
        sizes = [min(CHUNK, size - at) for at in range(0, size, CHUNK)]
        chunks = [torch.empty(n, dtype=torch.uint8, pin_memory=pinned) for n in sizes]
    position = 0
    for tensor in tensors:
        left = tensor.detach().reshape(-1).view(torch.uint8)
        while left.numel():
            chunk, at = divmod(position, CHUNK)
            part = left[: CHUNK - at]
            chunks[chunk][at : at + part.numel()].copy_(part, non_blocking=pinned)
            left, position = left[part.numel() :], position + part.numel()
    if pinned:
        torch.cuda.synchronize()
    return chunks


def _step(optimizer: ChainedOptimizer) -> int:
    """Steps taken: torch's Adam notes them with each parameter, Transformer Engine's and Apex's with each group."""
    noted = [0]
    for part in optimizer.chained_optimizers:
        noted += [int(group["step"]) for group in part.optimizer.param_groups if "step" in group]
        noted += [int(state["step"]) for state in part.optimizer.state.values() if "step" in state]
    return max(noted)


def file_name(rank: int) -> str:
    """The file that a rank writes."""
    return f"{rank:05d}.bin"


def merge(plans: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all ranks wrote, by parameter. Raises RuntimeError where a range is missing or there twice."""
    tensors: dict[str, Any] = {}
    for rank, plan in enumerate(plans):
        for name, number, start, count, position, first in plan["shares"]:
            entry = tensors.setdefault(name, {"states": {}, "parts": {}})
            part = entry["parts"].setdefault(number, {"tiles": [], "pieces": []})
            part["pieces"].append([start, count, rank, position])
            if first is not None:
                entry["states"], part["tiles"] = first
    for name, entry in tensors.items():
        entry["parts"] = list(entry["parts"].values())
        for part in entry["parts"]:
            part["pieces"].sort()
            ends = [0, *(start + count for start, count, *_ in part["pieces"])]
            size = sum(math.prod(shape) for _, _, shape in part["tiles"])
            if [start for start, *_ in part["pieces"]] != ends[:-1] or ends[-1] != size:
                raise RuntimeError(f"{name}: ranges {part['pieces']} do not make up the whole of {size}")
    kept = {key: [rank, *place] for rank, plan in enumerate(plans) for key, place in plan["objects"].items()}
    sizes = [plan["bytes"] for plan in plans]
    return {"tensors": tensors, "objects": kept, "step": max(p["step"] for p in plans), "bytes": sizes}


# ------------------------------------------------------------------------------------------------------ from files


class Files:
    """The files of one checkpoint, read by name and range; used as a context, which closes them."""

    def __init__(self, path: Path) -> None:
        self.path, self.index = path, read_index(path)
        self._parts = {
            name: {_tiles(part["tiles"]): part["pieces"] for part in entry["parts"]}
            for name, entry in self.index["tensors"].items()
        }
        self._open: dict[int, int] = {}

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def problems(self, shares: Sequence[Share]) -> list[str]:
        """What of shares is not there, or is of another kind."""
        found = []
        for share in shares:
            types = {name: _type_name(tensor) for name, tensor in share.states.items()}
            entry = self.index["tensors"].get(share.name)
            if entry is None:
                found.append(f"{self.path}: lacks {share.name}")
            elif entry["states"] != types:
                found.append(f"{self.path}: {share.name} is kept as {entry['states']}, the model wants {types}")
        return found

    def fill(self, share: Share) -> None:
        """Read a share into its live tensors, and no more than its own range where the part is the same."""
        parts = self._parts[share.name]
        same = parts.get(share.tiles)
        for state, tensor in share.states.items():
            if same is not None:
                self._read(share.name, same, state, share.start, tensor)
            else:
                self._assemble(share, state, tensor)

    def object(self, key: str) -> Tensor | None:
        """What a module kept, as bytes."""
        if key not in self.index["objects"]:
            return None
        rank, position, size = self.index["objects"][key]
        found = torch.empty(size, dtype=torch.uint8)
        self._read_bytes(rank, position, found)
        return found

    def _assemble(self, share: Share, state: str, target: Tensor) -> None:
        """Fill a range out of parts that were cut otherwise: by tile the rows that it has to do with."""
        at = 0
        for tile in share.tiles:
            size = math.prod(tile.shape)
            low, high = max(share.start, at), min(share.start + share.count, at + size)
            if low < high:
                first, last = (low - at) // tile.row, -(-(high - at) // tile.row)
                box = Tile(tile.key, (tile.offset[0] + first, *tile.offset[1:]), (last - first, *tile.shape[1:]))
                rows = self._box(share.name, state, box, target.dtype).flatten()
                skip = low - at - first * tile.row
                target[low - share.start : high - share.start].copy_(rows[skip : skip + high - low])
            at += size

    def _box(self, name: str, state: str, box: Tile, dtype: torch.dtype) -> Tensor:
        """A box of a global tensor, out of all parts that have some of it."""
        found, filled = torch.empty(box.shape, dtype=dtype), 0
        for tiles, pieces in self._parts[name].items():
            at = 0
            for tile in tiles:
                low = [max(a, b) for a, b in zip(box.offset, tile.offset, strict=True)]
                ends = zip(box.offset, box.shape, tile.offset, tile.shape, strict=True)
                high = [min(a + n, b + m) for a, n, b, m in ends]
                if tile.key == box.key and all(a < b for a, b in zip(low, high, strict=True)):
                    rows = torch.empty((high[0] - low[0], *tile.shape[1:]), dtype=dtype)
                    first = (low[0], *tile.offset[1:])
                    self._read(name, pieces, state, at + (low[0] - tile.offset[0]) * tile.row, rows.view(-1))
                    found[_cut(low, high, box.offset)] = rows[_cut(low, high, first)]
                    filled += math.prod(b - a for a, b in zip(low, high, strict=True))
                at += math.prod(tile.shape)
        if filled != found.numel():
            raise UserError(
                f"{self.path}: lacks rows {box.offset[0]} and on of {box.key}; was it made by another model?"
            )
        return found

    def _read(self, name: str, pieces: Sequence[Sequence[int]], state: str, start: int, target: Tensor) -> None:
        """The range of a part that begins at `start` and is as long as the target."""
        types = self.index["tensors"][name]["states"]
        before = [_width(types[other]) for other in list(types)[: list(types).index(state)]]
        width, end = _width(types[state]), start + target.numel()
        for first, count, rank, position in pieces:
            low, high = max(start, first), min(end, first + count)
            if low < high:
                place = position + sum(before) * count + (low - first) * width
                self._read_bytes(rank, place, target[low - start : high - start].view(torch.uint8))

    def _read_bytes(self, rank: int, position: int, target: Tensor) -> None:
        if target.is_cuda:
            staged = torch.empty(min(CHUNK, target.numel()), dtype=torch.uint8)
            for at in range(0, target.numel(), CHUNK):
                part = target[at : at + CHUNK]
                self._read_bytes(rank, position + at, staged[: part.numel()])
                part.copy_(staged[: part.numel()])
            return
        left = memoryview(target.numpy())
        while left:
            read = os.preadv(self._descriptor(rank), [left], position)
            if not read:
                raise UserError(f"{self.path / file_name(rank)}: ends at {position} bytes; it was cut short")
            left, position = left[read:], position + read

    def _descriptor(self, rank: int) -> int:
        if rank not in self._open:
            if len(self._open) == _OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[rank] = os.open(self.path / file_name(rank), os.O_RDONLY)
        return self._open[rank]


def read_index(path: Path) -> dict[str, Any]:
    """What a checkpoint to resume from holds. Raises UserError for one that cannot be resumed from."""
    restart = (
        f"remove {path.parent}, and the stage starts over from its input, the last checkpoint that was handed over; "
        "finished checkpoints of format megatron are not concerned"
    )
    try:
        index: dict[str, Any] = json.loads((path / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not (path / _OLDER).exists():
            raise UserError(
                f"{path / INDEX}: not seen on {socket.gethostname()}; a shared file system may be late, so run again; "
                f"where the file is lost, remove {path}, and the stage goes on from the checkpoint before"
            ) from None
        raise UserError(
            f"{path}: this progress was written by an older version, whose optimizer state is misplaced wherever it "
            f"had several buckets, so it is not resumed from; {restart}"
        ) from None
    except ValueError as error:
        raise UserError(f"{path / INDEX}: damaged: {error}; {restart}") from None
    if index.get("version") != VERSION:
        raise UserError(f"{path}: progress of version {index.get('version')}, here is version {VERSION}; {restart}")
    return index


def _cut(low: Sequence[int], high: Sequence[int], offset: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))


def _tiles(described: Sequence[Any]) -> tuple[Tile, ...]:
    return tuple(Tile(key, tuple(offset), tuple(shape)) for key, offset, shape in described)


def _type_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _width(name: str) -> int:
    width: int = getattr(torch, name).itemsize
    return width


def _bytes(tensor: Tensor) -> int:
    return int(tensor.numel() * tensor.element_size())
