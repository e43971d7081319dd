"""The two kinds of failure that reach a user as text and an exit code; `launcher.cli` prints them, in one place."""

from __future__ import annotations

from collections.abc import Iterable


class PrismError(Exception):
    """Base of every failure that is reported without a traceback."""

    exit_code = 1


class UserError(PrismError):
    """The user's input is wrong: recipe, flag, file, checkpoint. Exit code 2.

    `problems` holds one line each: `where: what is wrong, the mend`.
    """

    exit_code = 2

    def __init__(self, problems: str | Iterable[str]):
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class WorldError(PrismError):
    """The world is at fault: disk full, folder not writable, program absent, a stage failed. Exit code 1."""


#: Lines of one kind that are shown.
MOST_SHOWN = 20


def bounded(problems: Iterable[str], where: object, more: str = "more") -> list[str]:
    """The first of many problems, and how many `more` there are at `where`."""
    found = list(problems)
    left = len(found) - MOST_SHOWN
    return found[:MOST_SHOWN] + [f"{where}: {left:,} {more}"] * (left > 0)


def listed(names: Iterable[str], most: int = 5) -> str:
    """Names with commas between them, the first of many and how many there are."""
    found = list(names)
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")
