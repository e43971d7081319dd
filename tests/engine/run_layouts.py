"""One of two ranks that train twins of the seven models on the layouts of a world, with the engine's stand-in and with
plain layers: `python run_layouts.py WORLD RANK PORT FOLDER`. Leaves FOLDER/WORLD.RANK.json. Not a test.

A world has one set of process groups, and processes of its own: gloo starts threads for each group, and they stay for
as long as anything holds the group, such as megatron-core's optimizer.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import recorder

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp": {},
    "tp": {"tensor_model_parallel_size": 2},
    "tp-sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp": {"pipeline_model_parallel_size": 2},
    "cp": {"context_parallel_size": 2},
    "recompute": {"recompute": "full"},
    "masked": {},
    "masked-cp": {"context_parallel_size": 2},
    "attention-alone": {},
}
SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
STEPS, PLACES = 2, 32


class Text:
    """Samples made of their own number: documents of a few tokens, the same on every rank."""

    def __init__(self, vocab: int, masked: bool) -> None:
        self.vocab, self.masked = vocab, masked

    def micro_batches(
        self, first: int, last: int, size: int, rank: int, ranks: int, *, text: bool = True
    ) -> Iterator[Any]:
        import torch

        from launcher.workers.megatron.documents import Batch

        for start in range(first, last, size * ranks):
            numbers = range(start + rank * size, start + (rank + 1) * size)
            rows = [(torch.arange(PLACES + 1) * (3 + n % 5) + n) % (self.vocab - 2) + 1 for n in numbers]
            tokens, labels = (torch.stack([row[part] for row in rows]) for part in (slice(-1), slice(1, None)))
            lengths = tuple([5 + n % 7, PLACES - 5 - n % 7] for n in numbers) if self.masked else None
            yield Batch(tokens, labels, torch.ones(size, PLACES) if self.masked else None, lengths)


def worlds() -> list[list[str]]:
    """The layouts that have the same process groups, together."""
    found: dict[str, list[str]] = {}
    for layout, sizes in LAYOUTS.items():
        found.setdefault(json.dumps([sizes.get(name, 1) for name in SIZES]), []).append(layout)
    return list(found.values())


def main(world: int, rank: int, folder: Path) -> None:
    recorder.install()
    from real_models import REAL

    from launcher.workers.megatron.parallel import process_groups

    found: dict[str, Any] = {}
    layouts = worlds()[world]
    with process_groups(config_of(next(iter(REAL)), layouts[0]).parallelism, rank, 2):
        for name in REAL:
            for layout in layouts:
                found[f"{name} {layout}"] = both(name, layout)
        threads = len(os.listdir("/proc/self/task"))
    (folder / f"{world}.{rank}.json").write_text(json.dumps({"cases": found, "threads": threads}))


def both(name: str, layout: str) -> dict[str, Any]:
    """Losses with either kind of layers and what was recorded, or why the layout is refused."""
    from launcher.models.families import shape_of
    from launcher.models.layout import check_layout
    from launcher.workers.megatron import cpu_mode, layers

    config = config_of(name, layout)
    shape = shape_of(config.model.config)
    if problems := check_layout(shape, config, 2):
        return {"refused": problems}
    engine, recorder.RECORDS[:] = layers.cpu_mode, []
    fused = losses(config, shape)
    records = sorted({json.dumps(r, default=str, sort_keys=True) for r in recorder.RECORDS})
    layers.cpu_mode = cpu_mode
    try:
        plain = losses(config, shape)
    finally:
        layers.cpu_mode = engine
    return {"engine": fused, "plain": plain, "records": [json.loads(r) for r in records]}


def config_of(name: str, layout: str) -> Any:
    from real_models import twin

    from launcher.configs import TrainConfig
    from launcher.spec import decode

    model = twin(name)
    if model.get("sliding_window"):
        model |= {"sliding_window": 8, "hidden_size": 64}  # heads of 16: the engine wants a multiple of 8 there
    data = {
        "model": {"name": name, "family": model["model_type"], "config": model, "init_method_std": 0.05},
        "data": {"prepare/one": 1.0}, "seq_length": PLACES, "global_batch_size": 4, "micro_batch_size": 1,
        "train_iters": STEPS, "lr": 1e-2, "lr_warmup_fraction": 0.0, "precision": "fp32",
        "parallelism": LAYOUTS[layout], "document_masking": layout.startswith("masked"),
        "trainable": "attention" if layout == "attention-alone" else "all",
    }  # fmt: skip
    return decode(TrainConfig, data)


def losses(config: Any, shape: Any) -> list[float]:
    """Loss, learning rate and norm of the gradient of each step."""
    from launcher.workers.megatron import loop
    from launcher.workers.megatron.model import build_model, freeze, initialize

    masked = config.document_masking
    module = build_model(shape, config.parallelism, config.precision, document_masking=masked)
    initialize(module, shape, config.model.init_method_std, 0)
    freeze(module, config.trainable)
    trainer = loop.build_trainer(config, module, Text(shape.vocab_size, masked))  # type: ignore[arg-type]
    steps = [loop.train_step(trainer, number) for number in range(1, STEPS + 1)]
    trainer.feed.close()
    return [figure for step in steps for figure in dataclasses.astuple(step)[:3]]


if __name__ == "__main__":
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[3], OMP_NUM_THREADS="1")
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[4]))
