"""A root, whose it is, and one that a group shares."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from launcher.errors import UserError, WorldError
from launcher.store.paths import run_dir
from launcher.users import user_name


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
