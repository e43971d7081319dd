"""Hugging Face checkpoints of any size that take no room: true headers before files that are holes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher.models.families import shape_of
from launcher.models.formats import tensors_of


def sparse_checkpoint(folder: Path, config: Mapping[str, Any], files: int = 1) -> int:
    """Write config.json and bf16 tensors of zeros into a folder; returns the bytes that the files seem to have."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    tensors = {name: fit[0] for name, fit in tensors_of(shape_of(config), "hf").items()}
    names = list(tensors)
    parts = [names[i::files] for i in range(files)]
    index = {}
    for i, part in enumerate(parts):
        file = "model.safetensors" if files == 1 else f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        _write(folder / file, {name: tensors[name] for name in part})
        index |= dict.fromkeys(part, file)
    if files > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _write(path: Path, tensors: Mapping[str, tuple[int, ...]]) -> None:
    header = json.dumps(dict(_described(tensors))).encode()
    end = sum(2 * math.prod(shape) for shape in tensors.values())
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + end)


def _described(tensors: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Any]]:
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * math.prod(shape)
        yield name, {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
