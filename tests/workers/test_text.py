"""Sources of training text."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest

from launcher.configs import FilesSource, GeneratedSet, ProblemsSource, StdlibSource
from launcher.errors import UserError
from launcher.workers.problems import draw_problems, problem_text
from launcher.workers.text import read_documents, read_source


def files(path: Path, **settings: object) -> FilesSource:
    return FilesSource(kind="files", path=str(path), **settings)  # type: ignore[arg-type]


def test_disjoint_shares_have_nothing_in_common_and_lose_nothing(tmp_path: Path) -> None:
    documents = [f"document {i % 90}" for i in range(100)]  # ten of them twice
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    bounds = [0.0, 0.3, 0.35, 0.9, 1.0]
    parts = [set(read_source("s", files(tmp_path, share=s), {}, 7).documents) for s in itertools.pairwise(bounds)]
    assert sum(map(len, parts)) == 90
    assert set().union(*parts) == set(documents)
    source = read_source("s", files(tmp_path), {}, 7)
    assert source.origin["repeated"] == 10
    assert len(source.documents) == 90
    assert source.documents == read_source("other", files(tmp_path), {}, 7).documents
    assert source.documents != read_source("s", files(tmp_path), {}, 8).documents


def test_shares_of_problems_are_disjoint_in_problems() -> None:
    problems = {"p": draw_problems("p", GeneratedSet(task="gcd", count=80, settings={"max_value": 300}), 0)}
    halves = [
        read_source(name, ProblemsSource(kind="problems", problems="p", share=share, terse_share=terse), problems, 3)
        for name, share, terse in (("one", (0.0, 0.5), 0.9), ("two", (0.5, 1.0), 0.1))
    ]
    prompts = [{d.partition("<think>")[0] for d in half.documents} for half in halves]
    assert [len(p) for p in prompts] == [40, 40]
    assert not prompts[0] & prompts[1]


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_terse_share(share: float) -> None:
    problems = draw_problems("p", GeneratedSet(task="gcd", count=200, settings={"max_value": 999}), 0)
    config = ProblemsSource(kind="problems", problems="p", terse_share=share)
    documents = read_source("s", config, {"p": problems}, 0).documents
    written = {problem_text(p, t): t for p in problems for t in (True, False)}
    terse = sum(written[d] for d in documents)
    assert len(documents) == 200
    assert terse == 200 * share if share in (0, 1) else 30 <= terse <= 70


def test_max_bytes_stops_after_the_document_that_reaches_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"é{i:02}"}) + "\n" for i in range(50)))
    assert len(read_source("s", files(tmp_path, max_bytes=12), {}, 0).documents) == 3
    assert len(read_source("s", files(tmp_path, max_bytes=13), {}, 0).documents) == 4
    assert len(read_source("s", files(tmp_path, max_bytes=10**6), {}, 0).documents) == 50
    with pytest.raises(UserError, match=r"sources\.s: no text is left"):
        read_source("s", files(tmp_path, share=(0.0, 0.001)), {}, 0)


def test_files_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.py").write_text("x = 1\n")
    (tmp_path / "b.md").write_text("# words\n")
    (tmp_path / "c.txt").write_text("some\ntext\n")
    (tmp_path / "d.jsonl").write_text('{"text": "one\u2028line"}\n\n{"text": "two", "id": 3}\n')
    (tmp_path / "e.bin").write_bytes(b"\0\1")
    assert set(read_documents(files(tmp_path)).documents) == {
        "x = 1\n", "# words\n", "some\ntext\n", "one\u2028line", "two"
    }  # fmt: skip
    assert read_documents(files(tmp_path / "b.md")).documents == ("# words\n",)


def test_every_bad_file_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"abc\xff\xfe")
    (tmp_path / "nulls.py").write_bytes(b"x\0y")
    (tmp_path / "rows.jsonl").write_text('{"text": "good"}\n{"text": \n[1]\n{"txt": "a"}\n{"text": 4}\n{"text": " "}\n')
    with pytest.raises(UserError) as caught:
        read_documents(files(tmp_path))
    found = [p.removeprefix(f"{tmp_path}/") for p in caught.value.problems]
    assert [p.partition(": ")[0] for p in found] == [
        "binary.txt:1", "empty.txt", "nulls.py", "rows.jsonl:2", "rows.jsonl:3", "rows.jsonl:4", "rows.jsonl:5",
        "rows.jsonl:6",
    ]  # fmt: skip
    assert "byte 3 is not UTF-8" in found[0]
    assert "its text is blank" in found[-1]


def test_many_bad_lines_are_counted(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": ""}\n' * 3000)
    with pytest.raises(UserError) as caught:
        read_documents(files(tmp_path / "rows.jsonl"))
    assert len(caught.value.problems) == 21
    assert caught.value.problems[-1] == f"{tmp_path / 'rows.jsonl'}: 2,980 more lines are wrong"


def test_absent_and_useless_paths(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"\0")
    with pytest.raises(UserError, match="no such file or folder"):
        read_documents(files(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"holds no \.json, \.jsonl, \.md, \.ndjson, \.py, \.txt file"):
        read_documents(files(tmp_path))
    with pytest.raises(UserError, match=r"weights\.bin: is no "):
        read_documents(files(tmp_path / "weights.bin"))


def test_standard_library() -> None:
    import argparse
    import inspect

    source = read_documents(StdlibSource(kind="python-stdlib"))
    assert inspect.getsource(argparse) in source.documents
    assert source.origin["interpreter"].split() == ["CPython", ".".join(map(str, sys.version_info[:3]))]
    assert len(source.origin["sha256"]) == 64
    assert len(source.documents) > 300
    # Nothing that pip installed, no tests.
    assert not any("import reasoning_gym" in d for d in source.documents)
