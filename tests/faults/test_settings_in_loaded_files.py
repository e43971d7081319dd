"""Settings inside a loaded file change no result in silence: a stage sets what it means, its receipt says the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_files import END, prepare, token_file, write_tokenizer

from launcher.errors import UserError
from launcher.models.tokenizer_files import end_of, read_tokenizer_files

TEXTS = ["one line of text " * 30, "another, of some more words " * 40]


def bake_in(folder: Path, **changes: Any) -> Path:
    """Change top-level keys of a tokenizer.json."""
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


TRUNCATION = {"direction": "Left", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 4000}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
    "pad_token": "<pad>",
}  # fmt: skip
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": END, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": END, "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {END: {"id": END, "ids": [1], "tokens": [END]}},
}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"truncation": TRUNCATION}, "tokenizer.json: truncation to 16 tokens"),
        ({"padding": PADDING}, "tokenizer.json: padding with <pad>"),
        ({"post_processor": TEMPLATE}, f"tokenizer.json: {END}, {END} added to every text"),
        ({"truncation": TRUNCATION, "padding": PADDING, "post_processor": TEMPLATE}, "tokenizer.json: truncation"),
    ],
)
def test_a_tokenizers_settings_change_no_token_and_are_told(tmp_path: Path, changes: dict, told: str) -> None:
    plain = prepare(tmp_path / "plain", write_tokenizer(tmp_path / "a"), TEXTS)
    odd = prepare(tmp_path / "odd", bake_in(write_tokenizer(tmp_path / "b"), **changes), TEXTS)
    assert token_file(odd) == token_file(plain)
    assert plain.record()["settings"]["set_aside"] == []
    assert odd.record()["settings"]["set_aside"][0].startswith(told)
    assert odd.record()["settings"]["truncation"] is None


def test_dropout_of_merges_is_none(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "a")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    plain = prepare(tmp_path / "plain", folder, TEXTS)
    odd = prepare(tmp_path / "odd", bake_in(folder, model={**model, "dropout": 0.9}), TEXTS)
    assert token_file(odd) == token_file(plain)
    assert odd.record()["settings"]["set_aside"] == ["tokenizer.json: dropout of merges, 0.9"]


def test_what_a_program_beside_it_would_do_is_told(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, add_bos_token=True, chat_template="{{ messages }}", model_max_length=4)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    assert read_tokenizer_files(folder).set_aside == (
        "tokenizer_config.json: add_bos_token",
        "tokenizer_config.json: chat_template",
        "additional_chat_templates/tool.jinja",
    )


def test_every_worker_cuts_a_text_alike(tmp_path: Path) -> None:
    """The tokens of prepare are those of evaluation, RL and CKA, whatever class of transformers the files name."""
    from launcher.workers.sampling import AS_TEXT
    from launcher.workers.tokenizer import build, load

    folder = bake_in(write_tokenizer(tmp_path, tokenizer_class="LlamaTokenizer"), truncation=TRUNCATION)
    ours, (theirs, _) = build(read_tokenizer_files(folder)), load(folder)
    for text in (*TEXTS, f"a {END} spelled", "  two\n\tlines, é", "<think>1</think>"):
        assert theirs(text, **AS_TEXT)["input_ids"] == ours.encode(text, add_special_tokens=False).ids
        assert theirs.decode(theirs(text, **AS_TEXT)["input_ids"]) == text


def test_tokens_beside_tokenizer_json_have_the_ids_that_are_named(tmp_path: Path) -> None:
    from launcher.workers.tokenizer import build

    folder = write_tokenizer(tmp_path)
    ids = read_tokenizer_files(folder).ids
    (folder / "added_tokens.json").write_text(json.dumps({"<more>": len(ids)}))
    assert build(read_tokenizer_files(folder)).token_to_id("<more>") == len(ids)
    (folder / "added_tokens.json").write_text(json.dumps({"<more>": len(ids) + 7}))
    with pytest.raises(UserError, match="lacks <more>"):
        build(read_tokenizer_files(folder))
    (folder / "added_tokens.json").write_text(json.dumps({END: 3}))
    with pytest.raises(UserError, match=f"{END} has id 1 in tokenizer.json, and 3 in"):
        read_tokenizer_files(folder)


@pytest.mark.parametrize("as_object", [False, True])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_the_end_token_is_found_where_older_tools_put_it(tmp_path: Path, as_object: bool, bom: bytes) -> None:
    folder = write_tokenizer(tmp_path, eos_token=None)
    token = {"content": END, "special": True, "lstrip": False} if as_object else END
    (folder / "special_tokens_map.json").write_bytes(bom + json.dumps({"eos_token": token}).encode())
    assert end_of(read_tokenizer_files(folder)) == (END, 1)
    (folder / "special_tokens_map.json").unlink()
    with pytest.raises(UserError, match='names no eos_token.*add "eos_token"'):
        end_of(read_tokenizer_files(folder))
