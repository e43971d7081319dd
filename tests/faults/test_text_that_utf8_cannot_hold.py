"""Text that is not UTF-8, that UTF-8 cannot hold, or that no JSON is, is told by file and line, and is no crash."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_files import write_tokenizer

from launcher import cli
from launcher.configs import SourceConfig
from launcher.errors import UserError
from launcher.inputs import read_checkpoint
from launcher.models.tokenizer_files import read_tokenizer_files
from launcher.user_json import parse, read_object
from launcher.workers.cka import read_texts
from launcher.workers.problems import read_problems
from launcher.workers.text import read_documents

WRONG = {
    "half a character": rb'{"text": "half \ud83d of it"}',
    "the other half": rb'{"text": "half \uDE00 of it"}',
    "half a key": rb'{"text": "x", "\ud83d": 1}',
    "deep": b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "digits": b'{"text": "x", "n": ' + b"9" * 5000 + b"}",
    "NaN": b'{"text": "x", "n": NaN}',
    "infinity": b'{"text": "x", "n": -Infinity}',
    "Latin-1": '{"text": "naïve"}'.encode("latin-1"),
    "raw surrogate": b'{"text": "\xed\xa0\xbd"}',
    "cut": b'{"text": "x"',
}


def corpus(path: Path) -> None:
    read_documents(SourceConfig(kind="files", path=str(path)))


@pytest.mark.parametrize("read", [corpus, read_problems], ids=["corpus", "problem set"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_line_is_named(tmp_path: Path, wrong: str, read: Callable[[Path], object]) -> None:
    path = tmp_path / "a.jsonl"
    good = {"id": "1", "task": "gcd", "prompt": "p", "answer": "a", "trace": "t", "entry": {}, "text": "fine"}
    path.write_bytes(json.dumps(good).encode() + b"\n\n" + WRONG[wrong] + b"\n")
    with pytest.raises(UserError) as caught:
        read(path)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{path}:3: ")
    assert len(problem) < 400


def test_whole_characters_are_no_halves() -> None:
    assert parse(r'"\ud83d\ude00 \\ud83d \u00e9"', "x") == "😀 \\ud83d é"


@pytest.mark.parametrize("wrong", ["half a character", "deep", "digits", "Latin-1", "cut"])
def test_a_wrong_file_is_named(tmp_path: Path, wrong: str) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"\n" + WRONG[wrong])
        with pytest.raises(UserError, match=str(tmp_path / name)):
            read_object(tmp_path / name)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        read_tokenizer_files(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"config\.json"):
        read_checkpoint(str(tmp_path), tmp_path)


def test_configs_may_say_infinity_and_begin_with_a_mark(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"time_step_limit": [0.0, Infinity]}')
    assert read_object(tmp_path / "config.json") == {"time_step_limit": [0.0, float("inf")]}


def test_texts_of_cka_are_told_by_line(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"one\ntwo\nthr\xe9e\nfour\n")
    with pytest.raises(UserError, match=r"t\.txt:3: not text"):
        read_texts(tmp_path / "t.txt")


def test_a_run_ends_as_the_users_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_tokenizer(tmp_path / "mine")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + WRONG["half a character"] + b"\n")
    (tmp_path / "r.yaml").write_text(
        "stages: {prepare: {kind: prepare, tokenizer: {path: mine}, sources: {t: {kind: files, path: text}}}}\n"
    )
    assert cli.main(["run", str(tmp_path / "r.yaml"), "--cluster", "local", "--root", str(tmp_path / "root")]) == 2
    out = capfd.readouterr()
    assert "a.jsonl:2: holds half a character, \\ud83d" in out.out + out.err
    assert "Traceback" not in out.out + out.err
