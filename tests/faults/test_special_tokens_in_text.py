"""Special tokens that a text spells are text, unless the recipe allows them, and the receipt counts them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_files import END, PAD, prepare, write_tokenizer

from launcher.cli import main
from launcher.errors import UserError
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


WORDS = {"<unk>": 0, "</s>": 1, "a": 2, "b": 3, "end": 4, "<": 5, "/s>": 6}
PIECES = [("<unk>", 0.0), ("</s>", 0.0), *((piece, -3.0) for piece in ("▁a", "▁b", "▁", "<", "/", "s", ">"))]


def of_words(folder: Path, end: str, added: bool, pieces: bool = False) -> Path:
    """A tokenizer whose model has whole words or pieces, the end token among them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.Unigram(PIECES, unk_id=0) if pieces else models.WordLevel(WORDS, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace() if pieces else pre_tokenizers.WhitespaceSplit()
    if added:
        made.add_special_tokens([end])
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    return folder


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("pieces", [True, False])
def test_a_model_that_makes_the_end_token_of_plain_text_does_not(tmp_path: Path, pieces: bool, added: bool) -> None:
    stage = prepare(tmp_path, of_words(tmp_path / "t", "</s>", added, pieces), ["a </s> b", "a</s>b"])
    for document in read_indexed(stage.file("tokens", "text")):
        assert document.tolist().count(1) == 1 and document[-1] == 1
    assert stage.record()["sources"][0]["special_tokens"] == {"as_text": {"</s>": 2}, "as_tokens": {}}


@pytest.mark.parametrize("added", [True, False])
def test_an_end_token_that_is_a_plain_word_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], added: bool
) -> None:
    of_words(tmp_path / "t", "end", added)
    (tmp_path / "text.txt").write_text("a end b")
    sources = "sources: {text: {kind: files, path: text.txt}}"
    (tmp_path / "r.yaml").write_text(
        f"stages:\n  prepare:\n    kind: prepare\n    tokenizer: {{path: t}}\n    {sources}\n"
    )
    assert main(["check", str(tmp_path / "r.yaml"), "--cluster", "local"]) == 2
    assert "eos_token end is a plain word" in capsys.readouterr().err
    with pytest.raises(UserError, match="eos_token end is a plain word"):
        prepare(tmp_path / "p", tmp_path / "t", ["a end b"])


def test_text_that_a_tokenizer_cannot_cut_is_the_users_mistake(tmp_path: Path) -> None:
    folder = of_words(tmp_path / "t", "</s>", True)
    text = (folder / "tokenizer.json").read_text().replace('"unk_token": "<unk>"', '"unk_token": "<none>"')
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="sources.text: the tokenizer cannot cut its text"):
        prepare(tmp_path / "p", folder, ["a word b"])
