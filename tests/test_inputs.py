"""What lies outside the store decides fingerprints by its content, wherever the command is typed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.errors import UserError
from launcher.inputs import resolve_inputs
from launcher.recipe.load import load_recipes

RECIPE = """
stages:
  prepare:
    kind: prepare
    tokenizer: {path: mine}
    sources: {text: {kind: files, path: text}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "r.yaml").write_text(RECIPE)
    for name in ("mine/tokenizer.json", "text/a.md", "text/b.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def facts(folder: Path) -> dict[str, str]:
    (recipe,) = load_recipes(folder / "r.yaml")
    return dict(resolve_inputs(recipe).facts["prepare"])


@pytest.mark.parametrize(
    ("name", "key"),
    [("mine/tokenizer.json", "tokenizer"), ("text/a.md", "sources.text"), ("text/c.md", "sources.text")],
)
def test_a_changed_file_changes_its_fact_alone(folder: Path, name: str, key: str) -> None:
    before = facts(folder)
    assert facts(folder) == before and set(before) == {"tokenizer", "sources.text"}
    (folder / name).write_text("changed")
    after = facts(folder)
    assert {k for k in before if before[k] != after[k]} == {key}


def test_paths_are_the_recipes_and_not_the_shells(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    (recipe,) = load_recipes(os.path.relpath(folder / "r.yaml", "/"))
    config = recipe.stages["prepare"].config
    assert (config.tokenizer.path, config.sources["text"].path) == (str(folder / "mine"), str(folder / "text"))


def test_what_is_absent_is_named_with_its_place_all_at_once(folder: Path) -> None:
    (folder / "mine" / "tokenizer.json").unlink()
    (folder / "mine").rmdir()
    os.rename(folder / "text", folder / "texts")
    (recipe,) = load_recipes(folder / "r.yaml")
    found = resolve_inputs(recipe)
    first, second = sorted(a.message for a in found.absent)
    assert "r.yaml:5: stages.prepare.tokenizer.path" in first + second
    assert "r.yaml:6: stages.prepare.sources.text.path" in first + second
    assert {a.path for a in found.absent} == {str(folder / "mine"), str(folder / "text")}
    assert set(found.facts["prepare"].values()) == {"absent"}, "no content has this fingerprint"


@pytest.mark.parametrize("ref", ["models/base", "./models/base", "~/no-such-folder/base", "/no/such/folder"])
def test_an_absent_checkpoint_is_named_with_its_place(folder: Path, ref: str) -> None:
    stage = "  mid:\n    kind: rl\n    backend: trl\n    prompts: prepare/p\n    max_steps: 1\n"
    problems = "    problems: {p: {count: 3}}\n"
    (folder / "r.yaml").write_text(RECIPE + problems + stage + f"    checkpoint: {ref}\n")
    (recipe,) = load_recipes(folder / "r.yaml")
    if ref == "models/base":  # the name of a stage, which the plan looks for
        assert resolve_inputs(recipe).absent == ()
        return
    (absent,) = resolve_inputs(recipe).absent
    assert "r.yaml:13: stages.mid.checkpoint" in absent.message and absent.path in absent.message
    assert os.path.isabs(absent.path) and absent.stage is None


def test_what_is_there_and_is_no_checkpoint_is_an_error(folder: Path) -> None:
    stage = "  mid:\n    kind: rl\n    backend: trl\n    prompts: prepare/p\n    max_steps: 1\n"
    (folder / "r.yaml").write_text(RECIPE + stage + "    checkpoint: ./text\n")
    (recipe,) = load_recipes(folder / "r.yaml")
    with pytest.raises(UserError, match=r"no checkpoint: neither config.json \(hf\)"):
        resolve_inputs(recipe)
