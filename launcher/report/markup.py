"""Pieces of the page. Everything that comes from data goes through `text`, so no name can be markup."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence


def text(value: object) -> str:
    """A value as text in HTML, also inside an attribute's quotes."""
    return html.escape(str(value), quote=True)


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
    inner = f"<caption>{text(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll" role="region" aria-label="{text(caption)}" tabindex="0"><table>{inner}</table></div>'


def _cells(row: Sequence[object], kinds: Sequence[str]) -> str:
    first, *rest = row
    cells = "".join(f"<td{kind}>{text(cell)}</td>" for cell, kind in zip(rest, kinds[1:], strict=True))
    return f'<th scope="row">{text(first)}</th>{cells}'


def figures(found: Sequence[Mapping[str, str]], wide: bool = False) -> str:
    """Figures side by side, one below the other where the page is narrow. Their SVG comes from `launcher.report.draw`."""
    drawn = "".join(
        f'<figure role="img" aria-label="{text(f["caption"])}">{f["svg"]}<figcaption>{text(f["caption"])}</figcaption></figure>'
        for f in found
    )
    return f'<div class="figures{" wide" if wide else ""}">{drawn}</div>' if drawn else ""
