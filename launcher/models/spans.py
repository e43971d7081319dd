"""Where a checkpoint's files lie: in a folder, or inside an uncompressed tar archive that is read in place. Standard
library only."""

from __future__ import annotations

import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import UserError
from launcher.files import pointer_at


@dataclass(frozen=True)
class Span:
    """Bytes of a file; `member` names the part of an archive that they are."""

    path: Path
    start: int
    size: int
    member: str = ""

    def __str__(self) -> str:
        return f"{self.path}: {self.member}" if self.member else str(self.path)

    def read(self, most: int = 1 << 62) -> bytes:
        """All of it, or its first bytes: for small files."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(min(self.size, most))


#: Name, with slashes, to its bytes.
Files = Mapping[str, Span]


def directly_in(folder: Path, *folders: str) -> Files:
    """The files that lie in a folder itself and in some folders of it, which may be links; no others are looked at."""
    places = [folder, *(folder / name for name in folders if (folder / name).is_dir())]
    paths = (p for place in places for p in place.iterdir() if p.is_file())
    return {path.relative_to(folder).as_posix(): Span(path, 0, path.stat().st_size) for path in paths}


def in_tar(path: Path) -> Files:
    """The regular files of an uncompressed archive. Raises UserError where it is none."""
    if instead := pointer_at(path):
        raise UserError(f"{path}: {instead}")
    try:
        with tarfile.open(path, "r:") as archive:
            found = [m for m in archive if m.isreg()]
    except PermissionError as error:
        raise UserError(f"{path}: {error.strerror}; make it readable, or copy it") from None
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{path}: not a whole uncompressed tar archive ({error}); gunzip it if it is compressed, and name "
            "the folder where the checkpoint is one"
        ) from None
    names = {m.name.removeprefix("./"): Span(path, m.offset_data, m.size, m.name.removeprefix("./")) for m in found}
    size = path.stat().st_size
    cut = [name for name, span in names.items() if span.start + span.size > size]
    if cut:
        raise UserError(f"{path}: cut short inside {cut[0]}; get the file again")
    return names
