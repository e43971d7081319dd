"""A node looks at itself before a stage starts, and all nodes at the network between them.

`python -m launcher.workers.preflight nodes --gpus N --min-free-gb G`       one task a node; standard library only
`python -m launcher.workers.preflight cuda --gpus N`                        one task a node, in the stage's image; torch
`python -m launcher.workers.preflight all-reduce --size-mb M --rounds R`    one task a GPU; torch

Each task of `nodes` and `cuda`, and rank 0 of `all-reduce`, prints one JSON object on one line; a problem found is no
failure of the program.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from launcher.progress import PREFLIGHT_LEFT, PREFLIGHT_SEEN
from launcher.workers import devices

#: What a task sees of the GPUs that it was given; one of them is set wherever Slurm deals out GPUs.
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
#: nvidia-smi's names: index and identity, then what must not stand there. From `nvidia-smi --help-query-gpu`.
_IDENTITY = ("index", "uuid")
_FAULTS = {
    "ecc.errors.uncorrected.volatile.total": "uncorrected memory errors since the last reset",
    "remapped_rows.pending": "memory rows wait to be remapped: the GPU needs a reset",
    "remapped_rows.failure": "memory rows could not be remapped",
    "retired_pages.pending": "memory pages wait to be retired: the GPU needs a reset",
}
_NVIDIA_SMI_S = 30.0


def main(argv: list[str]) -> None:
    """Print what was found."""
    parser = argparse.ArgumentParser()
    modes = parser.add_subparsers(dest="mode", required=True)
    nodes = modes.add_parser("nodes")
    nodes.add_argument("--gpus", type=int, required=True)
    nodes.add_argument("--min-free-gb", type=float, required=True)
    cuda = modes.add_parser("cuda")
    cuda.add_argument("--gpus", type=int, required=True)
    network = modes.add_parser("all-reduce")
    network.add_argument("--size-mb", type=int, required=True)
    network.add_argument("--rounds", type=int, required=True)
    args = parser.parse_args(argv)
    if args.mode == "nodes":
        found: dict[str, Any] | None = look_at_node(args.gpus, args.min_free_gb)
    elif args.mode == "cuda":
        found = {"node": _node(), "problems": cuda_problems(args.gpus)}
    else:
        found = all_reduce(args.size_mb, args.rounds)
    if found is not None:
        sys.stdout.write(json.dumps(found) + "\n")  # one write: lines of several tasks do not mix
        sys.stdout.flush()


# -------------------------------------------------------------------------------------------------------------- node


def look_at_node(gpus: int, min_free_gb: float) -> dict[str, Any]:
    """What this node finds wrong with itself."""
    node = _node()
    root, attempt = Path(os.environ["PRISM_ROOT"]), Path(os.environ["PRISM_ATTEMPT_DIR"])
    problems = [*store_problems(root, attempt, node, min_free_gb), *(gpu_problems(gpus) if gpus else [])]
    return {"node": node, "problems": problems}


def _node() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def store_problems(root: Path, attempt: Path, node: str, min_free_gb: float) -> list[str]:
    """Whether the store's root is there, writable, and has room."""
    try:
        if not (attempt / PREFLIGHT_SEEN).exists():
            return [f"the store's root {root} is not what the first node sees; is its file system mounted?"]
        (attempt / PREFLIGHT_LEFT.format(node=node)).write_text("x", encoding="utf-8")
        free = shutil.disk_usage(root).free / 1e9
    except OSError as error:
        return [f"the store's root {root} cannot be used: {error.strerror}"]
    return [f"{free:.3g} GB free under {root}, less than {min_free_gb:g}"] if free < min_free_gb else []


def gpu_problems(wanted: int) -> list[str]:
    """Whether as many GPUs are there as were asked for, and what nvidia-smi says of them where there is one."""
    listed = next((os.environ[name] for name in _VISIBLE if name in os.environ), None)
    visible = None if listed is None else [word for word in listed.split(",") if word.strip()]
    if visible is not None and len(visible) != wanted:
        return [f"sees {len(visible)} GPUs of {wanted} ({listed or 'none'})"]
    if shutil.which("nvidia-smi") is None:
        return [] if visible is not None else [f"sees no GPU of {wanted}: no CUDA_VISIBLE_DEVICES and no nvidia-smi"]
    try:
        rows = _ask_nvidia_smi()
    except subprocess.TimeoutExpired:
        return [f"nvidia-smi does not answer in {_NVIDIA_SMI_S:.0f} s"]
    except OSError as error:
        return [f"nvidia-smi cannot be run: {error.strerror}"]
    except ValueError as error:
        return [f"nvidia-smi fails: {error}"]
    ours = [row for row in rows if visible is None or _is_visible(row, visible)]
    if len(ours) < wanted and not (visible and any(word.startswith("MIG") for word in visible)):
        return [f"nvidia-smi knows {len(ours)} GPUs of {wanted}"]
    return [f"GPU {row['index']}: {what}" for row in ours for what in _faults(row)]


