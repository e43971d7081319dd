"""Conversion against copying the same bytes, weight change against reading them, and the memory of both.

Run as a program it is the child whose memory is watched; it prints what it measured, start-up left out, as JSON:

    python -m tests.bench.checkpoints convert SRC FORMAT SCRATCH RUNS
    python -m tests.bench.checkpoints load-save SRC SCRATCH
    python -m tests.bench.checkpoints memory SRC FORMAT SCRATCH
    python -m tests.bench.checkpoints diff A B
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.store import sha256_of
from tests.bench.measure import (
    GIB,
    Row,
    cold_or_warm,
    environment,
    files_of,
    make_cold,
    python,
    run_watched,
    size_of,
    timed,
)

RUNS = 3
#: A llama of 0.16 billion parameters: 320 MB in bf16, its tensors as large as those of a small real model.
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
#: Models of about a billion parameters; the paper's families, with tensors as large as those of real models.
LLAMA: dict[str, Any] = {
    **CONFIG,
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "tie_word_embeddings": True,
}
BILLION: dict[str, dict[str, Any]] = {
    "llama, 1.24 B": LLAMA,
    "granite, 1.0 B": {
        **LLAMA,
        "model_type": "granite",
        "vocab_size": 49155,
        "num_hidden_layers": 15,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.015625,
        "logits_scaling": 8.0,
    },
    "nemotron-h, 1.1 B": {
        "model_type": "nemotron_h",
        "torch_dtype": "bfloat16",
        "vocab_size": 131072,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "hybrid_override_pattern": "M-M-M*-M-M-M*-M-M-",
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
        "mlp_hidden_act": "relu2",
        "ssm_state_size": 128,
        "mamba_head_dim": 64,
        "mamba_num_heads": 64,
        "n_groups": 8,
        "chunk_size": 128,
    },
}
#: Mistral-Small-24B's shape: 47 GB in bf16.
BIG: dict[str, Any] = {
    **CONFIG,
    "model_type": "mistral",
    "vocab_size": 131072,
    "hidden_size": 5120,
    "intermediate_size": 32768,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "head_dim": 128,
    "sliding_window": None,
}


def measure_conversion(scratch: Path) -> list[Row]:
    """Both directions, verified and not. Raises RuntimeError where what comes back is not what went there."""
    return _both_ways(scratch, "llama, 0.16 B", CONFIG, RUNS)


def measure_conversions(scratch: Path) -> list[Row]:
    """Models of a billion parameters, and how a llama's figures grow with its layers."""
    rows = []
    sizes = {f"llama of {n} layers": {**LLAMA, "num_hidden_layers": n} for n in (4, 30)}
    for name, config in {**BILLION, **sizes}.items():
        work = scratch / "model"
        work.mkdir()
        rows += _both_ways(work, name, config, 2 if name in BILLION else 1)
        shutil.rmtree(work)
    return rows


def measure_big(scratch: Path) -> list[Row]:
    """The memory that a model of 24 billion parameters takes: from a sparse file of zeros, 47 GB to be written."""
    write_sparse(scratch / "hf", BIG)
    words = ("memory", str(scratch / "hf"), "megatron", str(scratch / "work"))
    found, peak = _child(scratch, *words, timeout=3600)
    limit = (2 * largest(BIG) + 0.3 * GIB) / GIB
    what = f"{size_of(scratch / 'hf') / 1e9:.1f} GB, not verified; largest tensor {largest(BIG) / 1e9:.2f} GB"
    memory = Row("convert mistral, 24 B, to megatron: memory", (peak / GIB,), "GiB", what, round(limit, 3))
    return [
        memory,
        Row("convert mistral, 24 B, to megatron", tuple(found["seconds"]), "s", "from zeros that no disk holds"),
    ]


def largest(config: dict[str, Any]) -> int:
    """Bytes of the largest tensor in bf16, in either format."""
    table = _table(config)
    return max(
        2 * math.prod(s) for link in table for s in (*(fit[0] for fit in link.source_shapes), *link.target_shapes)
    )


def _both_ways(scratch: Path, name: str, config: dict[str, Any], runs: int) -> list[Row]:
    hf, megatron = scratch / "hf", scratch / "megatron"
    write_checkpoint(hf, config=config)
    rows = _rows(scratch, hf, "megatron", megatron, name, config, runs)
    rows += _rows(scratch, megatron, "hf", scratch / "back", name, config, runs)
    for path in hf.glob("*.safetensors"):
        if sha256_of(path) != sha256_of(scratch / "back" / path.name):
            raise RuntimeError(f"{path.name}: not the same bytes after hf to megatron to hf")
    return rows


