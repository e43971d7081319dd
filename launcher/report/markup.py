"""Pieces of the page. Everything that comes from data goes through `text`, so no name can be markup."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

from launcher.terminal import plain


def text(value: object) -> str:
    """A value as text in HTML, also inside an attribute's quotes; no character of it turns what stands beside it."""
    return html.escape(plain(str(value)), quote=True)


def paragraph(words: str, kind: str = "") -> str:
    """A paragraph, of a CSS class where one is named."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<p{attribute}>{text(words)}</p>" if words else ""


def bullets(lines: Iterable[str]) -> str:
    """A list; nothing where it is empty."""
    items = "".join(f"<li>{text(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[object]], words: Sequence[int] = (0,)) -> str:
    """A table that scrolls by itself where the page is narrow; columns but those in `words` hold numbers.

    The first cell of a row heads it. Nothing where there are no rows.
    """
    kinds = ["" if i in words else ' class="number"' for i in range(len(columns))]
    head = "".join(f'<th scope="col"{kind}>{text(c)}</th>' for c, kind in zip(columns, kinds, strict=True))
    body = "".join(f"<tr>{_cells(row, kinds)}</tr>" for row in rows)
    if not body:
        return ""
    # The caption stands outside, or it would scroll away with a wide table.
    inner = f'<table aria-label="{text(caption)}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<p class="caption">{text(caption)}</p><div class="scroll" tabindex="0">{inner}</div>'


def _cells(row: Sequence[object], kinds: Sequence[str]) -> str:
    first, *rest = row
    cells = "".join(f"<td{kind}>{text(cell)}</td>" for cell, kind in zip(rest, kinds[1:], strict=True))
    return f'<th scope="row">{text(first)}</th>{cells}'


def figures(found: Sequence[Mapping[str, str]]) -> str:
    """Figures side by side where there is room. Their SVG comes from `launcher.report.draw`, escaped there."""
    drawn = "".join(_figure(text(f["caption"]), f["svg"]) for f in found)
    return f'<div class="figures">{drawn}</div>' if drawn else ""


def _figure(caption: str, svg: str) -> str:
    return f'<figure role="img" aria-label="{caption}">{svg}<figcaption>{caption}</figcaption></figure>'


def folded(summary: str, inner: str) -> str:
    """Something long that opens by a click."""
    return f"<details><summary>{text(summary)}</summary>{inner}</details>" if inner else ""
