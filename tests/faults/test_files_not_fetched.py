"""A file that only stands for one that was not fetched is named as that, wherever it is read, and before a job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_files import write_tokenizer

from launcher.cli import main as prism
from launcher.convert.__main__ import run
from launcher.errors import UserError
from launcher.workers.problems import read_problems

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 1234567\n"
ANNEX = b"/annex/objects/SHA256E-s1234--4d4d.jsonl\n"
RECIPE = """
stages:
  prepare:
    kind: prepare
    tokenizer: {path: tok}
    sources: {text: {kind: files, path: text}}
"""


@pytest.mark.parametrize("content", [LFS, ANNEX])
@pytest.mark.parametrize("name", ["text/a.jsonl", "text/b.txt", "text/c.json.gz", "tok/tokenizer.json"])
def test_check_names_text_and_tokenizers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes
) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    write_tokenizer(tmp_path / "tok")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "whole.txt").write_text("some words")
    (tmp_path / name).write_bytes(content)
    assert prism(["check", str(tmp_path / "r.yaml"), "--cluster", "local"]) == 2
    said = capsys.readouterr().err
    program = "git lfs pull" if content is LFS else "git annex get"
    assert f"{tmp_path / name}: a pointer of " in said and program in said, said


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model.safetensors.index.json"])
def test_a_checkpoint_names_it(tmp_path: Path, hf_checkpoint: Callable[..., Path], name: str) -> None:
    source = hf_checkpoint("llama")
    folder = tmp_path / "hf"
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / name).write_bytes(LFS)
    with pytest.raises(UserError, match=f"{name}: a pointer of Git LFS"):
        run(folder, tmp_path / "made", "megatron")


def test_an_archive_and_problems_name_it(tmp_path: Path) -> None:
    for name in ("a.nemo", "set.jsonl"):
        (tmp_path / name).write_bytes(LFS)
    with pytest.raises(UserError, match="a.nemo: a pointer of Git LFS"):
        run(tmp_path / "a.nemo", tmp_path / "made", "hf")
    with pytest.raises(UserError, match="set.jsonl: a pointer of Git LFS"):
        read_problems(tmp_path / "set.jsonl")
