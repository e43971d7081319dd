"""Reading `.metadata` of a torch_dist checkpoint: a pickle, so only the classes that it needs are admitted.

What a pickle names it can call. Every class here is a plain record, an enumeration or a look-up by name, so the worst
that a forged file does is to describe tensors that are not there, which the reader finds out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import Metadata
from torch.serialization import _get_layout

from launcher.errors import UserError
from launcher.models import pickles

_MCORE = "megatron.core.dist_checkpointing.strategies.torch"
_RECORDS: dict[tuple[str, str], Any] = {
    (module.__name__, name): getattr(module, name)
    for module, names in (
        (metadata, ("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "StorageMeta")),
        (metadata, ("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING")),
        (planner, ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")),
        (filesystem, ("_StorageInfo", "_StoragePrefix")),
    )
    for name in names
    if hasattr(module, name)
}
#: Bytes beyond which no file reaches.
_LARGEST = 1 << 62
#: Megatron-core's own two classes, up to 0.15, are torch's with a field more.
_ADMITTED = _RECORDS | {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _get_layout,
    (_MCORE, "MCoreMetadata"): Metadata,
    (_MCORE, "MCoreSavePlan"): planner.SavePlan,
}
_ADMITTED |= {("torch", n): v for n, v in vars(torch).items() if isinstance(v, torch.dtype)}


def read_metadata(path: Path) -> Metadata:
    """What a `.metadata` file describes. Raises UserError, before anything is run, where it names anything else."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; is it a torch_dist checkpoint?") from None
    return parse_metadata(content, str(path))


def parse_metadata(content: bytes, where: str) -> Metadata:
    """What the content of a `.metadata` file describes; `where` is its name in messages. Raises UserError."""
    try:
        found = pickles.load(content, _ADMITTED)
    except Exception as error:  # whatever broken bytes lead an unpickler to
        raise UserError(f"{where}: refused: {error}; get the checkpoint from where it was written") from None
    if not isinstance(found, Metadata) or not _described(found):
        raise UserError(f"{where}: describes no checkpoint; get the checkpoint from where it was written")
    return found


def _described(found: Metadata) -> bool:
    """Whether it has tensors by key, and places of their pieces: a record from a pickle can lack any field."""
    try:
        tensors: Any = found.state_dict_metadata
        places: Any = found.storage_data
        return all(isinstance(key, str) and _is_entry(value) for key, value in tensors.items()) and all(
            isinstance(index, metadata.MetadataIndex)
            and isinstance(index.fqn, str)
            and isinstance(index.offset, tuple | None)
            and _is_place(info)
            for index, info in places.items()
        )
    except (AttributeError, TypeError):
        return False


def _is_entry(value: Any) -> bool:
    if isinstance(value, metadata.BytesStorageMetadata):
        return True
    return (
        isinstance(value, metadata.TensorStorageMetadata)
        and isinstance(value.properties.dtype, torch.dtype)
        and all(n >= 0 for n in value.size)
        and all(len(chunk.offsets) == len(chunk.sizes) == len(value.size) for chunk in value.chunks)
    )


def _is_place(info: Any) -> bool:
    return (
        isinstance(info, filesystem._StorageInfo)
        and isinstance(info.relative_path, str)
        and 0 <= info.offset <= _LARGEST
        and 0 <= info.length <= _LARGEST
    )
