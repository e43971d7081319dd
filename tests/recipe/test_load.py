"""Recipes: bases, matrices, overrides, models, and every problem with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import UserError
from launcher.recipe import Recipe
from launcher.recipe.load import find_recipe, list_recipes, load_recipes

TEXT = """\
name: small
model: llama-tiny
seed: 3
stages:
  prepare:
    kind: prepare
    sources:
      text: {kind: python-stdlib}
      mine: {kind: files, path: data/a.txt}
  base:
    kind: train
    data: {prepare/text: 1.0}
    train_iters: 5
    resources: {time: 4:00:00}
"""


def load(folder: Path, text: str = TEXT, *sets: str, name: str | None = None) -> tuple[Recipe, ...]:
    path = folder / "r.yaml"
    path.write_text(text)
    return load_recipes(path, sets, name)


def problems(folder: Path, text: str, *sets: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(folder, text, *sets)
    return [p.replace(f"{folder}/", "") for p in caught.value.problems]


def test_a_recipe_as_values(tmp_path: Path) -> None:
    (recipe,) = load(tmp_path)
    assert (recipe.name, recipe.seed, list(recipe.stages)) == ("small", 3, ["prepare", "base"])
    base = recipe.stages["base"]
    assert base.seed == 3 and base.resources.time == "4:00:00" and base.config.model.family == "llama"
    assert recipe.stages["prepare"].config.sources["mine"].path == str(tmp_path / "data" / "a.txt")
    assert recipe.where("stages.base.train_iters").endswith("r.yaml:13")
    assert recipe.where("stages.base.model.config.hidden_size").endswith("llama-tiny.yaml:9")


def test_a_seed_that_numpy_does_not_take_is_refused(tmp_path: Path) -> None:
    assert load(tmp_path, TEXT, f"seed={2**31 - 1}")[0].seed == 2**31 - 1
    for place, seed, message in (
        ("seed", 2**31, "seed: must be at most 2147483647, got 2147483648"),
        ("base.seed", 10**30, "stages.base.seed: must be at most"),
        ("seed", -1, "seed: must not be negative, got -1"),
    ):
        with pytest.raises(UserError, match=message):
            load(tmp_path, TEXT, f"{place}={seed}")


def test_seed_reaches_every_stage_but_one_that_has_its_own(tmp_path: Path) -> None:
    text = TEXT.replace("    train_iters: 5", "    train_iters: 5\n    seed: 40")
    (recipe,) = load(tmp_path, text, "seed=7")
    assert {n: s.seed for n, s in recipe.stages.items()} == {"prepare": 7, "base": 40}


def test_overrides_abbreviate_stages_and_a_stage_may_be_called_base(tmp_path: Path) -> None:
    (recipe,) = load(tmp_path, TEXT, "base.train_iters=9", "stages.base.lr=1e-4", "base.data={prepare/mine: 2}")
    config = recipe.stages["base"].config
    assert (config.train_iters, config.lr, config.data) == (9, 1e-4, {"prepare/mine": 2.0})
    assert recipe.overrides == ("base.train_iters=9", "stages.base.lr=1e-4", "base.data={prepare/mine: 2}")


def test_run_names_are_safe_and_distinct(tmp_path: Path) -> None:
    names = [load(tmp_path, TEXT, s)[0].name for s in ("seed=1", "seed=2", "model=llama-tiny")]
    names += [load(tmp_path, TEXT, f"description={d}")[0].name for d in ("a/b", "a_b", "x" * 200, "x" * 201)]
    assert names[:3] == ["small-seed=1", "small-seed=2", "small-model=llama-tiny"]
    assert len(set(names)) == len(names) and all("/" not in n and len(n) <= 80 for n in names)
    assert load(tmp_path, TEXT, name="mine")[0].name == "mine"


def test_matrix_gives_one_recipe_a_point(tmp_path: Path) -> None:
    recipes = load(tmp_path, TEXT + "matrix: {seed: [0, 1], base.train_iters: [5, 6]}\n")
    assert [(r.seed, r.stages["base"].config.train_iters) for r in recipes] == [(0, 5), (0, 6), (1, 5), (1, 6)]
    assert len({r.name for r in recipes}) == 4
    named = load(tmp_path, TEXT + "matrix: {seed: [0, 1]}\n", name="mine")
    assert [r.name for r in named] == ["mine-seed=0", "mine-seed=1"]


def test_base_files_merge_and_lines_stay_those_of_their_file(tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text(TEXT)
    text = "base: below.yaml\nname: above\nstages:\n  base: {lr: 1e-3, train_iter: 1}\n"
    assert problems(tmp_path, text) == ["r.yaml:4: stages.base.train_iter: unknown key, did you mean train_iters?"]
    (recipe,) = load(tmp_path, text.replace(", train_iter: 1", ""))
    assert recipe.name == "above" and recipe.stages["base"].config.lr == 1e-3
    assert recipe.where("stages.base.train_iters").endswith("below.yaml:13")


def test_bases_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("base: r.yaml\n" + TEXT)
    assert "other.yaml -> r.yaml" in problems(tmp_path, "base: other.yaml\n" + TEXT)[0]


def test_all_problems_at_once_with_their_lines(tmp_path: Path) -> None:
    text = TEXT.replace("train_iters: 5", "train_iter: 5\n    lr: fast").replace("kind: python-stdlib", "kind: pythn")
    found = problems(tmp_path, text.replace("seed: 3", "sed: 3"))
    assert "r.yaml:3: sed: unknown key, did you mean seed?" in found
    assert "r.yaml:13: stages.base.train_iter: unknown key, did you mean train_iters?" in found
    assert 'r.yaml:14: stages.base.lr: expected a number, got "fast"' in found
    assert any(p.startswith("r.yaml:8: stages.prepare.sources.text.kind: expected one of") for p in found)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kind: train", "kind: trian", "unknown kind trian, did you mean train?"),
        ("kind: train", "kind: convert", "the plan inserts them"),
        ("  base:", "  base-to-hf:", "this name is reserved"),
        ("  base:", "  Base Model:", "lower-case letters"),
        ("model: llama-tiny", "model: llama-tny", "no model llama-tny, did you mean llama-tiny?"),
        ("time: 4:00:00", "time: soon", "'soon' is no time limit"),
        ("resources: {time: 4:00:00}", "resources: {nodes: 0}", "must be at least 1, got 0"),
        ("resources: {time: 4:00:00}", "resources: [1]", "expected a mapping"),
        ("{prepare/text: 1.0}", "{}", "names no source"),
        ("{prepare/text: 1.0}", "{prepare/text: -1}", "weight must be above 0"),
        ("train_iters: 5", "train_iters: 5.5", "expected a whole number"),
        ("train_iters: 5", "train_iters: true", "expected a whole number, got true"),
        ("{kind: files, path: data/a.txt}", "{kind: files}", "path: is required"),
        ("stages:", "stage:", "unknown key, did you mean stages?"),
    ],
)
def test_one_mistake_one_message(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TEXT
    found = problems(tmp_path, TEXT.replace(old, new, 1))
    assert any(message in p and p.startswith("r.yaml") for p in found), found


@pytest.mark.parametrize("override", ["lr=3", "base.lrr=3", "nothing", "=3", "base.lr=[1", "bse.lr=1", "base.lr=fast"])
def test_wrong_overrides_are_shown_as_typed(tmp_path: Path, override: str) -> None:
    assert all(p.startswith(f"--set {override}: ") for p in problems(tmp_path, TEXT, override))


def test_shipped_recipes_are_found_by_name_and_all_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("demo") == find_recipe("recipes/demo.yaml")
    for shipped in list_recipes():
        assert load_recipes(shipped["name"])
    with pytest.raises(UserError, match="did you mean demo"):
        find_recipe("demoo")
