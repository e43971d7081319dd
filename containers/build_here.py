#!/usr/bin/env python3
"""Builds the `cpu` image from what this machine has, without a registry and without a network.

    build_here.py --docker NAME[:TAG]     into Docker (or --podman)
    build_here.py --folder DIR            as a folder, for Charliecloud; DIR must not exist
    --bare                                Python alone, without the packages of this interpreter's environment
    --mount-point PATH                    an empty folder in the image, for runtimes that make none; may be repeated

The image holds, copied from this machine: the interpreter that runs this script with its standard library
(/opt/python), the packages of its environment (/opt/prism, a virtual environment), a shell and `env`, and the libraries
that they are linked with. It is for this machine's architecture, and as good as this machine. Standard library only.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"
PATH_INSIDE = "/opt/prism/bin:/usr/bin:/bin"
PROGRAMS = ("sh", "env", "cat", "ls", "id", "sleep")
FOLDERS = ("bin", "dev", "etc", "lib", "lib64", "mnt", "opt", "proc", "run", "sys", "tmp", "usr/bin", "var/tmp")
#: Of the standard library and of site-packages: what no stage runs, and the checkout that an editable install names.
LEFT_OUT = re.compile(
    r"^opt/python/lib/python[\d.]+/(test|idlelib|tkinter|turtledemo|ensurepip|site-packages|dist-packages|config-.*)(/|$)"
    r"|/site-packages/(pip|ruff|mypy|pytest|_pytest|hypothesis)(/|$)|/site-packages/_?_?editable.*"
    r"|/site-packages/_prism_launch[^/]*$"
)


def main(argv: list[str]) -> int:
    """Build one image; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--docker", metavar="NAME[:TAG]")
    where.add_argument("--podman", metavar="NAME[:TAG]")
    where.add_argument("--folder", metavar="DIR")
    parser.add_argument("--bare", action="store_true")
    parser.add_argument("--mount-point", metavar="PATH", action="append", default=[])
    args = parser.parse_args(argv)
    program = "podman" if args.podman else "docker"
    if args.folder:
        os.makedirs(args.folder)
        command = ["tar", "--extract", "--no-same-owner", f"--directory={args.folder}"]
    else:
        change = f"--change=ENV PATH={PATH_INSIDE}"
        command = [program, "import", change, "-", args.docker or args.podman]
    if shutil.which(command[0]) is None:
        print(f"build_here.py: {command[0]} is not installed here", file=sys.stderr)
        return 1
    with subprocess.Popen(command, stdin=subprocess.PIPE) as into:
        assert into.stdin is not None
        try:
            with into.stdin, tarfile.open(fileobj=into.stdin, mode="w|", format=tarfile.PAX_FORMAT) as tar:
                write(Image(tar), args.bare, args.mount_point)
        except BrokenPipeError:  # it has said itself why it takes no more
            pass
    return into.returncode


class Image:
    """A tar stream that becomes the image: everything root's and readable, no name twice."""

    def __init__(self, tar: tarfile.TarFile):
        self.tar = tar
        self.names: set[str] = set()

    def add(self, source: Path, target: str) -> None:
        """Copy a file, or a folder with all in it but what is left out."""
        self.folder(os.path.dirname(target))
        self.tar.add(source, arcname=target, filter=self._taken)

    def folder(self, name: str) -> None:
        """Make a folder and those that it lies in."""
        for depth in range(1, name.count("/") + 2):
            member = tarfile.TarInfo("/".join(name.split("/")[:depth]))
            member.type, member.mode = tarfile.DIRTYPE, 0o1777 if member.name.endswith("tmp") else 0o755
            self._own(member)

    def link(self, name: str, target: str) -> None:
        """Make a symbolic link."""
        member = tarfile.TarInfo(name)
        member.type, member.linkname = tarfile.SYMTYPE, target
        self._own(member)

    def file(self, name: str, text: str) -> None:
        """Make a small file."""
        member = tarfile.TarInfo(name)
        member.size = len(text.encode())
        self._own(member, io.BytesIO(text.encode()))

    def _own(self, member: tarfile.TarInfo, content: io.BytesIO | None = None) -> None:
        taken = self._taken(member)
        if taken is not None:
            self.tar.addfile(taken, content)

    def _taken(self, member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if LEFT_OUT.search(member.name) or member.name in self.names:
            return None
        self.names.add(member.name)
        member.uid = member.gid = 0
        member.uname = member.gname = "root"
        member.mode |= 0o444 | (0o111 if member.isdir() or member.mode & 0o100 else 0)
        return member


def write(image: Image, bare: bool, mount_points: Iterable[str]) -> None:
    """Write the whole image."""
    for folder in (*FOLDERS, *(point.strip("/") for point in mount_points)):
        image.folder(folder)
    linked = [*_programs(image), *_python(image)]
    if not bare:
        linked += _tree(image, Path(sysconfig.get_path("purelib")), f"opt/prism/lib/{VERSION}/site-packages")
    for library in libraries(linked):
        image.add(Path(library).resolve(), library.lstrip("/"))


def _programs(image: Image) -> Iterator[Path]:
    for name in PROGRAMS:
        found = shutil.which(name)
        if found is None:
            raise SystemExit(f"build_here.py: {name} is not on the PATH")
        image.add(Path(found).resolve(), f"usr/bin/{name}")
        yield Path(found)
    for name in ("sh", "env"):  # where scripts look for them
        image.link(f"bin/{name}", f"/usr/bin/{name}")
    image.file("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n")
    image.file("etc/group", "root:x:0:\n")
    for name in ("hosts", "resolv.conf"):  # runtimes mount the machine's own over them
        image.file(f"etc/{name}", "")


def _python(image: Image) -> Iterator[Path]:
    """The interpreter, its standard library, and a virtual environment that finds it."""
    executable = Path(sys.base_prefix, "bin", VERSION)
    image.add(executable.resolve(), f"opt/python/bin/{VERSION}")
    yield executable
    yield from _tree(image, Path(sysconfig.get_path("stdlib")), f"opt/python/lib/{VERSION}")
    image.file("opt/prism/pyvenv.cfg", "home = /opt/python/bin\ninclude-system-site-packages = false\n")
    for name in ("python", "python3", VERSION):
        image.link(f"opt/prism/bin/{name}", f"/opt/python/bin/{VERSION}")


def _tree(image: Image, source: Path, target: str) -> Iterator[Path]:
    """Add a folder; yields what in it may be linked with libraries outside."""
    image.add(source, target)
    for path in source.rglob("*.so*"):
        if path.is_file() and not LEFT_OUT.search(f"{target}/{path.relative_to(source)}"):
            yield path


def libraries(linked: Iterable[Path]) -> list[str]:
    """What the dynamic linker would load for these files from outside of Python's own folders."""
    found: set[str] = set()
    files = [str(path) for path in linked]
    own = tuple(os.path.realpath(sysconfig.get_path(name)) + os.sep for name in ("stdlib", "purelib"))
    for start in range(0, len(files), 200):
        done = subprocess.run(["ldd", *files[start : start + 200]], capture_output=True, text=True, check=False)
        found |= set(re.findall(r"(?:=> |^\t)(/\S+)", done.stdout, re.MULTILINE))
    return sorted(path for path in found if not os.path.realpath(path).startswith(own))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
