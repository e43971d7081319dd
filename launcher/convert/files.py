"""Reading and writing the bytes of a checkpoint's files; `launcher.models.spans` says where they lie."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import BinaryIO

from launcher.models.spans import Files, Span


def in_folder(folder: Path) -> Files:
    """The files of a folder and of the folders in it."""
    paths = (p for p in folder.rglob("*") if p.is_file())
    return {path.relative_to(folder).as_posix(): Span(path, 0, path.stat().st_size) for path in paths}


class Member:
    """The first file of a new archive, written from end to end; how long it is stands before it once it is closed."""

    def __init__(self, archive: Path, name: str):
        self._name, self._file = name, archive.open("xb")
        self._file.write(bytes(tarfile.BLOCKSIZE))

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes."""
        return self._file.write(data)

    def tell(self) -> int:
        """Bytes written so far."""
        return self._file.tell() - tarfile.BLOCKSIZE

    def flush(self) -> None:
        """Give what is written to the kernel."""
        self._file.flush()

    def fileno(self) -> int:
        """The archive's file."""
        return self._file.fileno()

    def close(self) -> None:
        """Put the member's header in its place."""
        if self._file.closed:
            return
        with self._file:
            header = _header(self._name, self.tell()).tobuf(tarfile.GNU_FORMAT)
            self._file.write(bytes(-self.tell() % tarfile.BLOCKSIZE))
            self._file.seek(0)
            self._file.write(header)


def pack(folder: Path, archive: Path) -> None:
    """Move the other files of a folder into the uncompressed archive in it that `Member` has begun."""
    files = sorted((name, span) for name, span in in_folder(folder).items() if span.path != archive)
    with archive.open("ab") as begun, tarfile.open(fileobj=begun, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, span in files:
            with span.path.open("rb") as file:
                tar.addfile(_header(name, span.size), file)
            span.path.unlink()
    for parent, names, _ in os.walk(folder, topdown=False):
        for name in names:
            os.rmdir(Path(parent, name))


def _header(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(f"./{name}")
    info.size, info.mode = size, 0o644
    return info


def write_all(file: int, data: memoryview, offset: int) -> None:
    """Write bytes at a place of an open file, and have the kernel begin to put them on the disk.

    One call writes 2 GiB at most. Without the beginning made here all writing is left to the sync at the end.
    """
    start, size = offset, len(data)
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written
    begin_writing(file, start, size)


def begin_writing(file: int, start: int, size: int) -> None:
    """Have the kernel begin to write a part of a file that is in its cache; pages that wait for the disk stay."""
    if size >= 1 << 20:
        os.posix_fadvise(file, start, size, os.POSIX_FADV_DONTNEED)


def leave_cache(folder: Path) -> None:
    """Put a folder's files on the disk and out of the kernel's cache, so that who reads them reads the disk."""
    for span in in_folder(folder).values():
        file = os.open(span.path, os.O_RDONLY)
        try:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def read_into(file: BinaryIO, data: memoryview, offset: int) -> int:
    """Fill `data` from a place of an open file; returns the bytes read, fewer than asked only at the file's end."""
    done = 0
    while done < len(data):
        count = os.preadv(file.fileno(), [data[done:]], offset + done)
        if not count:
            break
        done += count
    return done
