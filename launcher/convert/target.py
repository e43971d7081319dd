"""Where a checkpoint is written: looked at before anything is read, then there whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from launcher import store
from launcher.errors import UserError, WorldError
from launcher.models.formats import Format

#: The end of an archive's name, which NeMo goes by.
ARCHIVE = ".nemo"
#: Seconds after which a process that was to say whose its claim is has died.
_CLAIMING_S = 60


def check_target(target: Path, to: Format | None, sources: Sequence[Path]) -> None:
    """Raise UserError where a target can be refused by its name and place: `to` is None for a merge."""
    target = Path(os.path.abspath(target))
    problems = []
    if target.suffix == ARCHIVE and to != "nemo":
        problems.append(f"{target}: {ARCHIVE} is the name of an archive of format nemo; name a folder")
    if os.path.lexists(target) and not _is_empty(target, may_be_folder=target.suffix != ARCHIVE):
        problems.append(f"{target}: is there already; name a new folder")
    for source in sources:
        inside = Path(os.path.realpath(source))
        if inside in Path(os.path.realpath(target)).parents:
            problems.append(f"{target}: lies in {source}, which is read; name a folder outside it")
        if Path(os.path.realpath(_partial(target))) in (inside, *inside.parents):
            problems.append(f"{source}: lies where {target} is made, and would be removed; rename it first")
    if problems:
        raise UserError(problems)


def _is_empty(path: Path, may_be_folder: bool) -> bool:
    return may_be_folder and path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _partial(target: Path) -> Path:
    """Where a target is made, under a name that no folder of a user's has: what lies there is removed."""
    return target.with_name(f"{target.name}.prism-partial")


def check_room(folder: Path, needed: int) -> None:
    """Raises WorldError where the disk of `folder` has no room for so many bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise WorldError(
            f"{folder}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; "
            "free some room, or write to another disk"
        )


@contextlib.contextmanager
def new_folder(target: Path, to: Format | None, sources: Sequence[Path]) -> Iterator[Path]:
    """A folder `target` that is there whole or not at all: filled as `TARGET.prism-partial`, synced, renamed.

    A file in it that has the target's own name, an archive, takes the folder's place. What a killed process left is
    removed; one that lives is not disturbed. Raises UserError where `check_target` does or the
    target cannot be written.
    """
    target = Path(os.path.abspath(target))
    partial, claim = _partial(target), target.with_name(f"{target.name}.prism-claim")
    owner, absent = store.this_process(), [p for p in target.parents if not p.exists()]
    try:
        check_target(target, to, sources)
        holder = store.claim(claim, owner)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror}; name another folder") from None
    if holder is not None:
        raise UserError(
            f"{partial}: another conversion is writing it (process {holder.pid} on {holder.host}); "
            f"wait for it, or remove it and {claim} if that is gone"
        )
    try:
        shutil.rmtree(partial, ignore_errors=True)
        _remove_attempts(claim)
        partial.mkdir()
        yield partial
        store.sync_tree(partial)
        archive = partial / target.name
        os.replace(archive if archive.is_file() and target.suffix == ARCHIVE else partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        store.release(claim, owner)
        for parent in absent:  # those that were made for nothing are empty
            with contextlib.suppress(OSError):
                parent.rmdir()


def _remove_attempts(claim: Path) -> None:
    """Take away what processes that were killed while they took the claim have left.

    One that does not say yet whose it is may be a living process's for a moment.
    """
    for path in claim.parent.glob(f".{glob.escape(claim.name)}.*"):
        holder = store.claim_holder(path)
        with contextlib.suppress(OSError):
            dead = (
                time.time() - path.stat().st_mtime > _CLAIMING_S if holder is None else store.is_alive(holder) is False
            )
            if dead:
                shutil.rmtree(path, ignore_errors=True)
