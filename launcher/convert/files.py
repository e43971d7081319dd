"""Where a checkpoint's files lie: in a folder, or inside an uncompressed tar archive that is read in place."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from launcher.errors import UserError


@dataclass(frozen=True)
class Span:
    """Bytes of a file; `member` names the part of an archive that they are."""

    path: Path
    start: int
    size: int
    member: str = ""

    def __str__(self) -> str:
        return f"{self.path}: {self.member}" if self.member else str(self.path)

    def read(self) -> bytes:
        """All of it: for small files."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(self.size)


#: Name, with slashes, to its bytes.
Files = Mapping[str, Span]


def in_folder(folder: Path) -> Files:
    """The files of a folder and of the folders in it."""
    paths = (p for p in folder.rglob("*") if p.is_file())
    return {path.relative_to(folder).as_posix(): Span(path, 0, path.stat().st_size) for path in paths}


def in_tar(path: Path) -> Files:
    """The regular files of an uncompressed archive. Raises UserError where it is none."""
    try:
        with tarfile.open(path, "r:") as archive:
            found = [m for m in archive if m.isreg()]
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{path}: not a whole uncompressed tar archive ({error}); gunzip it if it is compressed"
        ) from None
    names = {m.name.removeprefix("./"): Span(path, m.offset_data, m.size, m.name.removeprefix("./")) for m in found}
    size = path.stat().st_size
    cut = [name for name, span in names.items() if span.start + span.size > size]
    if cut:
        raise UserError(f"{path}: cut short inside {cut[0]}; get the file again")
    return names


def pack(folder: Path, archive: Path) -> None:
    """Move the files of a folder into a new uncompressed archive outside it or in it, one after another."""
    files = sorted(in_folder(folder).items())
    with tarfile.open(archive, "x", format=tarfile.GNU_FORMAT) as tar:
        for name, span in files:
            info = tarfile.TarInfo(f"./{name}")
            info.size, info.mode = span.size, 0o644
            with span.path.open("rb") as file:
                tar.addfile(info, file)
            span.path.unlink()
    for parent, names, _ in os.walk(folder, topdown=False):
        for name in names:
            os.rmdir(Path(parent, name))


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
