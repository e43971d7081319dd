"""Messages on recipes that hide their cause: unseen characters, places that are none, lists without end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.cli import main

RECIPE = """stages:
  prepare:
    kind:{blank}prepare{end}
    tokenizer: {{path: tok}}
    sources: {{text: {{kind: files, path: text}}}}
"""


def said(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, *words: str) -> str:
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    assert main(["check", str(path), *words]) == 2
    return capsys.readouterr().err.replace(f"{tmp_path}/", "")


@pytest.mark.parametrize(
    ("blank", "end", "name", "column"),
    [
        ("\u00a0", "", "NO-BREAK SPACE (U+00A0)", 10),
        ("\u3000", "", "IDEOGRAPHIC SPACE (U+3000)", 10),
        ("\u2009 ", "", "THIN SPACE (U+2009)", 10),
        (" \u00a0", "", "NO-BREAK SPACE (U+00A0)", 11),
        (" ", "\u200b", "ZERO WIDTH SPACE (U+200B)", 18),
        (" \ufeff", "", "ZERO WIDTH NO-BREAK SPACE (U+FEFF)", 11),
        (" \u202e", "", "RIGHT-TO-LEFT OVERRIDE (U+202E)", 11),
        (" ", "\u00ad", "SOFT HYPHEN (U+00AD)", 18),
        (" “", ": x”", "LEFT DOUBLE QUOTATION MARK (U+201C)", 11),
        (" ", "\ufe0f", "VARIATION SELECTOR-16 (U+FE0F)", 18),
        (" ", "\U000e0041", "TAG LATIN CAPITAL LETTER A (U+E0041)", 18),
        ("\uff1a", "", "FULLWIDTH COLON (U+FF1A)", 10),
        (" ", "\x07", "control character (U+0007)", 18),
    ],
)
def test_a_character_that_is_not_seen_is_named_with_its_line(
    blank: str, end: str, name: str, column: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = said(tmp_path, capsys, RECIPE.format(blank=blank, end=end))
    assert "r.yaml:3: " in message and name in message and f"column {column}" in message


@pytest.mark.parametrize("key", ["sta\u200bges", "\ufeffstages", "stages\u00a0"])
def test_a_key_is_looked_at_too(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = said(tmp_path, capsys, f"seed: 1\n{key}: {{}}\n")
    assert "r.yaml:2: " in message and "(U+" in message


def test_text_that_means_such_characters_may_have_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = 'base: demo\ndescription: mot\u00a0! deux # \u200b a comment\nname: "a\u00a0b"\n'
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    assert main(["check", str(tmp_path / "r.yaml")]) == 0


def test_of_many_problems_twenty_are_shown_and_all_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "base: demo\n" + "".join(f"key{i}: 1\n" for i in range(57))
    shown = said(tmp_path, capsys, text).splitlines()
    assert len(shown) == 21 and shown[-1] == "prism-launch: 57 problems, the first 20 shown"
    assert main(["check", str(tmp_path / "r.yaml"), "--json"]) == 2
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 57


def test_a_key_of_a_matrix_is_blamed_where_it_stands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "base: demo\nmatrix:\n  nothing.there: [1]\n"
    message = said(tmp_path, capsys, text)
    assert message.startswith("prism-launch: r.yaml:2: matrix: nothing.there=1: ") and "--set" not in message
    text = "base: demo\nmatrix:\n  base.lr: [fast]\n"
    assert "r.yaml:2: matrix: base.lr=fast" in said(tmp_path, capsys, text)
