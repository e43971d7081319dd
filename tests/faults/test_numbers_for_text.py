"""A number where a profile or recipe wants text is shown as it is written, with the quotes that mend it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.cluster import load_profile
from launcher.errors import UserError
from launcher.recipe.load import load_recipes


def problem(load: Any, path: Path, text: str, *more: Any) -> str:
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load(str(path), *more)
    (said,) = caught.value.problems
    return said.partition(": ")[2]


@pytest.mark.parametrize(
    ("line", "said", "mended"),
    [
        ("mem: 0", 'mem: expected a string, got 0; put it in quotes: "0"', 'mem: "0"'),
        ("mem: 64_000", "mem: '64_000' is no amount of memory; write 64G", "mem: 64G"),
        ("time: 30", 'time: expected a string, got 30; put it in quotes: "30"', 'time: "30"'),
        ("account: 12e45", 'account: expected a string, got 12e45; put it in quotes: "12e45"', 'account: "12e45"'),
        ("account: 1.10", 'account: expected a string, got 1.10; put it in quotes: "1.10"', 'account: "1.10"'),
        ("qos: TRUE", 'qos: expected a string, got TRUE; put it in quotes: "TRUE"', 'qos: "TRUE"'),
        ("env: {A: +7}", 'env.A: expected a string, got +7; put it in quotes: "+7"', 'env: {A: "+7"}'),
        ("env: {A: }", 'env.A: expected a string, got null; put it in quotes: ""', 'env: {A: ""}'),
        ("env: {A: ~}", 'env.A: expected a string, got ~; put it in quotes: "~"', 'env: {A: "~"}'),
        ("setup: [true]", 'setup[0]: expected a string, got true; put it in quotes: "true"', 'setup: ["true"]'),
        ("max_array: 1e3", "max_array: expected a whole number, got 1e3; write 1000", "max_array: 1000"),
        ("max_array: '9'", 'max_array: expected a whole number, got "9"; leave the quotes out', "max_array: 9"),
        ("poll_s: '5'", 'poll_s: expected a number, got "5"; leave the quotes out', "poll_s: 5"),
    ],
)
def test_a_profile(tmp_path: Path, line: str, said: str, mended: str) -> None:
    path = tmp_path / "site.yaml"
    assert problem(load_profile, path, f"scheduler: slurm\n{line}\n") == said
    path.write_text(f"scheduler: slurm\n{mended}\n")
    load_profile(str(path))


RECIPE = """\
name: {name}
stages:
  prepare:
    kind: prepare
    resources: {{time: {time}}}
    tokenizer: {{vocab_size: {train}}}
    sources: {{t: {{kind: files, path: {path}}}}}
"""
RIGHT = {"name": "r", "time": "1:00:00", "train": "300", "path": "x"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"time": "30"}, 'stages.prepare.resources.time: expected a string, got 30; put it in quotes: "30"'),
        ({"path": "1e3"}, 'stages.prepare.sources.t.path: expected a string, got 1e3; put it in quotes: "1e3"'),
        ({"name": "007.50e1"}, ""),
        ({"name": "7.50e1"}, 'name: expected a string, got 7.50e1; put it in quotes: "7.50e1"'),
    ],
)
def test_a_recipe(tmp_path: Path, changes: dict[str, str], said: str) -> None:
    text = RECIPE.format(**{**RIGHT, **changes})
    if said:
        assert problem(load_recipes, tmp_path / "r.yaml", text) == said
    else:
        (tmp_path / "r.yaml").write_text(text)
        assert load_recipes(str(tmp_path / "r.yaml"))[0].name == changes["name"]


def test_what_an_override_replaces_is_not_shown_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.format(**{**RIGHT, "path": "1e3"}))
    with pytest.raises(UserError) as caught:
        load_recipes(str(tmp_path / "r.yaml"), ["prepare.sources.t.path=2.0"])
    assert "got 2.0" in str(caught.value) and "1e3" not in str(caught.value)
