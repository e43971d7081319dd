"""YAML as plain data that remembers its lines, with the traps of YAML 1.1 closed.

Plain scalars follow YAML 1.2: only `true` and `false` are booleans (`on`, `yes` are strings), `1e-5` is a number,
`4:00:00`, dates and numbers with leading zeros stay strings. Duplicate keys, tags, NaN and infinity are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from launcher.errors import UserError
from launcher.files import read_bytes
from launcher.terminal import name_of

_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|nan)", re.IGNORECASE)
_NULLS = {"", "~", "null", "Null", "NULL"}
_BOOLS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
#: Keys and values, each time that an alias or a merge repeats them.
_MAX_NODES = 400_000
_MAX_DEPTH = 64
#: Digits of a whole number: products of several such numbers are still floating-point numbers.
_MAX_DIGITS = 40
#: Blanks that are none for YAML, and characters that are not seen at all.
_UNSEEN = re.compile(
    "[\u00a0\u00ad\u061c\u1680\u180e\u2000-\u200f\u2028-\u202f\u205f-\u206f\u3000\ufeff"
    "\u034f\u115f\u1160\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e01ef]"
)
_QUOTES = re.compile("[\u2018-\u201f\uff02\uff07]")
_COLONS = re.compile("[\u02d0\u2236\ua789\ufe13\ufe55\uff1a]")
#: What YAML takes nowhere.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Document:
    """A mapping read from YAML. `positions` maps a dotted path, list items as `[i]`, to `file:line`.

    `written` is, by the same paths, the text of what is neither a string nor empty: `12e45`, `true`.
    """

    data: Mapping[str, Any]
    positions: Mapping[str, str]
    written: Mapping[str, str] = field(default_factory=dict)


def join(path: str, key: str) -> str:
    """A dotted path one key deeper."""
    return f"{path}.{key}" if path else key


def read_document(path: Path, shown: str | None = None, *, piped: bool = False) -> Document:
    """Read a YAML file, or a pipe, whose top is a mapping; `shown` is its name in messages.

    Raises UserError with all problems.
    """
    shown = shown or str(path)
    try:
        text = read_bytes(path, piped=piped).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{shown}: not a text file (byte {error.start} is not UTF-8); a recipe is YAML") from None
    except IsADirectoryError:
        raise UserError(f"{shown}: is a folder; name a .yaml file in it") from None
    except OSError as error:
        raise UserError(f"{shown}: {error.strerror}") from None
    return parse_document(text, shown)


def parse_document(text: str, shown: str) -> Document:
    """The same, from a string."""
    node = _compose(text, shown)
    if node is None:
        raise UserError(f"{shown}: is empty; a recipe has at least `stages:`")
    if not isinstance(node, yaml.MappingNode):
        raise UserError(_explained(text, shown, node.start_mark.line, "expected `key: value` lines at the top"))
    builder = _Builder(shown)
    data = builder.whole(node)
    if builder.problems:
        raise UserError(builder.problems)
    return Document(data, builder.positions, builder.written)


def parse_value(text: str, shown: str) -> Any:
    """One YAML value, as `--set KEY=VALUE` gives it."""
    node = _compose(text, shown)
    if node is None:
        return None
    builder = _Builder(shown)
    value = builder.whole(node)
    if builder.problems:
        raise UserError([f"{shown}: {p.split(': ', 1)[1].removeprefix('(top): ')}" for p in builder.problems])
    return value


def _compose(text: str, shown: str) -> Any:
    if sum(map(text.count, ",:\n")) > _MAX_NODES:  # every value needs one of them; composing takes a kilobyte each
        raise UserError(f"{shown}: more than {_MAX_NODES} values, which is more than a recipe may hold")
    if control := _CONTROL.search(text):
        line, column = _place(text, control.start())
        raise UserError(f"{shown}:{line}: not YAML: {name_of(control[0])} in column {column}; remove it")
    try:
        return yaml.compose(text, Loader=_LOADER)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        hint = "; indent with spaces, not tabs" if "\t" in text else ""
        message = f"not YAML: {error.problem or error.context}{hint}"
        raise UserError(_explained(text, shown, mark.line if mark else 0, message)) from None
    except yaml.YAMLError as error:
        raise UserError(f"{shown}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{shown}: nested too deeply") from None


def _explained(text: str, shown: str, line: int, message: str) -> str:
    """A problem of syntax in a line, counted from 0: where a character before it deceives the eye, that is told."""
    lines = text.split("\n")
    for number in range(min(line, len(lines) - 1), max(-1, line - 3), -1):
        code = lines[number].partition(" #")[0].removeprefix("\ufeff" if number == 0 else "")
        if found := _UNSEEN.search(code):
            where = f"column {found.start() + 1} holds a {name_of(found[0])}, which is no blank"
            return f"{shown}:{number + 1}: {message}: {where}; type a plain space, or remove it"
        if found := _QUOTES.search(code):
            where = f"column {found.start() + 1} holds a {name_of(found[0])}, which is no quote"
            return f"{shown}:{number + 1}: {message}: {where}; type a plain one"
        if found := _COLONS.search(code):
            where = f"column {found.start() + 1} holds a {name_of(found[0])}, which is no colon"
            return f"{shown}:{number + 1}: {message}: {where}; type a plain one"
    return f"{shown}:{line + 1}: {message}"


def _place(text: str, offset: int) -> tuple[int, int]:
    """Line and column, counted from 1."""
    return text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset)


class _Builder:
    """Plain data from composed nodes; collects positions and problems on the way."""

    def __init__(self, shown: str):
        self.shown = shown
        self.positions: dict[str, str] = {}
        self.written: dict[str, str] = {}
        self.problems: list[str] = []
        self.count = 0
        self.open: set[int] = set()

    def at(self, node: Any) -> str:
        return f"{self.shown}:{node.start_mark.line + 1}"

    def problem(self, node: Any, path: str, message: str) -> None:
        self.problems.append(f"{self.at(node)}: {path or '(top)'}: {message}")

    def whole(self, node: Any) -> Any:
        try:
            return self.build(node, "")
        except RecursionError:
            raise UserError(f"{self.at(node)}: nested too deeply, or an alias refers to what it stands in") from None

    def build(self, node: Any, path: str) -> Any:
        self.bump()
        if len(self.open) > _MAX_DEPTH:
            raise UserError(f"{self.at(node)}: nested too deeply: more than {_MAX_DEPTH} levels")
        if id(node) in self.open:
            raise UserError(f"{self.at(node)}: {path}: an alias refers to what it stands in")
        if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
            self.problem(node, path, f"tag {node.tag} is not allowed; write the plain value")
            return None
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.ScalarNode):
                value = self.scalar(node, path)
                if not isinstance(value, str) and node.value:
                    self.written[path] = node.value
                return value
            if isinstance(node, yaml.SequenceNode):
                return [self.item(v, f"{path}[{i}]") for i, v in enumerate(node.value)]
            return {key: self.item(value, join(path, key)) for key, value in self.pairs(node, path)}
        finally:
            self.open.discard(id(node))

    def bump(self) -> None:
        self.count += 1
        if self.count > _MAX_NODES:
            raise UserError(f"{self.shown}: more than {_MAX_NODES} values; aliases repeat themselves too often")

    def item(self, node: Any, path: str) -> Any:
        self.positions.setdefault(path, self.at(node))
        return self.build(node, path)

    def pairs(self, node: Any, path: str) -> Iterator[tuple[str, Any]]:
        """Keys and value nodes, merge keys (`<<`) spread below the mapping's own."""
        own: dict[str, tuple[Any, Any]] = {}
        merged: dict[str, Any] = {}
        for key, value in node.value:
            self.bump()
            if key.value == "<<" and not key.style:
                sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for source in sources:
                    self.merge(source, path, merged)
            elif not isinstance(key, yaml.ScalarNode):
                self.problem(key, path, "a key must be a word")
            elif key.value in own:
                first = own[key.value][0].start_mark.line + 1
                self.problem(key, join(path, key.value), f"given twice, first on line {first}")
            else:
                self.readable(key, join(path, key.value))
                own[key.value] = (key, value)
        for name, value in merged.items():
            if name not in own:
                yield name, value
        for name, (key, value) in own.items():
            self.positions[join(path, name)] = self.at(key)
            yield name, value

    def merge(self, source: Any, path: str, into: dict[str, Any]) -> None:
        if not isinstance(source, yaml.MappingNode):
            self.problem(source, path, "`<<` merges mappings only")
            return
        for name, value in self.pairs(source, path):
            self.bump()
            into.setdefault(name, value)

    def readable(self, node: Any, path: str) -> None:
        """Note characters that no path can hold, and those that the eye does not find in a plain word."""
        text: str = node.value
        if "\0" in text or not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            self.problem(node, path, f"{text[:40]!r} holds a character that no file's name or text can have; remove it")
        elif not node.style and path != "description" and (found := _UNSEEN.search(text)):
            where = f"column {node.start_mark.column + found.start() + 1} holds a {name_of(found[0])}"
            self.problem(node, path, f"{where}; remove it, or put the text in quotes if it is meant")

    def scalar(self, node: Any, path: str) -> Any:
        text: str = node.value
        self.readable(node, path)
        if node.style:
            return text
        if text in _NULLS:
            return None
        if text in _BOOLS:
            return _BOOLS[text]
        if _INT.fullmatch(text):
            if len(text) > _MAX_DIGITS:
                self.problem(node, path, f"{text[:24]}{'...' if len(text) > 24 else ''} is too large for a number")
                return 0
            return int(text)
        if _FLOAT.fullmatch(text):
            value = float(text)
            if value not in (float("inf"), float("-inf")):
                return value
            self.problem(node, path, f"{text} is too large for a number")
        if _NOT_FINITE.fullmatch(text):
            self.problem(node, path, f"{text} is not a number that a recipe may hold")
        return text


def merge_documents(below: Document, above: Document) -> Document:
    """`above` laid over `below`: mappings merge, everything else replaces, `null` removes a key."""
    positions = dict(below.positions)
    data = _merge(below.data, above.data, "", positions)
    for path, place in above.positions.items():
        positions[path] = place
    kept = {path: text for path, text in below.written.items() if path in positions and path not in above.positions}
    return Document(data, positions, {**kept, **above.written})


def _merge(below: Mapping[str, Any], above: Mapping[str, Any], path: str, positions: dict[str, str]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        here = join(path, key)
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = _merge(result[key], value, here, positions)
            continue
        _forget(result.get(key), here, positions)
        if value is None and key in below:
            del result[key]
        else:
            result[key] = value
    return result


def _forget(value: Any, path: str, positions: dict[str, str]) -> None:
    """Remove the positions of what a value holds."""
    inner: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        inner = [(join(path, key), item) for key, item in value.items()]
    elif isinstance(value, list):
        inner = [(f"{path}[{i}]", item) for i, item in enumerate(value)]
    for here, item in inner:
        positions.pop(here, None)
        _forget(item, here, positions)