def _rows(scratch: Path, source: Path, to: str, kept: Path, name: str, config: dict[str, Any], runs: int) -> list[Row]:
    """Measure one direction; `kept` is what the last conversion has made."""
    found, peak = _child(scratch, "convert", str(source), to, str(scratch / "work"), str(runs))
    (scratch / "work" / "converted").rename(kept)
    shutil.rmtree(scratch / "work")
    way = f"{name}: to {to}"
    what = f"{size_of(source) / 1e6:.0f} MB, {cold_or_warm(source)}; start-up apart"
    against = f"{what}; wall clock; against cp --reflink=never and sync just before it"
    memory = f"peak of anonymous memory of the whole process; largest tensor {largest(config) / 1e6:.0f} MB"
    limit = (2 * largest(config) + 0.3 * GIB) / GIB
    rows = [
        Row(f"{way} / copy", tuple(found["plain"]), "x", against, 1.15),
        Row(f"{way}, verified / copy", tuple(found["verified"]), "x", against, 2.3),
        Row(f"{way}", tuple(found["plain_seconds"]), "s", f"{what}; not verified"),
        Row(f"{way}, verified", tuple(found["verified_seconds"]), "s", what),
        Row(f"{way}: work of copying", tuple(found["copy_cpu"]), "s CPU/GB", f"{what}; cp and sync"),
        Row(f"{way}: work", tuple(found["plain_cpu"]), "s CPU/GB", f"{what}; not verified, two threads"),
        Row(f"{way}: memory", (peak / GIB,), "GiB", memory, round(limit, 3)),
    ]
    if to == "megatron":
        saved, _ = _child(scratch, "load-save", str(source), str(scratch / "work"))
        shutil.rmtree(scratch / "work")
        ratio = tuple(seconds / saved["seconds"][0] for seconds in found["plain_seconds"])
        rows.append(
            Row(f"{way} / load and save", ratio, "x", f"{what}; against safetensors' load_file, save_file, sync")
        )
    return rows


def measure_diff(scratch: Path) -> list[Row]:
    """Six thresholds in one pass over two checkpoints, cold where the file system lets go, against reading them."""
    before, after = scratch / "before", scratch / "after"
    write_checkpoint(before)
    write_checkpoint(after, change=1e-3)
    found, peak = _child(scratch, "diff", str(before), str(after))
    what = f"2 x {size_of(before) / 1e6:.0f} MB bf16, {cold_or_warm(before)}; start-up apart; wall clock"
    share = f"{what}; against reading the files just before"
    return [
        Row("weight diff: speed", tuple(found["rate"]), "MB/s", what),
        Row("weight diff: work", tuple(found["cpu"]), "s CPU/GB", "start-up apart; one thread"),
        Row("weight diff / read", tuple(found["share"]), "x", share, 0.8, "higher"),
        Row("weight diff: memory", (peak / GIB,), "GiB", "peak of anonymous memory of the whole process", 0.5),
    ]


def write_checkpoint(folder: Path, change: float = 0.0, config: dict[str, Any] = CONFIG) -> None:
    """A checkpoint with random weights, one tensor in memory at a time; `change` moves each weight by about so much."""
    import torch

    from launcher.convert.entry import Entry
    from launcher.convert.hf import HfWriter

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    table = _table(config)
    shapes = {n: fit[0] for link in table for n, fit in zip(link.sources, link.source_shapes, strict=True)}
    writer = HfWriter(folder, {name: Entry(shape, torch.bfloat16) for name, shape in shapes.items()})
    for number, (name, shape) in enumerate(shapes.items()):
        tensor = torch.empty(shape).normal_(std=0.02, generator=torch.Generator().manual_seed(number))
        if change:
            tensor += torch.empty(shape).normal_(
                std=0.02 * change, generator=torch.Generator().manual_seed(-1 - number)
            )
        writer.add(name, tensor.bfloat16())
    writer.close()


def write_sparse(folder: Path, config: dict[str, Any]) -> None:
    """A checkpoint of zeros that takes no room: its file is one hole behind the header."""
    import torch

    from launcher.convert.entry import Entry
    from launcher.convert.hf import HfWriter

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    entries = {
        n: Entry(fit[0], torch.bfloat16)
        for link in _table(config)
        for n, fit in zip(link.sources, link.source_shapes, strict=True)
    }
    HfWriter(folder, entries, shard_bytes=1 << 60).stop()
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size + sum(e.nbytes for e in entries.values()))


def _table(config: dict[str, Any]) -> Any:
    from launcher.convert.links import links
    from launcher.models.families import shape_of

    return links(shape_of(config), "hf", "megatron")


