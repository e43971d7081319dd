"""Weights from a checkpoint of someone else's: nothing in it is run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import train_stages as ts
from megatron.core.dist_checkpointing.mapping import ShardedObject

from launcher.models.families import shape_of
from launcher.workers.megatron import checkpoint
from launcher.workers.megatron.model import build_model, initialize, sharding_metadata
from launcher.workers.megatron.parallel import process_groups


class Mark:
    """Unpickled by pickle.load, it makes a folder."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["llama-tiny", "nemotron-h-tiny"])
def test_objects_of_a_start_are_never_unpickled(tmp_path: Path, name: str) -> None:
    shape = shape_of(ts.model(name)["config"])
    with process_groups():
        model = build_model(shape)
        initialize(model, shape, 0.02, 0)
        sharded = model.sharded_state_dict(metadata=sharding_metadata())
        objects = [value for value in sharded.values() if isinstance(value, ShardedObject)]
        assert objects
        for value in objects:
            value.data = Mark(tmp_path / "run")
        checkpoint._write(sharded, tmp_path / "iter_0000003")
        (tmp_path / checkpoint.TRACKER).write_text("3")
        fresh = build_model(shape)
        checkpoint.load_weights(tmp_path, fresh)
    assert not (tmp_path / "run").exists()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
