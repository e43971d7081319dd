"""YAML read with positions; the traps of YAML 1.1 closed."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import UserError
from launcher.recipe.document import merge_documents, parse_document, read_document


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4:00:00", "4:00:00"),
        ("04:00:00", "04:00:00"),
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("NO", "NO"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("0", 0),
        ("-12", -12),
        ("010", "010"),
        ("0x1F", "0x1F"),
        ("1_000", "1_000"),
        ("2026-11-24", "2026-11-24"),
        ('"12"', "12"),
        ("'true'", "true"),
        ("3.0", 3.0),
        ("1.2.3", "1.2.3"),
    ],
)
def test_plain_scalars(text: str, value: object) -> None:
    got = parse_document(f"key: {text}\n", "r.yaml").data["key"]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "r.yaml:3: a: given twice, first on line 1"),
        ("a: .nan\n", "r.yaml:1: a: .nan is not a number"),
        ("a:\n  b: -.inf\n", "r.yaml:2: a.b: -.inf is not a number"),
        ("a: 1e999\n", "too large"),
        ("a: !!python/object/apply:os.system [ls]\n", "not allowed"),
        ("a: !thing x\n", "tag !thing is not allowed"),
        ("a: [1\n", "r.yaml:2: not YAML"),
        ("a:\n\tb: 1\n", "not tabs"),
        ("", "is empty"),
        ("- 1\n", "expected `key: value` lines"),
        ("a: *nothing\n", "r.yaml:1: not YAML"),
        ("a: 1\n---\nb: 2\n", "not YAML"),
        ("? [x]\n: 1\n", "a key must be a word"),
        ("a: &x\n  b: *x\n", "refers to what it stands in"),
        ("a: 1\n<<: 3\n", "merges mappings only"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_document(text, "r.yaml")
    assert message in str(caught.value)


def test_an_alias_bomb_is_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    with pytest.raises(UserError, match="repeat themselves too often"):
        parse_document("\n".join(lines), "r.yaml")


def test_positions_of_keys_items_and_merges() -> None:
    text = "a: &x\n  b: 1\n  c: [5,\n    6]\nd:\n  <<: *x\n  b: 2\n"
    document = parse_document(text, "r.yaml")
    assert document.data == {"a": {"b": 1, "c": [5, 6]}, "d": {"b": 2, "c": [5, 6]}}
    want = {"a.b": 2, "a.c": 3, "a.c[1]": 4, "d": 5, "d.b": 7, "d.c": 3}
    assert {path: int(document.positions[path].rpartition(":")[2]) for path in want} == want


def test_merge_replaces_lists_and_removes_by_null() -> None:
    below = parse_document("a: {x: 1, y: [1, 2, 3]}\nb: 2\n", "below.yaml")
    above = parse_document("a: {y: [9]}\nb: null\n", "above.yaml")
    merged = merge_documents(below, above)
    assert merged.data == {"a": {"x": 1, "y": [9]}}
    assert merged.positions["a.x"] == "below.yaml:1" and merged.positions["a.y[0]"] == "above.yaml:1"
    assert "a.y[2]" not in merged.positions


@pytest.mark.parametrize("content", [b"\xff\xfe\x00binary", b"\x89PNG\r\n\x1a\n\x00\x00"])
def test_a_binary_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a text file"):
        read_document(path)


def test_a_folder_and_an_absent_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        read_document(tmp_path)
    with pytest.raises(UserError, match="No such file"):
        read_document(tmp_path / "no.yaml")
