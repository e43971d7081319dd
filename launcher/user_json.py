"""JSON that a user's file holds: read by one rule, and what is wrong with it named by file and line.

UTF-8, with or without a byte order mark. Standard library only.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher import errors
from launcher.errors import UserError
from launcher.files import link_to_nothing, pointer, read_bytes

BOM = "\ufeff"
#: Bytes of a whole file: the largest tokenizer.json have some 40 MB.
_MOST = 256 << 20
#: Digits of the largest whole number that is also a floating-point number.
_DIGITS = sys.float_info.max_10_exp
#: How files begin that are something else than text in UTF-8, and what to do with them.
_OTHERS = {
    b"\xff\xfe": "UTF-16; convert it (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "UTF-16; convert it (iconv -f UTF-16 -t UTF-8)",
    b"\x1f\x8b": "compressed by gzip; unpack it, or of a corpus let its name end in .gz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"PAR1": "parquet; write it as JSON",
}
#: Half of a pair of escapes that make one character.
_HALF = re.compile(r"\\u[dD][89abAB]..(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..)\\u[dD][c-fC-F]..")


def decode(content: bytes, where: str) -> str:
    """The text of a file. Raises UserError where it is not UTF-8, naming the line, or stands for another file."""
    if instead := pointer(content):
        raise UserError(f"{where}: {instead}")
    if form := next((words for begins, words in _OTHERS.items() if content.startswith(begins)), None):
        raise UserError(f"{where}:1: not text in UTF-8: it is {form}")
    try:
        return content.decode().removeprefix(BOM)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{where}:{line}: not text: byte {error.start} is not UTF-8; remove it or convert it") from None


def parse(text: str, where: str, *, strict: bool = False) -> Any:
    """The value of a JSON text; `where` is its file, or FILE:LINE. Raises UserError.

    `strict` refuses NaN and Infinity, which JSON does not have and configs of models do.
    """
    place, several = where, "\n" in text.strip()
    try:
        value = (_STRICT if strict else _USUAL).decode(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError:
        problem = "not JSON: nested too deeply"
    except UnicodeEncodeError:
        half = _HALF.search(text)
        place += f":{text.count(chr(10), 0, half.start()) + 1}" if half and several else ""
        problem = f"holds half a character, {half[0] if half else 'a surrogate'}, which UTF-8 cannot; remove it"
    except json.JSONDecodeError as error:
        place += f":{error.lineno}" if several else ""
        problem = f"not JSON: {error.msg}, column {error.colno}"
    except ValueError as error:
        problem = f"not JSON: {error}"
    raise UserError(f"{place}: {problem}")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON; write null or leave it out")


def _whole(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"{text[:8]}... has {len(text)} digits and is too large for a number")
    return int(text)


_USUAL = json.JSONDecoder(parse_int=_whole)
_STRICT = json.JSONDecoder(parse_int=_whole, parse_constant=_refuse_constant)


def read_json(path: Path, most: int = _MOST) -> Any:
    """The value of a JSON file. Raises FileNotFoundError, and UserError for all else that is wrong."""
    try:
        content = read_bytes(path, most)
    except (FileNotFoundError, NotADirectoryError):
        if gone := link_to_nothing(path):
            raise UserError(f"{path}: {gone}") from None
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
    return errors.bounded(problems, where, "more lines are wrong")
