"""JSON that a user's file holds: read by one rule, and what is wrong with it named by file and line.

UTF-8, with or without a byte order mark. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.errors import UserError

BOM = "\ufeff"
#: Wrong lines of a file that are named one by one: there may be millions.
TOLD = 20


def decode(content: bytes, where: str) -> str:
    """The text of a file. Raises UserError where it is not UTF-8, naming the line."""
    try:
        return content.decode().removeprefix(BOM)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{where}:{line}: not text: byte {error.start} is not UTF-8; remove it or convert it") from None


def parse(text: str, where: str, *, strict: bool = False) -> Any:
    """The value of a JSON text; `where` is its file, or FILE:LINE. Raises UserError.

    `strict` refuses NaN and Infinity, which JSON does not have and configs of models do.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant if strict else None)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError:
        problem = "nested too deeply"
    except UnicodeEncodeError as error:
        problem = f"holds half a character, \\u{ord(error.object[error.start]):04x}, which UTF-8 cannot; remove it"
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if "\n" in text.strip() else f"column {error.colno}"
        problem = f"not JSON: {error.msg}, {place}"
    except ValueError as error:
        problem = f"not JSON: {'a number of too many digits' if 'digits' in str(error) else error}"
    raise UserError(f"{where}: {problem}")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON; write null or leave it out")


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises FileNotFoundError, and UserError for all else that is wrong."""
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(2, "No such file or directory", str(path)) from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    return parse(decode(content, str(path)), str(path))


def read_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no such file. Raises UserError."""
    try:
        value = read_json(path)
    except FileNotFoundError:
        return None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; damaged?")
    return value


def rows(text: str, where: str, problems: list[str]) -> Iterator[tuple[str, Any]]:
    """FILE:LINE and the value of each line that is not blank; what is wrong with others is added to `problems`.

    A corpus may hold millions of lines: the caller bounds the list.
    """
    # Not splitlines(): JSON strings may hold U+2028 and others that it would split at.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"{where}:{number}"
            try:
                value = parse(line, place, strict=True)
            except UserError as error:
                problems += error.problems
                continue
            yield place, value


def bounded(problems: list[str], where: str) -> list[str]:
    """The first problems of a file, and how many more there are."""
    more = len(problems) - TOLD
    return [*problems[:TOLD], *([f"{where}: {more:,} more lines are wrong"] if more > 0 else [])]
