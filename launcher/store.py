"""Paths, receipts, claims and atomic writes. Nothing else knows where anything lies under the root.

    ROOT/artifacts/KIND/FINGERPRINT/            a whole artifact: its ports' folders, `artifact.json` (the receipt)
    ROOT/artifacts/KIND/FINGERPRINT.partial/    the same while it is made; renamed when whole
    ROOT/artifacts/KIND/FINGERPRINT.claim/      who is making it
    ROOT/artifacts/KIND/FINGERPRINT.damaged.N/  one whose files no longer match its receipt, set aside
    ROOT/runs/NAME/run.json                     the recipe as resolved and its plan; written by the login side alone
    ROOT/runs/NAME/stages/STAGE/stage.json
    ROOT/runs/NAME/stages/STAGE/ATTEMPT/        events.jsonl, heartbeats, exit files and logs of one attempt

Standard library only.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher import corpus
from launcher.errors import UserError, WorldError
from launcher.users import user_name

RECEIPT = "artifact.json"
RECEIPT_SCHEMA = 1
#: In an unfinished artifact: what a later attempt goes on from. Never part of the whole one.
PROGRESS = "progress"


# ------------------------------------------------------------------------------------------------------------- paths


def partial_dir(root: Path, artifact: str) -> Path:
    """Where an artifact is made; `artifact` is relative to the root, as `StageSpec.artifact` gives it."""
    return root / f"{artifact}.partial"


def working_path(root: Path, artifact: str, path: str) -> Path:
    """The place in the unfinished artifact of a path inside the finished one."""
    return partial_dir(root, artifact) / Path(path).relative_to(artifact)


def run_dir(root: Path, run: str) -> Path:
    """The folder of a run."""
    return root / "runs" / run


def stage_dir(root: Path, run: str, stage: str) -> Path:
    """The folder of a stage in a run; attempts are folders inside it."""
    return run_dir(root, run) / "stages" / stage


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


def claim_dir(root: Path, artifact: str) -> Path:
    """The claim of whoever makes an artifact."""
    return root / f"{artifact}.claim"


def driver_claim(root: Path, run: str) -> Path:
    """The claim of the process that drives a run."""
    return run_dir(root, run) / "driver.claim"


# ------------------------------------------------------------------------------------------------------ atomic writes


def write_atomic(path: Path, text: str, mode: int = 0o600) -> None:
    """Write a file whole or not at all: beside its place, synced, then renamed. In a shared root its group may too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, mode)
        share(Path(name))
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> Any | None:
    """The file's value; None where it is absent or not whole JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
        return None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, whose damaged lines, and a half-written last one, count for nothing."""
    rows = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def sync_tree(folder: Path) -> None:
    """Push every file and folder under `folder` to disk, so that a rename after it cannot outrun its content."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in [*names, "."]:
            sync(Path(parent, name))


# ----------------------------------------------------------------------------------------------------------- receipts


@dataclass(frozen=True)
class Receipt:
    """What `artifact.json` says of a whole artifact.

    `files` maps paths inside the artifact to (bytes, sha256). `record` is what the workers wrote about their work
    (verification, versions, figures); `seconds` and `cpu_seconds` sum over attempts.
    """

    kind: str
    kind_version: int
    stage: str
    run: str
    fingerprint: str
    config: Mapping[str, Any]
    seed: int
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]
    files: Mapping[str, tuple[int, str]]
    record: Mapping[str, Any] = field(default_factory=dict)
    created: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_memory_bytes: int = 0
    attempts: int = 1
    made_by: str = ""
    made_on: str = ""
    image: str | None = None
    schema: int = RECEIPT_SCHEMA


def read_receipt(root: Path, artifact: str) -> Receipt | None:
    """The receipt of an artifact that is whole: schema known, every file there with its size. Else None."""
    from launcher.spec import SpecError, decode

    data = read_json(root / artifact / RECEIPT)
    if not isinstance(data, dict) or data.get("schema") != RECEIPT_SCHEMA:
        return None
    try:
        receipt = decode(Receipt, data)
    except (SpecError, OverflowError):
        return None
    for name, (size, _) in receipt.files.items():
        try:
            if (root / artifact / name).stat().st_size != size:
                return None
        except (OSError, ValueError):  # a name that no file can have
            return None
    return receipt


def receipts(root: Path, kind: str) -> list[Receipt]:
    """What the artifacts of a kind tell of their making, the oldest first; whether their files are still there is not
    looked at."""
    from launcher.spec import SpecError, decode

    found = []
    for path in (root / "artifacts" / kind).glob(f"*/{RECEIPT}"):
        with contextlib.suppress(SpecError, OSError, OverflowError):
            data = None if "." in path.parent.name else read_json(path)  # .partial, .damaged
            if isinstance(data, dict) and data.get("schema") == RECEIPT_SCHEMA:
                found.append(decode(Receipt, data))
    return sorted(found, key=lambda receipt: receipt.created)


def damaged_files(root: Path, artifact: str, receipt: Receipt) -> list[str]:
    """Files of an artifact whose checksum is no longer the receipt's."""
    return [name for name, (_, digest) in receipt.files.items() if sha256_of(root / artifact / name) != digest]


