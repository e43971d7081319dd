"""Files that users and others name, read within bounds: no device, no pipe that nobody fills, no more than a limit."""

from __future__ import annotations

import errno
import os
import select
import stat
from pathlib import Path

from launcher.errors import UserError

#: Bytes of a file that people write: recipes, profiles, config.json.
MOST = 16 << 20
#: Bytes of a file of texts or problems, which are held in memory at once.
MOST_ROWS = 4 << 30
_PIPE_S = 10
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


#: How the text begins that a clone holds in a file's place until the file itself is fetched.
_POINTERS = {
    b"version https://git-lfs.github.com/spec/": "Git LFS and not the file itself; get that with `git lfs pull`",
    b"version https://hawser.github.com/spec/": "Git LFS and not the file itself; get that with `git lfs pull`",
    b"/annex/objects/": "git-annex and not the file itself; get that with `git annex get`",
}
#: Bytes of the longest pointer.
MOST_POINTER = 1024


def pointer(content: bytes) -> str | None:
    """What to say of a file that only stands for another, by its beginning."""
    found = (words for begins, words in _POINTERS.items() if content.startswith(begins))
    return next((f"a pointer of {words}" for words in found), None)


def pointer_at(path: Path) -> str | None:
    """The same of a file, of which the beginning is read where it is small enough."""
    if not path.is_file() or path.stat().st_size > MOST_POINTER:
        return None
    with path.open("rb") as file:
        return pointer(file.read(MOST_POINTER))


def link_to_nothing(path: Path) -> str | None:
    """What to say of a link whose target is absent, as caches of a hub are full of when a file was not fetched."""
    if not path.is_symlink() or path.exists():
        return None
    return f"a link to {path.readlink()}, which is not there; get the file again, or remove the link"


def read_bytes(path: Path, most: int = MOST, *, piped: bool = False) -> bytes:
    """What a regular file holds; where `piped`, also what comes through a pipe, as from `<(program)`.

    Raises OSError where it cannot be opened, UserError where it is no file or holds more than `most` bytes.
    """
    if "\0" in str(path):
        raise UserError(f"{str(path)!r}: a path cannot hold a NUL character")
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a pipe waits for nobody
    try:
        kind = stat.S_IFMT(os.fstat(handle).st_mode)
        if kind == stat.S_IFDIR:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        is_pipe = piped and kind == stat.S_IFIFO
        if kind != stat.S_IFREG and not is_pipe:
            raise UserError(f"{path}: is {_KINDS.get(kind, 'special')}; name a file")
        return _read(handle, path, most, is_pipe)
    finally:
        os.close(handle)


def _read(handle: int, path: Path, most: int, is_pipe: bool) -> bytes:
    pieces: list[bytes] = []
    count = 0
    while True:
        if is_pipe and not select.select([handle], [], [], _PIPE_S)[0]:
            raise UserError(f"{path}: nothing has come through this pipe in {_PIPE_S} s")
        piece = os.read(handle, 1 << 20)
        if not piece:
            return b"".join(pieces)
        pieces.append(piece)
        count += len(piece)
        if count > most:
            raise UserError(f"{path}: is larger than {most >> 20} MiB, which is more than is read of such a file")
