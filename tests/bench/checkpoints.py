"""Conversion against copying the same bytes, weight change against reading them, and the memory of both.

Run as a program it is the child that does one piece of work and prints its seconds, start-up left out:

    python -m tests.bench.checkpoints convert SRC DST FORMAT verify|no-verify
    python -m tests.bench.checkpoints diff A B
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench.measure import GIB, Row, environment, files_of, make_cold, python, run_watched, size_of

RUNS = 3
#: A llama of 0.2 billion parameters: 414 MB in bf16, as many tensors and as large ones as a small real model has.
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
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
    """Both directions, verified and not, each over a copy of the same folder made just before it."""
    hf, megatron = scratch / "hf", scratch / "megatron"
    write_checkpoint(hf)
    _child(scratch, "convert", str(hf), str(megatron), "megatron", "no-verify")
    rows = []
    for source, to in ((hf, "megatron"), (megatron, "hf")):
        plain, verified, memory = [], [], []
        for _ in range(RUNS):
            copied = _cold(source, lambda s=source: _copy(s, scratch / "copy"))  # type: ignore[misc]
            for kept, how in ((plain, "no-verify"), (verified, "verify")):
                seconds, peak = _cold(source, lambda s=source, t=to, h=how: _convert(scratch, s, t, h))  # type: ignore[misc]
                kept.append(seconds / copied)
                memory.append(peak / GIB)
        name = f"{source.name} to {to}"
        what = f"{size_of(source) / 1e6:.0f} MB in {len(files_of(source))} files, cold; wall clock"
        against = f"{what}; start-up apart; against cp --reflink=never and sync just before it"
        limit = (2 * LARGEST + 0.3 * GIB) / GIB
        rows += [
            Row(f"convert {name} / copy", tuple(plain), "x", against, 1.15),
            Row(f"convert {name}, verified / copy", tuple(verified), "x", against, 2.3),
            Row(
                f"convert {name}: memory",
                tuple(memory),
                "GiB",
                f"peak of anonymous memory of the whole process; largest tensor {LARGEST / 1e6:.0f} MB",
                round(limit, 3),
            ),
        ]
    _same_bytes(scratch, megatron, hf)
    return rows


def measure_diff(scratch: Path) -> list[Row]:
    """Six thresholds in one pass over two cold checkpoints, against a cold read of the same files."""
    before, after = scratch / "before", scratch / "after"
    write_checkpoint(before)
    write_checkpoint(after, change=1e-3)
    rates, shares, cpu, memory = [], [], [], []
    size = size_of(before) + size_of(after)
    for _ in range(RUNS):
        read = _cold(before, lambda: _cold(after, lambda: _read(before, after)))
        result, peak = _cold(before, lambda: _cold(after, lambda: _child(scratch, "diff", str(before), str(after))))
        rates.append(size / result["seconds"] / 1e6)
        shares.append(read / result["seconds"])
        cpu.append(result["cpu"] / size * 1e9)
        memory.append(peak / GIB)
    what = f"2 x {size_of(before) / 1e6:.0f} MB bf16, cold; wall clock"
    return [
        Row("weight diff: speed", tuple(rates), "MB/s", f"{what}; start-up apart"),
        Row("weight diff: work", tuple(cpu), "s CPU/GB", "start-up apart; one thread"),
        Row(
            "weight diff / cold read",
            tuple(shares),
            "x",
            f"{what}; against reading the files just before",
            0.8,
            "higher",
        ),
        Row("weight diff: memory", tuple(memory), "GiB", "peak of anonymous memory of the whole process", 0.5),
    ]


def write_checkpoint(folder: Path, change: float = 0.0) -> None:
    """A checkpoint of `CONFIG` with random weights, one tensor in memory at a time; `change` moves each weight so."""
    import torch

    from launcher.convert.entry import Entry
    from launcher.convert.hf import HfWriter
    from launcher.convert.links import links
    from launcher.models.families import shape_of

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    table = links(shape_of(CONFIG), "megatron")
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


def _cold(folder: Path, work: Callable[[], Any]) -> Any:
    make_cold(folder)
    return work()


def _copy(source: Path, target: Path) -> float:
    began = time.monotonic()
    subprocess.run(["cp", "-r", "--reflink=never", str(source), str(target)], check=True)
    subprocess.run(["sync", *map(str, files_of(target))], check=True)
    seconds = time.monotonic() - began
    shutil.rmtree(target)
    return seconds


def _read(*folders: Path) -> float:
    buffer = bytearray(1 << 20)
    began = time.monotonic()
    for path in (p for folder in folders for p in files_of(folder)):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.monotonic() - began


def _convert(scratch: Path, source: Path, to: str, how: str) -> tuple[float, int]:
    target = scratch / "converted"
    result, peak = _child(scratch, "convert", str(source), str(target), to, how)
    shutil.rmtree(target)
    return result["seconds"], peak


def _child(scratch: Path, *words: str) -> tuple[dict[str, float], int]:
    said, peak = run_watched(python("-m", "tests.bench.checkpoints", *words), environment(scratch), scratch)
    return json.loads(said.splitlines()[-1]), peak


def _same_bytes(scratch: Path, megatron: Path, hf: Path) -> None:
    """What comes back from Megatron's format is what went there. Raises RuntimeError otherwise."""
    back = scratch / "back"
    _child(scratch, "convert", str(megatron), str(back), "hf", "no-verify")
    for path in hf.glob("*.safetensors"):
        subprocess.run(["cmp", str(path), str(back / path.name)], check=True)
    shutil.rmtree(back)


# -------------------------------------------------------------------------------------------------------------- child


def main(words: list[str]) -> None:
    """Do one piece of work; print its wall and CPU seconds as JSON."""
    import safetensors.torch  # noqa: F401  start-up
    import torch

    torch.set_num_threads(1)
    work = _conversion(*words[1:]) if words[0] == "convert" else _weight_change(*words[1:])
    began, cpu = time.monotonic(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        work()
    print(json.dumps({"seconds": time.monotonic() - began, "cpu": time.process_time() - cpu}))


def _conversion(source: str, target: str, to: str, how: str) -> Callable[[], Any]:
    import launcher.convert.conversion  # noqa: F401  start-up
    from launcher.convert.__main__ import run

    return lambda: run(Path(source), Path(target), to, how == "verify")


def _weight_change(before: str, after: str) -> Callable[[], Any]:
    from launcher.workers.weight_diff import main as diff

    return lambda: diff([before, after, "--json"])


if __name__ == "__main__":
    main(sys.argv[1:])
