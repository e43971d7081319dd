"""Conversion against copying the same bytes, weight change against reading them, and the memory of both.

Run as a program it is the child whose memory is watched; it prints what it measured, start-up left out, as JSON:

    python -m tests.bench.checkpoints convert SRC FORMAT SCRATCH
    python -m tests.bench.checkpoints diff A B
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench.measure import (
    GIB,
    Row,
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
LARGEST = CONFIG["vocab_size"] * CONFIG["hidden_size"] * 2


def measure_conversion(scratch: Path) -> list[Row]:
    """Both directions, verified and not. Raises RuntimeError where what comes back is not what went there."""
    hf, megatron = scratch / "hf", scratch / "megatron"
    write_checkpoint(hf)
    rows = _rows(scratch, hf, "megatron", megatron)
    rows += _rows(scratch, megatron, "hf", scratch / "back")
    for path in hf.glob("*.safetensors"):
        if path.read_bytes() != (scratch / "back" / path.name).read_bytes():
            raise RuntimeError(f"{path.name}: not the same bytes after hf to megatron to hf")
    return rows


def _rows(scratch: Path, source: Path, to: str, kept: Path) -> list[Row]:
    """Measure one direction; `kept` is what the last conversion has made."""
    found, peak = _child(scratch, "convert", str(source), to, str(scratch / "work"))
    (scratch / "work" / "converted").rename(kept)
    shutil.rmtree(scratch / "work")
    name = f"{source.name} to {to}"
    what = f"{size_of(source) / 1e6:.0f} MB, cold; start-up apart"
    against = f"{what}; wall clock; against cp --reflink=never and sync just before it"
    memory = f"peak of anonymous memory of the whole process; largest tensor {LARGEST / 1e6:.0f} MB"
    limit = (2 * LARGEST + 0.3 * GIB) / GIB
    return [
        Row(f"convert {name} / copy", tuple(found["plain"]), "x", against, 1.15),
        Row(f"convert {name}, verified / copy", tuple(found["verified"]), "x", against, 2.3),
        Row(f"copy of {source.name}: work", tuple(found["copy_cpu"]), "s CPU/GB", f"{what}; cp and sync"),
        Row(f"convert {name}: work", tuple(found["plain_cpu"]), "s CPU/GB", f"{what}; not verified, one thread"),
        Row(f"convert {name}: memory", (peak / GIB,), "GiB", memory, round(limit, 3)),
    ]


def measure_diff(scratch: Path) -> list[Row]:
    """Six thresholds in one pass over two cold checkpoints, against a cold read of the same files."""
    before, after = scratch / "before", scratch / "after"
    write_checkpoint(before)
    write_checkpoint(after, change=1e-3)
    found, peak = _child(scratch, "diff", str(before), str(after))
    what = f"2 x {size_of(before) / 1e6:.0f} MB bf16, cold; start-up apart; wall clock"
    share = f"{what}; against reading the files just before"
    return [
        Row("weight diff: speed", tuple(found["rate"]), "MB/s", what),
        Row("weight diff: work", tuple(found["cpu"]), "s CPU/GB", "start-up apart; one thread"),
        Row("weight diff / cold read", tuple(found["share"]), "x", share, 0.8, "higher"),
        Row("weight diff: memory", (peak / GIB,), "GiB", "peak of anonymous memory of the whole process", 0.5),
    ]


def write_checkpoint(folder: Path, change: float = 0.0, config: dict[str, Any] = CONFIG) -> None:
    """A checkpoint with random weights, one tensor in memory at a time; `change` moves each weight by about so much."""
    import torch

    from launcher.convert.entry import Entry
    from launcher.convert.hf import HfWriter
    from launcher.convert.links import links
    from launcher.models.families import shape_of

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    table = links(shape_of(config), "megatron")
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


def _child(scratch: Path, *words: str) -> tuple[dict[str, list[float]], int]:
    """What the child measured, and its peak of anonymous memory in bytes."""
    said, peak = run_watched(python("-m", "tests.bench.checkpoints", *words), environment(scratch), scratch)
    return json.loads(said.splitlines()[-1]), peak


# -------------------------------------------------------------------------------------------------------------- child


def main(words: list[str]) -> None:
    """Measure `RUNS` times; print the values as JSON."""
    import safetensors.torch  # noqa: F401  start-up
    import torch

    torch.set_num_threads(1)
    if words[0] == "convert":
        found = _conversions(Path(words[1]), words[2], Path(words[3]))
    else:
        found = _weight_changes(Path(words[1]), Path(words[2]))
    print(json.dumps(found))


def _conversions(source: Path, to: str, work: Path) -> dict[str, list[float]]:
    """Each conversion over the copy just before it; the last one stays as `converted`."""
    from launcher.convert.__main__ import run

    work.mkdir()
    _warm_up(work / "small", to)
    target = work / "converted"
    found: dict[str, list[float]] = {key: [] for key in ("plain", "verified", "copy_cpu", "plain_cpu")}
    size = size_of(source) / 1e9
    for _ in range(RUNS):
        copied, copy_cpu = _timed([source], lambda: _copy(source, work / "copy"))
        shutil.rmtree(work / "copy")
        for kind in ("plain", "verified"):
            shutil.rmtree(target, ignore_errors=True)
            seconds, cpu = _timed([source], lambda k=kind: run(source, target, to, k == "verified"))  # type: ignore[misc]
            found[kind].append(seconds / copied)
            if kind == "plain":
                found["plain_cpu"].append(cpu / size)
        found["copy_cpu"].append(copy_cpu / size)
    return found


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
    """Wall and CPU seconds of `work` after the folders were made cold."""
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
