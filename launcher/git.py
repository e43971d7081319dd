"""Git, asked so that nothing runs which a repository or an archive brought along.

`git diff`, `status` and `describe --dirty` run filters, hooks, fsmonitor, drivers of diff, git itself in submodules,
and whatever fetches an object that is absent. All of that is chosen by configuration. So the repository is looked for
with its configuration, which runs nothing, and asked through a folder of our own: its objects, a copy of its index,
and a configuration in which nothing can be run.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_TIMEOUT_S = 20
#: What the repository's own configuration may say of how files are compared; none of it runs anything.
_SETTINGS = re.compile(r"core\.(autocrlf|eol|filemode|symlinks|ignorecase|trustctime|checkstat)")
_PLAIN_WORD = re.compile(r"[A-Za-z0-9]+")
#: Variables of the shell by which a repository is found and trusted.
_FINDING = ("GIT_CONFIG", "GIT_CEILING_DIRECTORIES", "GIT_DISCOVERY_ACROSS_FILESYSTEM")
_COMPARE = ("--no-ext-diff", "--no-textconv", "--no-color", "--no-renames", "--ignore-submodules=dirty")
#: Bytes of paths in one command.
_ARGUMENTS = 60_000


@dataclass(frozen=True)
class Repository:
    """A work tree at its commit, None before the first; `environment` makes git use the folder of our own."""

    top: Path
    commit: str | None
    environment: Mapping[str, str]

    def changed(self) -> list[str] | None:
        """Tracked paths that are not as in the commit; None where git cannot tell."""
        if self.commit is None:
            return []
        said = self._ask("diff", "HEAD", "--name-only", "-z", *_COMPARE)
        return None if said is None else _paths(said)

    def untracked(self) -> list[str]:
        """Paths that git neither tracks nor ignores."""
        return sorted(_paths(self._ask("ls-files", "--others", "--exclude-standard", "-z") or b""))

    def filtered(self, paths: Sequence[str]) -> set[str]:
        """Those of the paths that a filter would change, such as LFS: what lies there is not what is committed."""
        given = b"".join(os.fsencode(path) + b"\0" for path in paths)
        words = _paths(self._ask("check-attr", "-z", "--stdin", "filter", given=given) or b"")
        return {path for path, value in zip(words[::3], words[2::3], strict=False) if value not in _NO_FILTER}

    def diff(self, paths: Sequence[str]) -> bytes:
        """The changes of these paths as a patch that `git apply` takes, in the order of the paths."""
        pieces = (self._ask("diff", "HEAD", "--binary", *_COMPARE, "--", *some) for some in _in_commands(paths))
        return b"".join(piece or b"" for piece in pieces)

    def _ask(self, *words: str, given: bytes = b"") -> bytes | None:
        return _call(self.top, words, self.environment, given)


_NO_FILTER = ("unspecified", "unset")


@contextlib.contextmanager
def repository(folder: Path) -> Iterator[Repository | None]:
    """The git repository that holds a folder, to be asked within the block; None where it cannot be asked."""
    finding = {k: v for k, v in os.environ.items() if not k.startswith("GIT_") or k.startswith(_FINDING)}
    finding |= {"GIT_OPTIONAL_LOCKS": "0", "GIT_NO_LAZY_FETCH": "1", "LC_ALL": "C"}

    def find(*words: str) -> str:
        return os.fsdecode(_call(folder, words, finding) or b"").removesuffix("\n")

    top, own, common = (find("rev-parse", word) for word in ("--show-toplevel", "--git-dir", "--git-common-dir"))
    # A work tree that is configured to lie elsewhere would show files that are none of the repository's.
    is_own = bool(top) and os.path.lexists(Path(top, ".git")) and folder.resolve().is_relative_to(Path(top).resolve())
    if not is_own or not own:
        yield None
        return
    commit = find("rev-parse", "--verify", "--quiet", "HEAD") or None
    with contextlib.ExitStack() as stack:
        try:
            here = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prism-git-")))
            _make_apart(here, folder / own, folder / common, commit, find("config", "-z", "--list"))
        except OSError:  # no room for it, or the repository is damaged
            yield None
            return
        yield Repository(Path(top), commit, _environment(here, top))


def describe(folder: Path) -> str | None:
    """The commit of a folder, with `+` where it has changes or git cannot tell; None outside a repository."""
    with repository(folder) as found:
        if found is None or found.commit is None:
            return None
        return f"{found.commit}{'' if found.changed() == [] else '+'}"


def _make_apart(here: Path, own: Path, common: Path, commit: str | None, settings: str) -> None:
    """A git folder with the objects, index and commit of another, and nothing of its configuration that runs."""
    (here / "refs").mkdir()
    (here / "info").mkdir()
    (here / "objects").symlink_to((common / "objects").resolve())
    (here / "HEAD").write_text(f"{commit or 'ref: refs/heads/none'}\n", encoding="ascii")
    lines = ["[core]", "repositoryformatversion = 1", "bare = false"]
    for entry in settings.split("\0"):
        name, _, value = entry.partition("\n")
        if _SETTINGS.fullmatch(name) and _PLAIN_WORD.fullmatch(value):
            lines.append(f"{name.partition('.')[2]} = {value}")
    lines += ["[extensions]", "objectFormat = sha256"] if commit and len(commit) == 64 else []
    (here / "config").write_text("\n".join([*lines, ""]), encoding="ascii")
    for path in (own / "index", *own.glob("sharedindex.*")):
        if path.is_file():
            shutil.copy2(path, here / path.name)  # its time tells git which files to look into
    if (common / "info" / "exclude").is_file():
        shutil.copyfile(common / "info" / "exclude", here / "info" / "exclude")


def _environment(apart: Path, top: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("GIT_", "XDG_"))}
    return {
        **kept,
        "HOME": str(apart),
        "GIT_DIR": str(apart),
        "GIT_WORK_TREE": top,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_LITERAL_PATHSPECS": "1",
        "GIT_OPTIONAL_LOCKS": "0",
        "GIT_NO_LAZY_FETCH": "1",
        "LC_ALL": "C",
    }


def _call(folder: Path, words: Sequence[str], environment: Mapping[str, str], given: bytes = b"") -> bytes | None:
    """What git says; None where it is absent, fails or takes long."""
    command = ["git", "-C", str(folder), "--no-pager", *words]
    try:
        done = subprocess.run(
            command, input=given, capture_output=True, timeout=_TIMEOUT_S, env=environment, check=False
        )
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _paths(said: bytes) -> list[str]:
    return [os.fsdecode(path) for path in said.split(b"\0") if path]


def _in_commands(paths: Sequence[str]) -> Iterator[list[str]]:
    some: list[str] = []
    for path in paths:
        if some and sum(map(len, some)) + len(path) > _ARGUMENTS:
            yield some
            some = []
        some.append(path)
    if some:
        yield some