def sha256_of(path: Path) -> str:
    """The file's SHA-256, read in pieces of 8 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(8 << 20):
            digest.update(piece)
    return digest.hexdigest()


def tree_fingerprint(path: Path) -> str:
    """A digest of the names, sizes and modification times of a file or of all files in a folder, links followed."""
    digest = hashlib.sha256()
    for file in corpus.walk(path).files:
        stat = file.stat()
        line = f"{file.relative_to(path)}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
        digest.update(line.encode(errors="surrogateescape"))  # a name need not be UTF-8
    return digest.hexdigest()[:20]


def list_files(folder: Path) -> dict[str, tuple[int, str]]:
    """Every regular file under `folder` but the receipt and what is in progress: path inside it to (bytes, sha256)."""
    left_out = {RECEIPT, PROGRESS}
    found = sorted(p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).parts[0] not in left_out)
    return {str(p.relative_to(folder)): (p.stat().st_size, sha256_of(p)) for p in found}


def read_unsealed(root: Path, artifact: str) -> Receipt | None:
    """The receipt of an artifact that is whole but for its last rename: its maker was killed while sealing."""
    return read_receipt(root, f"{artifact}.partial")


def seal(root: Path, artifact: str, receipt: Receipt) -> None:
    """Make the unfinished artifact whole: receipt, sync, rename. A whole one that is there already is kept.

    The receipt comes first, so that a seal that is cut off anywhere is finished by `seal` alone, without what was in
    progress.
    """
    from launcher.spec import encode

    partial, target = partial_dir(root, artifact), root / artifact
    write_json(partial / RECEIPT, encode(receipt))
    shutil.rmtree(partial / PROGRESS, ignore_errors=True)
    share_tree(partial)
    sync_tree(partial)
    if target.exists() and read_receipt(root, artifact) is not None:
        shutil.rmtree(partial)
    else:
        if target.exists():
            os.replace(target, f"{target}.damaged.{time.time_ns()}")
        os.replace(partial, target)
        sync(target.parent)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ------------------------------------------------------------------------------------------------------------- claims


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
    from launcher.spec import encode

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
    from launcher.spec import SpecError, decode

    data = read_json(folder / "owner.json")
    try:
        return decode(Owner, data) if data is not None else None
    except SpecError:
        return None


def release(folder: Path, owner: Owner) -> None:
    """Give a claim back, if it is still ours."""
    if claim_holder(folder) == owner:
        shutil.rmtree(folder, ignore_errors=True)


# --------------------------------------------------------------------------------------------------------------- root


def open_root(path: Path, group: str | None = None) -> Path:
    """Make the root if need be and see that it can be written: 0700, or where a group shares it 2770 and the group's.

    With a group, what this process makes from now on is open to it too. Raises UserError where the root cannot be
    written or shared.
    """
    try:
        if group is not None:
            _make_shared(path, _group_id(group))
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(b"x")
    except OSError as error:
        hint = "free some room" if error.errno == 28 else "choose another with --root or PRISM_ROOT"
        kind = WorldError if error.errno == 28 else UserError
        raise kind(f"{path}: the store's root cannot be written: {error.strerror}; {hint}") from None
    keep_shared(path)
    return path.resolve()


def refuse_foreign(root: Path) -> None:
    """Raises UserError where a root could hold what somebody else wrote: runs name commands, which we would execute.

    A root is its owner's, or the superuser's, or a group's where it is shared with one.
    """
    with contextlib.suppress(OSError):
        is_open = bool(root.stat().st_mode & stat.S_IXOTH)
        _refuse_foreign((root, *_folders(root.glob("*")), *_folders(root.glob("*/*"))) if is_open else (root,), root)


def refuse_foreign_run(root: Path, run: str) -> None:
    """The same for the files of one run that name what is executed."""
    folder = run_dir(root, run)
    with contextlib.suppress(OSError):
        if root.stat().st_mode & stat.S_IXOTH:
            stages = folder / "stages"
            read = (folder / "run.json", stages, *_folders(stages.glob("*")), *stages.glob("*/stage.json"))
            _refuse_foreign((*read, *_folders(folder.glob("snapshot")), *_folders(folder.glob("snapshot/*"))), root)


def _folders(paths: Iterable[Path]) -> Iterator[Path]:
    return (path for path in paths if path.is_dir())


def _refuse_foreign(paths: Iterable[Path], root: Path) -> None:
    shared = is_shared(root)
    for path in paths:
        try:
            found = path.stat()  # where a link leads
        except OSError:
            continue
        if found.st_uid not in (os.geteuid(), 0) and not shared:
            raise UserError(
                f"{path}: belongs to {user_name(found.st_uid)}, and what its runs name would be executed as you; "
                "choose another with --root. "
                f"To share a store on purpose: share_group in the profile, or chmod g+ws {root}"
            )
        if found.st_mode & stat.S_IWOTH:
            raise UserError(
                f"{path}: everybody may write here (it is open to all), and what lies here would be executed as "
                f"you; look at what it holds, then close it: chmod -R o-w {path}; or choose another with --root"
            )


def keep_shared(root: Path) -> None:
    """Where a root is shared, let what this process makes from now on be open to its group."""
    if root.is_dir() and is_shared(root):
        os.umask(0o007)


def _group_id(group: str) -> int:
    import grp

    try:
        number = grp.getgrnam(group).gr_gid
    except KeyError:
        raise UserError(f"share_group: there is no group {group} on this machine") from None
    if os.geteuid() != 0 and number not in (os.getegid(), *os.getgroups()):
        raise UserError(f"share_group: you are not in group {group}; `id` shows yours")
    return number


def _make_shared(path: Path, group: int) -> None:
    if not path.exists():
        path.mkdir(mode=0o700, parents=True)
    elif is_shared(path) and path.stat().st_gid == group:
        return
    elif any(path.iterdir()):
        raise UserError(
            f"{path}: this store is not shared with the profile's share_group; share it with: chgrp -R {group} {path}; "
            f"chmod -R g+rwX {path}; find {path} -type d -exec chmod g+s {{}} +; or choose another with --root"
        )
    os.chown(path, -1, group)
    os.chmod(path, 0o2770)


def is_shared(folder: Path) -> bool:
    """Whether a folder and what is made in it belongs to a group: setgid, and open to the group."""
    mode = folder.stat().st_mode
    return bool(mode & stat.S_ISGID and mode & stat.S_IWGRP)


def share(path: Path) -> None:
    """Open a file or folder to its group as far as to its owner, where the folder that it stands in is shared."""
    if is_shared(path.parent):
        mode = path.stat().st_mode
        os.chmod(path, stat.S_IMODE(mode) | (mode & 0o700) >> 3 | (stat.S_ISGID if path.is_dir() else 0))


def share_tree(folder: Path) -> None:
    """`share` for a folder and all in it. What another user made is left as it is."""
    if is_shared(folder.parent):
        for path in (folder, *folder.rglob("*")):
            with contextlib.suppress(PermissionError):
                if not path.is_symlink():
                    share(path)
