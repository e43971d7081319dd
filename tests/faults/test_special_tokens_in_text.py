"""Special tokens that a text spells are text, unless the recipe allows them, and the receipt counts them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_files import END, PAD, prepare, write_tokenizer

from launcher.workers.tokens import read_indexed

TEXT = f"write {END} to end, {PAD} to fill, {END} again, <think>so</think>"


def add_think(folder: Path, special: bool) -> Path:
    from tokenizers import AddedToken, Tokenizer

    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.add_tokens([AddedToken(t, special=special, normalized=False) for t in ("<think>", "</think>")])
    made.save(str(folder / "tokenizer.json"))
    return folder


def ids_and_counts(root: Path, tokenizer: Path, **settings: object) -> tuple[list[int], dict]:
    stage = prepare(root, tokenizer, [TEXT], settings)
    (document,) = read_indexed(stage.file("tokens", "text"))
    return document.tolist(), stage.record()["sources"][0]["special_tokens"]


def test_end_and_padding_are_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids, counts = ids_and_counts(tmp_path, write_tokenizer(tmp_path / "t"))
    assert (ids.count(1), ids.count(0), ids[-1]) == (1, 0, 1)
    assert counts == {"as_text": {END: 2, PAD: 1}, "as_tokens": {}}
    assert "special tokens that it spells are text: <eos> ×2, <pad> ×1" in capsys.readouterr().out


@pytest.mark.parametrize("special", [True, False])
def test_think_is_a_token_whatever_the_tokenizer_calls_it(tmp_path: Path, special: bool) -> None:
    tokenizer = add_think(write_tokenizer(tmp_path / "t"), special)
    first = len(json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"])
    ids, counts = ids_and_counts(tmp_path, tokenizer)
    assert (ids.count(first), ids.count(first + 1), ids.count(1)) == (1, 1, 1)
    assert counts["as_tokens"] == {"<think>": 1, "</think>": 1}


def test_the_recipe_decides(tmp_path: Path) -> None:
    tokenizer = add_think(write_tokenizer(tmp_path / "t"), special=True)
    ids, counts = ids_and_counts(tmp_path / "a", tokenizer, allowed_special=[END])
    assert ids.count(1) == 3
    assert counts == {"as_text": {PAD: 1, "<think>": 1, "</think>": 1}, "as_tokens": {END: 2}}


def test_an_end_token_that_the_tokenizer_does_not_call_special_is_one(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "t")
    data = json.loads((tokenizer / "tokenizer.json").read_text())
    for token in data["added_tokens"]:
        token["special"] = False
    (tokenizer / "tokenizer.json").write_text(json.dumps(data))
    ids, counts = ids_and_counts(tmp_path / "a", tokenizer)
    assert ids.count(1) == 1 and counts["as_text"] == {END: 2, PAD: 1}
