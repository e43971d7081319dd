"""What one task of a test job's step sees of its node. Standard library only: it runs in the site's images.

Each task writes `STEP.RANK.json` into the attempt's folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher import store
from launcher.site import pairs

#: What the stages import on GPU nodes, most needed first.
KERNELS = ("torch", "megatron.core", "transformer_engine", "mamba_ssm", "causal_conv1d")
_SMI = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
#: Tries imports one after another, a JSON line each; a crash ends it at the culprit.
_IMPORTS = """
import importlib, importlib.util, json, sys
for name in sys.argv[1:]:
    print(json.dumps([name, "begun"]), flush=True)
    try:
        if importlib.util.find_spec(name) is None: raise ModuleNotFoundError(name)
        module = importlib.import_module(name)
        said = {"version": str(getattr(module, "__version__", "of unknown version"))}
        if name == "torch": said["devices"] = module.cuda.device_count()
    except ModuleNotFoundError as error:
        root = (error.name or str(error)).split(".")[0]
        said = {"absent": True} if root == name.split(".")[0] else {"error": str(error)}
    except BaseException as error:
        said = {"error": f"{type(error).__name__}: {error}"[:300]}
    print(json.dumps([name, said]), flush=True)
"""


def look_at_node(stage_json: str) -> int:
    """The node itself, then what it shares with the first node: files and network."""
    config = json.loads(Path(stage_json).read_text(encoding="utf-8"))["config"]
    root = os.environ["PRISM_ROOT"]
    report: dict[str, Any] = {
        "node": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "python": [sys.executable, platform.python_version()],
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "gpus": _gpus(),
        "paths": {path: _path(path) for path in config["paths"]},
        "filesystem": filesystem(root, Path("/proc/mounts").read_text(encoding="utf-8", errors="surrogateescape")),
        "interfaces": list(_interfaces()),
        "infiniband": sorted(p.name for p in Path("/sys/class/infiniband").glob("*")),
        "memlock": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
    }
    _write(report)  # what is known stays known if the rest hangs
    report["pair"] = pairs.meet(attempt_dir(), _rank(), int(os.environ["SLURM_NTASKS"]))
    _write(report)
    return 0


def try_imports(stage_json: str) -> int:
    """Import each of the kernels for real; one that crashes the interpreter is told as that."""
    found: dict[str, Any] = {}
    left = list(KERNELS)
    while left:
        said = _import_in_turn(left)
        found |= said
        left = left[len(said) :]
    _write({"python": [sys.executable, platform.python_version()], "kernels": found})
    return 0


def _import_in_turn(names: list[str]) -> dict[str, Any]:
    """What was told of the first names, up to one that ended the interpreter."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _IMPORTS, *names],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=150,
            encoding="utf-8",
        )
        out, why = done.stdout, f"ended the interpreter, exit code {done.returncode}"
    except subprocess.TimeoutExpired as error:
        out, why = (error.stdout or b"").decode(errors="replace"), "not imported in 150 s"  # bytes in spite of text=
    told = {}
    for line in out.splitlines():
        with contextlib.suppress(ValueError):  # libraries print too
            name, what = json.loads(line)
            told[name] = {"error": why} if what == "begun" else what
    return told or {names[0]: {"error": why}}


def hear_signals(stage_json: str) -> int:
    """Write down USR2 and TERM as they come; ends at TERM, or after two minutes."""
    heard: dict[str, float] = {}
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, lambda got, _: heard.setdefault(signal.Signals(got).name, time.time()))
    end = time.monotonic() + 120
    written: int | None = None
    while time.monotonic() < end and "SIGTERM" not in heard:
        if written != len(heard):
            written = len(heard)
            _write({"step": os.environ.get("SLURM_STEP_ID"), "heard": dict(heard)})
        time.sleep(0.02)
    _write({"step": os.environ.get("SLURM_STEP_ID"), "heard": dict(heard)})
    return 0


def attempt_dir() -> Path:
    """Where this life of the job writes."""
    return Path(os.environ["PRISM_ATTEMPT_DIR"])


def _rank() -> int:
    return int(os.environ["SLURM_PROCID"])


def _write(report: dict[str, Any]) -> None:
    store.write_json(attempt_dir() / f"{os.environ['PRISM_STEP']}.{_rank()}.json", report)


# ------------------------------------------------------------------------------------------------------------ looking


def _gpus() -> dict[str, Any]:
    """`shown`: how many the job may use by its variable, None without one; `real`: what the driver lists."""
    named = next((os.environ[name] for name in _VISIBLE if name in os.environ), None)
    shown = None if named is None else len([word for word in named.split(",") if word])
    try:
        done = subprocess.run(_SMI, capture_output=True, text=True, timeout=60, encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return {"shown": shown, "real": None}
    except (OSError, subprocess.TimeoutExpired) as failed:
        return {"shown": shown, "real": [], "error": str(failed)}
    rows = [[word.strip() for word in line.split(",")] for line in done.stdout.splitlines() if "," in line]
    error = "" if done.returncode == 0 else (done.stderr or done.stdout).strip()[:300]
    return {"shown": shown, "real": [row[0] for row in rows], "driver": rows[0][1] if rows else "", "error": error}


def _path(path: str) -> str:
    """What is wrong with a path on this node; nothing where it can be read, or, with a leading +, written."""
    wanted = path.removeprefix("+")
    if not os.path.exists(wanted):
        return "absent"
    if not os.access(wanted, os.R_OK):
        return "not readable"
    return "" if wanted == path or os.access(wanted, os.W_OK) else "not writable"


def filesystem(path: str, mounts: str) -> str:
    """Type of the file system that holds a path, by the text of /proc/mounts."""
    best = ("", "unknown")
    for line in mounts.splitlines():
        _, where, kind, *_ = line.split()
        inside = path == where or path.startswith(where.rstrip("/") + "/")
        if inside and len(where) >= len(best[0]):
            best = (where, kind)
    return best[1]


def _interfaces() -> Iterator[dict[str, Any]]:
    """Network interfaces that are up and have an address, the loopback apart; Mbit/s where the driver tells it.

    Asked of the kernel's sockets: `/sys` may be that of another network namespace.
    """
    for _, name in socket.if_nameindex():
        flags, address = _ask_interface(name, _SIOCGIFFLAGS), _ask_interface(name, _SIOCGIFADDR)
        if name == "lo" or flags is None or address is None or not struct.unpack("H", flags[16:18])[0] & _RUNNING:
            continue
        speed = ""
        with contextlib.suppress(OSError):
            speed = Path(f"/sys/class/net/{name}/speed").read_text(encoding="utf-8").strip()
        mbit = int(speed) if speed.isdigit() else None
        yield {"name": name, "address": socket.inet_ntoa(address[20:24]), "mbit": mbit}


#: Requests of netdevice(7), and IFF_RUNNING: up and connected.
_SIOCGIFFLAGS, _SIOCGIFADDR, _RUNNING = 0x8913, 0x8915, 0x40


def _ask_interface(name: str, request: int) -> bytes | None:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        return fcntl.ioctl(asking.fileno(), request, struct.pack("256s", name.encode()[:15]))
    return None
