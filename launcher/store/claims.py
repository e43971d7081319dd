"""Who is at work on something, and whether that process lives; the folder of a new attempt."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import WorldError
from launcher.spec import SpecError, decode, encode
from launcher.store.files import read_json
from launcher.store.sharing import share_tree


def new_attempt(stage: Path, name: str | None = None) -> Path:
    """A new folder for an attempt: the next `local.N`, or `name`, and `name.2`, `name.3` where that is taken.

    Slurm starts a job twice with the same restart count where its controller was killed just after a requeue.
    """
    stage.mkdir(parents=True, exist_ok=True)
    if name is None:
        first = 1 + max((int(p.name[6:]) for p in stage.glob("local.*") if p.name[6:].isdecimal()), default=0)
        names = (f"local.{number}" for number in itertools.count(first))
    else:
        names = (name if number == 1 else f"{name}.{number}" for number in itertools.count(1))
    for free in names:
        with contextlib.suppress(FileExistsError):
            (stage / free).mkdir()
            return stage / free
    raise AssertionError("numbers do not end")


@dataclass(frozen=True)
class Owner:
    """A process that can be told from every other.

    Pids are reused, so its start time and the boot count too, and each container may have pids of its own. `job` is
    its Slurm job.
    """

    host: str
    boot: str
    pid: int
    start: str
    job: str | None = None
    namespace: str = ""


def this_process(pid: int | None = None, job: str | None = None) -> Owner:
    """The owner that stands for a process of this machine, this one by default."""
    pid = pid or os.getpid()
    return Owner(socket.gethostname(), _boot_id(), pid, process_start(pid) or "", job, _pid_namespace())


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def process_start(pid: int) -> str | None:
    """Start time of a living process in clock ticks since boot, or None. A zombie is not living."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def is_alive(owner: Owner) -> bool | None:
    """Whether the owner's process lives; None where this machine cannot tell."""
    if owner.host != socket.gethostname():
        return None
    if not (owner.boot and process_start(os.getpid())):  # one of us has no /proc
        return _is_alive_by_pid(owner)
    if owner.boot != _boot_id():
        return False
    if owner.namespace != _pid_namespace() or _is_hidden(owner.pid):
        return None
    return process_start(owner.pid) == owner.start


def _is_alive_by_pid(owner: Owner) -> bool | None:
    """Dead where nothing has its id; else nobody can tell it from a later process. None where either had a /proc."""
    if owner.start or process_start(os.getpid()):
        return None
    try:
        os.kill(owner.pid, 0)
    except PermissionError:
        return None
    except (OSError, OverflowError):
        return False
    return None


def _is_hidden(pid: int) -> bool:
    """Whether a process is there but /proc, mounted with hidepid, does not show it to other users."""
    if os.path.exists(f"/proc/{pid}/stat"):
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def claim(folder: Path, owner: Owner, lives: Callable[[Owner], bool | None] = is_alive) -> Owner | None:
    """Take the claim `folder` for `owner`; returns the living owner where another holds it, None when it is ours.

    A claim whose owner is dead is taken over. One of which `lives` cannot tell counts as living. Raises
    WorldError where the folder can be neither taken nor judged.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        (fresh / "owner.json").write_text(json.dumps(encode(owner)), encoding="utf-8")
        share_tree(fresh)
        for _ in range(3):
            try:
                os.rename(fresh, folder)  # fails unless the target is absent or empty: the claim is all or nothing
                return None
            except OSError:
                holder = claim_holder(folder)
                if holder == owner:
                    return None
                if holder is not None and lives(holder) is not False:
                    return holder
                _set_aside(folder, holder)
        raise WorldError(f"{folder}: cannot be claimed; remove it if nothing of prism-launch runs here")
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _set_aside(folder: Path, dead: Owner | None) -> None:
    """Remove the claim of the dead, unless another process took it over since it was looked at."""
    stale = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    with contextlib.suppress(OSError):
        os.rename(folder, stale)
        if claim_holder(stale) != dead:
            os.rename(stale, folder)
            return
    shutil.rmtree(stale, ignore_errors=True)


def claim_holder(folder: Path) -> Owner | None:
    """Who holds a claim, living or not."""
    data = read_json(folder / "owner.json")
    try:
        return decode(Owner, data) if data is not None else None
    except SpecError:
        return None


def release(folder: Path, owner: Owner) -> None:
    """Give a claim back, if it is still ours."""
    if claim_holder(folder) == owner:
        shutil.rmtree(folder, ignore_errors=True)
