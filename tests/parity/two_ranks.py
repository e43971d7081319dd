"""Logits of converted checkpoints on two gloo processes; what `test_two_ranks.py` starts, once a layout.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=… MASTER_PORT=… python two_ranks.py tp|pp JOB

JOB is a JSON file: [{"folder", "ids", "out"}, …]; `ids` and `out` are torch.save files.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.configs import Parallelism
from launcher.models.families import shape_of
from launcher.workers.megatron import checkpoint
from launcher.workers.megatron.model import build_model
from launcher.workers.megatron.parallel import process_groups

LAYOUTS = {"tp": Parallelism(tensor_model_parallel_size=2), "pp": Parallelism(pipeline_model_parallel_size=2)}


def main(layout: str, job: Path) -> None:
    """Every case in turn; the rank that has the logits writes them."""
    rank = int(os.environ["RANK"])
    cases: list[dict[str, Any]] = json.loads(job.read_text())
    with process_groups(LAYOUTS[layout], rank, 2):
        for case in cases:
            logits = _logits(Path(case["folder"]), torch.load(case["ids"]), LAYOUTS[layout])
            if logits is not None and (layout == "pp" or rank == 0):
                torch.save(logits, case["out"])


@torch.no_grad()
def _logits(folder: Path, ids: Tensor, parallelism: Parallelism) -> Tensor | None:
    """Whole logits, or None on the first of two pipeline stages."""
    shape = shape_of(json.loads((folder / "hf" / "config.json").read_text()))
    model = build_model(shape, parallelism, parallel_output=False).eval()
    checkpoint.load_weights(folder, model)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    if not model.pre_process:
        hidden = torch.empty(ids.shape[1], ids.shape[0], shape.hidden_size)
        dist.recv(hidden, 0)
        model.set_input_tensor(hidden)
    found: Tensor = model(ids, positions, None)
    if not model.post_process:
        dist.send(found.contiguous(), 1)
        return None
    return found[..., : shape.vocab_size]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
