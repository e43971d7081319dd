"""What a checkpoint in megatron-core's torch_dist format says of itself, read without torch.

    latest_checkpointed_iteration.txt    the iteration, or `release` for a checkpoint that no training wrote
    iter_NNNNNNN/ or release/            .metadata (a pickle), *.distcp, metadata.json, common.pt

`launcher.convert.torch_dist` reads the tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from launcher.errors import UserError, bounded
from launcher.models import pickles
from launcher.models.headers import MOST_CONFIG, Held
from launcher.models.spans import Files, directly_in
from launcher.models.tensors import Shape

TRACKER = "latest_checkpointed_iteration.txt"
#: Megatron-LM takes no iteration 0; a checkpoint to start training from is a `release`.
RELEASE = "release"
#: No model has so many layers.
_MOST_LAYERS = 10_000
_STACKED = re.compile(r"decoder\.layers\.(?!\d)(.+)")
#: What a training run saves besides the model.
_NOT_WEIGHTS = ("optimizer.", "chained_")
#: Larger than the file of any checkpoint of weights; a larger one is left to the job.
_MOST_METADATA = 16 << 20


def checkpoint_dir(folder: Path) -> Path:
    """The folder of the newest checkpoint, which the tracker file names. Raises UserError."""
    tracker = folder / TRACKER
    try:
        with tracker.open(encoding="utf-8", errors="replace") as file:
            text = file.read(64).strip()
    except OSError:
        raise UserError(f"{folder}: no {TRACKER}; a checkpoint of format megatron is wanted") from None
    if text != RELEASE and not re.fullmatch("[0-9]{1,18}", text):
        raise UserError(f"{tracker}: neither an iteration nor `{RELEASE}`")
    path = folder / (RELEASE if text == RELEASE else f"iter_{int(text):07d}")
    if not (path / ".metadata").is_file():
        raise UserError(f"{path}: named by {TRACKER}, but no torch_dist checkpoint is there")
    return path


def is_weight(key: str, prefix: str) -> bool:
    """Whether a key of `.metadata` is a tensor of the model."""
    return key.startswith(prefix) and not key.startswith(_NOT_WEIGHTS)


def layers_of(key: str, size: Shape, prefix: str, where: Path) -> Iterator[tuple[str, Shape, int | None]]:
    """The tensors that a key holds: name, shape and number in it. A homogeneous model has one key for all layers."""
    name = key.removeprefix(prefix)
    stacked = _STACKED.fullmatch(name)
    if not stacked:
        yield name, size, None
        return
    if not size or size[0] > _MOST_LAYERS:
        raise UserError(f"{where}: {key} {list(size)} is not of layers; get the checkpoint again")
    yield from ((f"decoder.layers.{layer}.{stacked[1]}", size[1:], layer) for layer in range(size[0]))


def check_backend(where: Path, files: Files) -> None:
    """Refuse what is no torch_dist: NeMo's older zarr, and single files, which are pickles."""
    if "metadata.json" not in files:
        pickle = next((n for n in files if n.endswith(".ckpt")), None)
        kind = f"{pickle} is a pickle, which is never loaded" if pickle else "no metadata.json"
        raise UserError(f"{where}: {kind}; save the checkpoint in torch_dist format")
    try:
        backend = json.loads(files["metadata.json"].read(MOST_CONFIG))["sharded_backend"]
    except (ValueError, KeyError, TypeError, RecursionError):
        backend = "unknown"
    if backend != "torch_dist":
        raise UserError(
            f"{files['metadata.json']}: format {backend}; only torch_dist is read "
            "(NeMo has scripts/checkpoint_converters/convert_zarr_to_torch_dist.py)"
        )


def read_held(folder: Path, files: Files | None = None, prefix: str = "") -> dict[str, Held]:
    """The model's tensors in the folder of an iteration, by its `.metadata`; its files are looked at. Raises UserError.

    `files` are those of a folder inside an archive. Nothing is returned where `.metadata` is too large to be looked at
    in passing.
    """
    path = folder / ".metadata"
    files = directly_in(folder) if files is None else files
    if ".metadata" not in files:
        raise UserError(f"{path}: not there; get the checkpoint again")
    if files[".metadata"].size > _MOST_METADATA:
        return {}
    try:
        found = pickles.load(files[".metadata"].read(), _ADMITTED).__dict__
        tensors, places = found["state_dict_metadata"], found["storage_data"]
        held = dict(_held(tensors, folder, prefix))
        problems = list(_broken_files(folder, places, files))
    except UserError:
        raise
    except Exception as error:  # whatever broken bytes lead an unpickler to
        why = error if isinstance(error, UnpicklingError) else "describes no checkpoint"
        raise UserError(f"{path}: refused: {why}; get the checkpoint from where it was written") from None
    if problems:
        raise UserError(bounded(problems, folder))
    return held


def _held(tensors: Any, folder: Path, prefix: str) -> Iterator[tuple[str, Held]]:
    for key, value in tensors.items():
        if isinstance(value, _TensorRecord) and is_weight(key, prefix):
            dtype, size = value.__dict__["properties"].state[0], tuple(value.__dict__["size"])
            for name, shape, _ in layers_of(key, size, prefix, folder):
                yield name, Held(str(dtype), shape)


def _broken_files(folder: Path, places: Any, files: Files) -> Iterator[str]:
    ends: dict[str, int] = {}
    for info in places.values():
        name = str(info.__dict__["relative_path"])
        ends[name] = max(ends.get(name, 0), info.__dict__["offset"] + info.__dict__["length"])
    for name, end in sorted(ends.items()):
        file = folder / name
        if Path(name).name != name:
            yield f"{folder / '.metadata'}: names a file outside its folder, {name}"
        elif name not in files:
            yield f"{file}: not there, though .metadata names it; get the file again"
        elif files[name].size < end:
            yield f"{file}: {files[name].size} bytes, {end} by .metadata: cut short; get the file again"


class _Record:
    """Stands for every class that `.metadata` names: what it was built with and its fields."""

    def __init__(self, *arguments: Any):
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


class _TensorRecord(_Record):
    """Stands for TensorStorageMetadata."""


def _size(sizes: Any = ()) -> tuple[int, ...]:
    return tuple(int(n) for n in sizes)


def _named(*words: Any) -> Any:
    return words


_CHECKPOINT = "torch.distributed.checkpoint"
_NAMES = {
    "metadata": "Metadata MetadataIndex BytesStorageMetadata StorageMeta ChunkStorageMetadata TensorProperties",
    "planner": "SavePlan WriteItem TensorWriteData BytesIOWriteData",
    "filesystem": "_StorageInfo _StoragePrefix",
}
_MCORE = "megatron.core.dist_checkpointing.strategies.torch"
_DTYPES = (
    "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 float8_e8m0fnu int64 int32 int16 int8 uint8 uint16 "
    "uint32 uint64 bool"
)
_ADMITTED: dict[tuple[str, str], Any] = {
    (f"{_CHECKPOINT}.{module}", name): _Record for module, names in _NAMES.items() for name in names.split()
}
_ADMITTED |= {
    (f"{_CHECKPOINT}.metadata", "TensorStorageMetadata"): _TensorRecord,
    (f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"): _named,
    (f"{_CHECKPOINT}.planner", "WriteItemType"): _named,
    ("torch", "Size"): _size,
    ("torch.serialization", "_get_layout"): _named,
    (_MCORE, "MCoreMetadata"): _Record,
    (_MCORE, "MCoreSavePlan"): _Record,
}
_ADMITTED |= {("torch", name): name for name in _DTYPES.split()}
