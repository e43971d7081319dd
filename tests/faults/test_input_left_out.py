"""No input is left out without a word: it is read, or named by `check`, the log and the receipt, or refused."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
from tiny_files import prepare, write_tokenizer

from launcher import cli
from launcher.configs import SourceConfig
from launcher.corpus import look, walk
from launcher.errors import UserError
from launcher.store import tree_fingerprint
from launcher.workers.text import read_documents


def row(text: str) -> str:
    return json.dumps({"text": text}) + "\n"


def documents(path: Path) -> set[str]:
    return set(read_documents(SourceConfig(kind="files", path=str(path))).documents)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder with text in every form that is read, behind links too."""
    folder = tmp_path / "text"
    for name in ("text/deep", "elsewhere/inner"):
        (tmp_path / name).mkdir(parents=True)
    (folder / "a.jsonl").write_text(row("plain"))
    (folder / "B.JSONL").write_text(row("capitals"))
    (folder / "c.ndjson").write_bytes(b"\xef\xbb\xbf" + row("another name, and a mark").encode())
    (folder / "deep" / "d.jsonl.gz").write_bytes(gzip.compress(row("packed").encode()))
    (folder / "e.Txt.GZ").write_bytes(gzip.compress(b"packed text"))
    (folder / "f.json").write_text(json.dumps([{"text": "first of two"}, {"text": "second of two"}], indent=1))
    (folder / "g.json").write_text(json.dumps({"text": "one object"}, indent=1))
    (folder / "h.json").write_text(row("line one") + row("line two"))
    (tmp_path / "elsewhere" / "inner" / "i.jsonl").write_text(row("behind a linked folder"))
    (tmp_path / "j.txt").write_text("behind a linked file")
    (folder / "linked").symlink_to("../elsewhere")
    (folder / "linked.txt").symlink_to(tmp_path / "j.txt")
    return folder


ALL = {
    "plain", "capitals", "another name, and a mark", "packed", "packed text", "first of two", "second of two",
    "one object", "line one", "line two", "behind a linked folder", "behind a linked file",
}  # fmt: skip


def test_every_form_is_read_behind_links_too(corpus: Path) -> None:
    assert documents(corpus) == ALL


def test_links_in_circles_end_and_add_nothing(corpus: Path) -> None:
    (corpus / "deep" / "up").symlink_to("..")
    (corpus / "outer").symlink_to(corpus.parent)
    (corpus.parent / "elsewhere" / "back").symlink_to(corpus)
    (corpus / "again").symlink_to("deep")
    for name in "xyz":
        (corpus / name).mkdir()
        for other in "xyz":
            (corpus / name / other).symlink_to(f"../{other}")
    assert documents(corpus) == ALL
    files = walk(corpus).files
    assert len({os.path.realpath(file) for file in files}) == len(files) == 10
    assert [why for path, why in look(corpus).passed.items() if path.name == "outer"]


@pytest.mark.parametrize("name", ["a.parquet", "A.PARQUET", "a.jsonl.zst", "a.tar", "a.csv", "a.arrow", "a.gz"])
def test_text_in_a_form_that_is_not_read_is_refused_with_the_mend(corpus: Path, name: str) -> None:
    (corpus / name).write_bytes(b"of some kind")
    (problem,) = look(corpus).problems
    assert problem.startswith(f"{corpus / name}: ") and ("; " in problem)
    with pytest.raises(UserError, match=name):
        documents(corpus)


def test_a_link_to_nothing_and_a_cut_file_are_refused(corpus: Path) -> None:
    (corpus / "gone.jsonl").symlink_to("nowhere.jsonl")
    (corpus / "cut.jsonl.gz").write_bytes(gzip.compress(row("packed" * 99).encode())[:-9])
    with pytest.raises(UserError) as caught:
        documents(corpus)
    assert [p.partition(": ")[0] for p in caught.value.problems] == [
        str(corpus / "gone.jsonl"), str(corpus / "cut.jsonl.gz")
    ]  # fmt: skip


def test_what_is_not_read_is_counted_and_named(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (corpus / "README").write_text("12345")
    (corpus / "deep" / "picture.png").write_bytes(b"123")
    os.mkfifo(corpus / "pipe")
    stage = prepare(tmp_path / "stage", write_tokenizer(tmp_path / "mine"), corpus)
    assert "3 files are not read: README, deep/picture.png, pipe" in capsys.readouterr().out
    origin = stage.record()["sources"][0]["origin"]
    assert (origin["files"], origin["documents"]) == (10, 12)
    assert origin["bytes"] == sum(file.stat().st_size for file in look(corpus).read)
    assert (origin["not_read"]["files"], origin["not_read"]["bytes"]) == (3, 8)
    assert list(origin["not_read"]["names"]) == ["README", "deep/picture.png", "pipe"]


def test_check_names_it_before_anything_runs(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tokenizer(tmp_path / "mine")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "stages: {prepare: {kind: prepare, tokenizer: {path: mine}, sources: {t: {kind: files, path: text}}}}\n"
    )
    (corpus / "notes.bin").write_bytes(b"x")
    assert cli.main(["check", str(recipe)]) == 0
    assert f"stages.prepare.sources.t: {corpus}: 1 files are not read: notes.bin" in capsys.readouterr().out
    assert cli.main(["check", str(recipe), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["notes"]) == 1
    (corpus / "shard.parquet").write_bytes(b"x")
    assert cli.main(["check", str(recipe)]) == 2
    assert "shard.parquet: .parquet is not read; write it as .jsonl" in capsys.readouterr().err
    for path in sorted(corpus.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    assert cli.main(["check", str(recipe)]) == 2
    assert f"r.yaml:1: stages.prepare.sources.t.path: {corpus}: holds no" in capsys.readouterr().err


def test_the_fingerprint_sees_the_files_that_are_read(corpus: Path) -> None:
    before = tree_fingerprint(corpus)
    assert tree_fingerprint(corpus) == before
    for file in look(corpus).read:
        os.utime(file, ns=(1, 1))
        assert tree_fingerprint(corpus) != before, file
        before = tree_fingerprint(corpus)


def test_the_fingerprint_of_a_folder_without_links_is_what_it_was(tmp_path: Path) -> None:
    for name in ("b/x.txt", "b.txt", "a/y/z.jsonl", "B/é", ".hidden/w", "b-c/v"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, ns=(5 * 10**9, 7 * 10**9))
    assert tree_fingerprint(tmp_path) == "f60a9f811cd64281c589"
    assert [str(p.relative_to(tmp_path)) for p in walk(tmp_path).files] == [
        ".hidden/w", "B/é", "a/y/z.jsonl", "b/x.txt", "b-c/v", "b.txt"
    ]  # fmt: skip