def _child(scratch: Path, *words: str, timeout: int = 1200) -> tuple[dict[str, list[float]], int]:
    """What the child measured, and its peak of anonymous memory in bytes."""
    command = python("-W", "ignore", "-m", "tests.bench.checkpoints", *words)
    said, peak = run_watched(command, environment(scratch), scratch, timeout)
    return json.loads(said.splitlines()[-1]), peak


# -------------------------------------------------------------------------------------------------------------- child


def main(words: list[str]) -> None:
    """Measure `RUNS` times; print the values as JSON."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command and the stage set it, before torch is there
    import safetensors.torch  # noqa: F401  start-up
    import torch

    torch.set_num_threads(1)
    paths = [Path(word) for word in words[1:]]
    if words[0] == "convert":
        found = _conversions(paths[0], words[2], paths[2], int(words[4]))
    elif words[0] == "load-save":
        found = _load_save(*paths)
    elif words[0] == "memory":
        found = _memory(paths[0], words[2], paths[2])
    else:
        found = _weight_changes(*paths)
    print(json.dumps(found))


def _conversions(source: Path, to: str, work: Path, runs: int) -> dict[str, list[float]]:
    """Each conversion over the copy just before it; the last one stays as `converted`."""
    from launcher.convert.__main__ import run

    work.mkdir()
    _warm_up(work / "small", to)
    target = work / "converted"
    kinds = ("plain", "verified")
    found: dict[str, list[float]] = {k: [] for k in (*kinds, *(f"{k}_seconds" for k in kinds), "copy_cpu", "plain_cpu")}
    size = size_of(source) / 1e9
    for _ in range(runs):
        copied, copy_cpu = _timed([source], lambda: _copy(source, work / "copy"))
        shutil.rmtree(work / "copy")
        for kind in kinds:
            shutil.rmtree(target, ignore_errors=True)
            seconds, cpu = _timed([source], lambda k=kind: run(source, target, to, k == "verified"))  # type: ignore[misc]
            found[kind].append(seconds / copied)
            found[f"{kind}_seconds"].append(seconds)
            if kind == "plain":
                found["plain_cpu"].append(cpu / size)
        found["copy_cpu"].append(copy_cpu / size)
    return found


def _load_save(source: Path, work: Path) -> dict[str, list[float]]:
    """What everyone does by hand: the whole checkpoint into memory and out again."""
    from safetensors.torch import load_file, save_file

    work.mkdir()

    def go() -> None:
        for path in source.glob("*.safetensors"):
            save_file(load_file(path), work / path.name)
        subprocess.run(["sync", *map(str, files_of(work))], check=True)

    return {"seconds": [_timed([source], go)[0]]}


def _memory(source: Path, to: str, work: Path) -> dict[str, list[float]]:
    from launcher.convert.__main__ import run

    work.mkdir()
    return {"seconds": [timed(lambda: run(source, work / "converted", to, verify=False))[0]]}


def _warm_up(folder: Path, to: str) -> None:
    """Convert a tiny checkpoint as what is measured will be, so that what is imported on first use is start-up."""
    from launcher.convert.__main__ import run

    folder.mkdir()
    write_checkpoint(folder / "hf", config={**CONFIG, "vocab_size": 256, "num_hidden_layers": 1})
    run(folder / "hf", folder / "megatron", "megatron")
    if to == "hf":
        run(folder / "megatron", folder / "back", "hf")
    shutil.rmtree(folder)


def _weight_changes(before: Path, after: Path) -> dict[str, list[float]]:
    from launcher.workers.weight_diff import main as diff

    found: dict[str, list[float]] = {key: [] for key in ("rate", "share", "cpu")}
    size = size_of(before) + size_of(after)
    for _ in range(RUNS):
        read, _ = _timed([before, after], lambda: _read(before, after))
        with contextlib.redirect_stdout(io.StringIO()):
            seconds, cpu = _timed([before, after], lambda: diff([str(before), str(after), "--json"]))
        found["rate"].append(size / seconds / 1e6)
        found["share"].append(read / seconds)
        found["cpu"].append(cpu / size * 1e9)
    return found


def _timed(cold: list[Path], work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of `work` after the folders were made as cold as they can be."""
    for folder in cold:
        make_cold(folder)
    return timed(work)


def _copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-r", "--reflink=never", str(source), str(target)], check=True)
    subprocess.run(["sync", *map(str, files_of(target))], check=True)


def _read(*folders: Path) -> None:
    buffer = bytearray(1 << 20)
    for path in (p for folder in folders for p in files_of(folder)):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


if __name__ == "__main__":
    main(sys.argv[1:])