def _ask_nvidia_smi() -> list[dict[str, str]]:
    """One row a GPU. Raises ValueError with what nvidia-smi said where it fails."""
    for fields in ((*_IDENTITY, *_FAULTS), _IDENTITY):  # an older one does not know all of these
        command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_NVIDIA_SMI_S,
            check=False,
            encoding="utf-8",
            errors="replace",
        )
        if done.returncode == 0:
            lines = csv.reader(done.stdout.splitlines(), skipinitialspace=True)
            return [dict(zip(fields, line, strict=True)) for line in lines if line]
        if "not a valid field" not in done.stdout + done.stderr:
            break
    raise ValueError(" ".join((done.stdout + done.stderr).split())[:200] or f"exit code {done.returncode}")


def _is_visible(row: dict[str, str], visible: list[str]) -> bool:
    return any(word == row["index"] or (word.startswith("GPU") and row["uuid"].startswith(word)) for word in visible)


def _faults(row: dict[str, str]) -> list[str]:
    """What stands in a row that must not: a count or a Yes; `[N/A]` and the like say nothing."""
    said = {name: row.get(name, "") for name in _FAULTS}
    return [_FAULTS[name] for name, word in said.items() if word == "Yes" or (word.isdigit() and int(word) > 0)]


# -------------------------------------------------------------------------------------------------------------- CUDA

#: The oldest branch of the driver by CUDA's major version (CUDA's compatibility guide), forward compatibility apart.
_OLDEST_DRIVER = {"11": 450, "12": 525, "13": 580}
_DRIVER_FILE = Path("/proc/driver/nvidia/version")


def cuda_problems(wanted: int) -> list[str]:
    """What keeps this image's torch from the node's GPUs, with the driver's reason: memory is taken on each of them.

    Nothing is said where the image has no torch, or one for CPUs on a node without a driver: stand-ins for GPUs.
    """
    driver = _driver()
    if not driver and _is_for_cpus():
        return []
    try:
        import torch
    except ImportError:
        return []
    built = torch.version.cuda
    if built is None and getattr(torch.version, "hip", None) is None:
        return [f"the image's torch {torch.__version__} is one for CPUs"] if driver else []
    why = devices.without_cuda()
    if why is not None:
        return [f"CUDA does not start in the stage's image: {why}{_too_old(built, driver)}"]
    count = torch.cuda.device_count()
    if count < wanted:
        return [f"CUDA sees {count} GPUs of {wanted} in the stage's image"]
    return [f"GPU {index}: {found}" for index in range(wanted) if (found := _unusable(index))]


def _is_for_cpus() -> bool:
    """Whether torch is one for CPUs, by its version file: to import it takes seconds."""
    with contextlib.suppress(ImportError, ValueError, AttributeError, OSError):
        found = importlib.util.find_spec("torch")
        text = Path(str(found and found.origin)).with_name("version.py").read_text(encoding="utf-8")
        return all(re.search(rf"^{name}\b.*= *None\s*$", text, re.MULTILINE) for name in ("cuda", "hip"))
    return False


def _unusable(index: int) -> str:
    import torch

    try:
        torch.zeros(1, device=f"cuda:{index}")
        torch.cuda.synchronize(index)
    except RuntimeError as error:
        return str(error).strip().split("\n", 1)[0]
    return ""


def _driver() -> str:
    """The version of the kernel's NVIDIA driver; "" where there is none."""
    with contextlib.suppress(OSError):
        found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", _DRIVER_FILE.read_text(encoding="utf-8"))
        return found[1] if found else "unknown"
    return ""


def _too_old(built: str | None, driver: str) -> str:
    if not driver:
        return "; the container sees no driver: is it given the node's GPUs?"
    oldest = _OLDEST_DRIVER.get((built or "").split(".")[0])
    if oldest is not None and driver != "unknown" and int(driver.split(".")[0]) < oldest:
        return f"; its torch is built for CUDA {built}, which wants driver R{oldest} or newer, and this is {driver}"
    return f"; driver {driver}"


# ----------------------------------------------------------------------------------------------------------- network


def all_reduce(size_mb: int, rounds: int) -> dict[str, Any] | None:
    """Bus bandwidth of an all-reduce, as nccl-tests defines it, in 10^9 bytes a second; None on ranks other than 0.

    With NCCL where CUDA is there, else with gloo between processes of CPUs, which says nothing of a GPU's network.
    """
    import torch
    import torch.distributed as dist

    rank, world = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", devices.ordinal(torch.cuda.device_count())) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", init_method="env://", rank=rank, world_size=world)
    data = torch.ones(size_mb << 18, device=device)  # float32
    seconds = []
    for _ in range(rounds + 2):
        dist.barrier()
        began = time.monotonic()
        dist.all_reduce(data)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - began)
        data.div_(world)
    wrong = bool((data != 1).any())
    dist.destroy_process_group()
    if rank:
        return None
    each = sorted(seconds[2:])[rounds // 2]  # the first two set up the connections
    bus = 2 * (world - 1) / world * (size_mb << 20) / each / 1e9
    mode = "nccl" if cuda else "gloo on CPUs"
    return {"mode": mode, "ranks": world, "size_mb": size_mb, "bus_gbs": 0.0 if wrong else bus, "correct": not wrong}


if __name__ == "__main__":
    main(sys.argv[1:])
