"""Tokenizer and config.json that ride along with a checkpoint: what is written, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import train_stages as ts

from launcher.errors import UserError
from launcher.models.families import shape_of
from launcher.workers.megatron import hf_files

CONFIG = ts.model("llama-tiny")["config"]


def test_what_is_written(tmp_path: Path) -> None:
    ts.write_tokenizer(tmp_path / "tokenizer")
    half = tmp_path / "hf" / "tokenizer.json"  # of an attempt that was killed
    half.parent.mkdir()
    half.write_text('{"mod')
    hf_files.write(tmp_path / "hf", None, tmp_path / "tokenizer", {**CONFIG, "torch_dtype": "float16"}, "bf16")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config == {**CONFIG, "dtype": "bfloat16", "eos_token_id": 1, "pad_token_id": 0}
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text()) == {
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    assert half.read_bytes() == (tmp_path / "tokenizer" / "tokenizer.json").read_bytes()


def test_the_first_checkpoints_own_files_are_kept(tmp_path: Path) -> None:
    hf_files.write(tmp_path / "first", None, None, {**CONFIG, "eos_token_id": 7}, "fp32")
    (tmp_path / "first" / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    (tmp_path / "first" / "chat_template.jinja").write_text("hello")
    ts.write_tokenizer(tmp_path / "tokenizer")
    hf_files.write(tmp_path / "next", tmp_path / "first", tmp_path / "tokenizer", CONFIG, "fp32")
    assert json.loads((tmp_path / "next" / "config.json").read_text())["eos_token_id"] == 7
    assert (tmp_path / "next" / "generation_config.json").read_text() == '{"eos_token_id": [7, 8]}'
    assert (tmp_path / "next" / "chat_template.jinja").read_text() == "hello"
    assert (tmp_path / "next" / "tokenizer.json").exists()


def test_vocabularies_of_both_forms_and_added_tokens(tmp_path: Path) -> None:
    added = [{"id": 2, "content": "<new>"}]
    for vocab in ({"a": 0, "b": 1}, [["a", -1.0], ["b", -2.0]]):
        data = {"model": {"vocab": vocab}, "added_tokens": added}
        (tmp_path / "tokenizer.json").write_text(json.dumps(data))
        assert hf_files.vocabulary(tmp_path) == {"a": 0, "b": 1, "<new>": 2}


def test_tokenizers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    ts.write_tokenizer(tmp_path / "a", vocab=512)
    ts.write_tokenizer(tmp_path / "b", vocab=600)
    hf_files.check_tokenizers({"a": tmp_path / "a", "none": tmp_path / "absent"}, 512)
    with pytest.raises(UserError) as caught:
        hf_files.check_tokenizers({"a": tmp_path / "a", "b": tmp_path / "b"}, 512)
    differs, beyond = caught.value.problems
    assert "the tokenizer of b is not that of a" in differs
    assert "ids up to 599, the model's vocab_size is 512" in beyond


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": {}}', '{"model": {"vocab": 3}}', "\x00\xff"])
def test_a_damaged_tokenizer_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"tokenizer\.json:"):
        hf_files.check_tokenizers({"a": tmp_path}, 512)


def test_a_checkpoint_of_another_model_is_refused_with_every_difference(tmp_path: Path) -> None:
    wanted, path = shape_of(CONFIG), tmp_path / "config.json"
    with pytest.raises(UserError, match=r"config\.json: not there"):
        hf_files.check_start(tmp_path, wanted)
    path.write_text(json.dumps(CONFIG))
    hf_files.check_start(tmp_path, wanted)
    path.write_text(json.dumps({**CONFIG, "hidden_size": 192, "num_hidden_layers": 2}))
    with pytest.raises(UserError) as caught:
        hf_files.check_start(tmp_path, wanted)
    assert [p.partition("config.json: ")[2] for p in caught.value.problems] == [
        "num_layers is 2, the stage's model has 3",
        "hidden_size is 192, the stage's model has 96",
    ]
    path.write_text(json.dumps({**CONFIG, "model_type": "gpt2"}))
    with pytest.raises(UserError, match=r"config\.json: model type gpt2 is not covered"):
        hf_files.check_start(tmp_path, wanted)
    path.write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not JSON"):
        hf_files.check_start(tmp_path, wanted)
    path.write_text("[]")
    with pytest.raises(UserError, match=r"config\.json: not a JSON object"):
        hf_files.check_start(tmp_path, wanted)
