"""Reading training samples: our blend against megatron-core's `GPTDataset.__getitem__` alone, on the same files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tests.bench.measure import Row

SAMPLES, RUNS = 256, 5
#: Three sources, the smallest repeated: millions of tokens and weights.
SOURCES = {"web": (4.0, 0.6), "code": (2.0, 0.3), "reasoning": (0.5, 0.1)}


def measure(scratch: Path) -> list[Row]:
    """CPU seconds a sample and samples a second of one process, the files cached."""
    import launcher.workers.megatron  # noqa: F401  must come before megatron.core

    # isort: split
    from launcher.workers.megatron.parallel import process_groups

    rows: list[Row] = []
    folder = scratch / "tokens"
    _write(folder)
    with process_groups():
        for seq_length in (2048, 8192):
            ours, alone = _ours(folder, seq_length, scratch), _alone(folder, seq_length, scratch)
            speeds: list[tuple[float, float]] = []
            for run in range(RUNS + 1):
                begun = time.process_time()
                for i in range(SAMPLES):
                    ours.batch(i, 1)
                middle = time.process_time()
                for i in range(SAMPLES):
                    alone[i % len(alone)]
                if run:  # the first warms up
                    speeds.append((SAMPLES / (middle - begun), SAMPLES / (time.process_time() - middle)))
            rows += _rows(seq_length, speeds)
    return rows


def _rows(seq_length: int, speeds: list[tuple[float, float]]) -> list[Row]:
    name, what = f"samples of {seq_length} tokens", "three sources by weight, checked ids, stacked; warm, a CPU second"
    return [
        Row(f"{name}: ours", tuple(a for a, _ in speeds), "samples/s", what),
        Row(f"  in tokens, {seq_length} each", tuple(a * seq_length / 1e6 for a, _ in speeds), "M tokens/s", what),
        Row(f"{name}: GPTDataset alone", tuple(b for _, b in speeds), "samples/s", "__getitem__ of the largest source"),
        Row(f"{name}: ours / GPTDataset alone", tuple(b / a for a, b in speeds), "x", "CPU time a sample"),
    ]


def _write(folder: Path) -> None:
    import numpy

    from launcher.workers.tokens import write_indexed

    folder.mkdir()
    random = numpy.random.default_rng(0)
    for name, (millions, _) in SOURCES.items():
        lengths = random.integers(50, 2000, int(millions * 1e6 / 1000))
        documents = [random.integers(2, 32000, length) for length in lengths]
        write_indexed(folder / name, documents, numpy.dtype(numpy.uint16))


def _ours(folder: Path, seq_length: int, scratch: Path) -> Any:
    from launcher.workers.megatron.data import Blend, read_sources

    weights = {f"prepare/{name}": weight for name, (_, weight) in SOURCES.items()}
    sources = read_sources({"prepare": folder}, seq_length, weights)
    return Blend(sources, SAMPLES, seq_length, 0, 32000, scratch / "index")


def _alone(folder: Path, seq_length: int, scratch: Path) -> Any:
    from types import SimpleNamespace

    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    tokenizer = SimpleNamespace(vocab_size=32000, pad=-1, eod=None, unique_identifiers={"vocab_size": 32000})
    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=seq_length,
        blend=([str(folder / "web")], None),
        split="1,0,0",
        path_to_cache=str(scratch / f"alone-{seq_length}"),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        tokenizer=tokenizer,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, [SAMPLES, 0, 0], lambda: True, config).build()[0]
