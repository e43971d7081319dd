"""The one way to the terminal: what others wrote cannot steer it, and no character that it lacks is an error.

Standard output and error pass through `plain_output`; tables and live displays through `console`.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any

#: Control and format characters, C1 and DEL too: escape sequences, what turns the direction of text, what is unseen.
#: Bytes of a name that is not UTF-8 stand as surrogates.
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
_SUBSTITUTES = {
    "…": "...",
    "×": "x",
    "·": ".",
    "•": "*",
    "±": "+-",
    "→": "->",
    "←": "<-",
    "≤": "<=",
    "≥": ">=",
    "≈": "~",
    "–": "-",
    "—": "-",
    "−": "-",
    "‘": "'",
    "’": "'",
    "“": '"',
    "”": '"',
    "\u00a0": " ",
    "µ": "u",
    "░": ":",
    "█": "#",
    "▏": "|",
    "▶": ">",
    "°": " deg",
    **dict.fromkeys("─━═╌┄╴╶╸╺╼╾", "-"),
    **dict.fromkeys("│┃║╎┆╵╷╹╻╽╿", "|"),
}
_ENCODING_ERRORS = "launcher.terminal"


def plain(text: str) -> str:
    """The text without control over a terminal: such characters are shown as escapes, returns as new lines."""
    return _STEERING.sub(_escaped, text.replace("\r\n", "\n").replace("\r", "\n"))


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def name_of(character: str) -> str:
    """A character that is not seen, in words: `ZERO WIDTH SPACE (U+200B)`."""
    return f"{unicodedata.name(character, 'control character')} (U+{ord(character):04X})"


@contextlib.contextmanager
def plain_output() -> Iterator[None]:
    """Within the block, whatever is printed is plain and fits the terminal's encoding."""
    with contextlib.ExitStack() as stack:
        # Either is None where the shell has closed it.
        out, err = (s or stack.enter_context(open(os.devnull, "w", encoding="utf-8")) for s in (sys.stdout, sys.stderr))
        stack.enter_context(contextlib.redirect_stdout(_PlainStream(out)))
        stack.enter_context(contextlib.redirect_stderr(_PlainStream(err)))
        yield


@contextlib.contextmanager
def raw_output() -> Iterator[None]:
    """Within the block, standard output is as it was given: for those who ask for it."""
    with contextlib.redirect_stdout(raw(sys.stdout)):
        yield


def let_output_go() -> None:
    """For a reader of our output that has gone (`| head`): no failure, and nothing for the interpreter to tell."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def raw(stream: Any) -> Any:
    """The stream behind a plain one, for what we draw on a terminal ourselves."""
    return stream.stream if isinstance(stream, _PlainStream) else stream


def console() -> Any:
    """A console of rich's: texts are plain, and no text is markup."""
    from rich.console import Console
    from rich.text import Text

    class PlainConsole(Console):
        def render(self, renderable: Any, options: Any = None) -> Any:
            """Every text, in a cell of a table too, comes by here before it is folded."""
            if isinstance(renderable, str):
                renderable = plain(renderable)
            elif isinstance(renderable, Text) and plain(renderable.plain) != renderable.plain:
                style, shape = renderable.style, (renderable.justify, renderable.overflow, renderable.no_wrap)
                renderable = Text(plain(renderable.plain), style)
                renderable.justify, renderable.overflow, renderable.no_wrap = shape
            return super().render(renderable, options)

    return PlainConsole(file=raw(sys.stdout), markup=False, emoji=False)


class _PlainStream:
    """A text stream that writes plain text; all else is the stream's own."""

    def __init__(self, stream: Any):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_ENCODING_ERRORS)

    def write(self, text: str) -> int:
        self.stream.write(plain(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _substituted(error: UnicodeError) -> tuple[str, int]:
    """For what an encoding lacks: what looks like it, or its escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    piece = error.object[error.start : error.end]
    return "".join(_SUBSTITUTES.get(c) or _without(c) for c in piece), error.end


def _without(character: str) -> str:
    if "\u2500" <= character <= "\u257f":  # what remains of boxes: corners and crossings
        return "+"
    return character.encode("ascii", "backslashreplace").decode("ascii")


codecs.register_error(_ENCODING_ERRORS, _substituted)
