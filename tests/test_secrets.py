"""Secrets are named and never valued: refused where they are absent, and in no file that a run leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from test_cli import prism, recipe_file

from launcher.cluster import Profile
from launcher.recipe.load import load_recipes
from launcher.spec import SpecError
from tests.supervisor.counting import Store, counting_stage, counting_step

SECRET = "plantedPlanted0123"


def test_a_recipe_names_secrets_and_never_their_values(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "secrets: [HF_TOKEN]\nstages:", "stages:")
    assert load_recipes(path)[0].secrets == ("HF_TOKEN",)
    for wrong in ("HF_TOKEN", "[a=b]", "{HF_TOKEN: x}"):
        done = prism("check", str(recipe_file(tmp_path, f"secrets: {wrong}\nstages:", "stages:")))
        assert done.returncode == 2 and "secrets: expected a list of names" in done.stderr


def test_a_recipe_with_a_token_in_it_is_refused_where_it_stands(tmp_path: Path) -> None:
    token = "hf_" + SECRET * 2
    path = recipe_file(tmp_path, f'description: "with {token}"\nstages:', "stages:")
    done = prism("check", str(path))
    assert done.returncode == 2 and "description: looks like a secret" in done.stderr and token not in done.stderr


def test_run_refuses_secrets_that_the_shell_has_not(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "secrets: [PLANTED_TOKEN]\nstages:", "stages:")
    done = prism("run", str(path), "--root", str(tmp_path / "root"))
    assert done.returncode == 2 and "PLANTED_TOKEN not set in this shell" in done.stderr
    assert not (tmp_path / "root").exists()


def test_a_secret_stands_in_no_rendered_file(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "secrets: [PLANTED_TOKEN]\nstages:", "stages:")
    target = ("render", str(path), "--cluster", "example-pyxis", "-o", str(tmp_path / "out"), "--root", "/scratch/p")
    assert prism(*target, PLANTED_TOKEN=SECRET).returncode == 0
    texts = [p.read_text() for p in (tmp_path / "out").iterdir()]
    assert len(texts) > 5 and not any(SECRET in text for text in texts)
    assert any('"PLANTED_TOKEN"' in text for text in texts)


def test_a_stage_without_its_secret_does_not_start(tmp_path: Path) -> None:
    store = Store(tmp_path)
    spec = counting_stage(counting_step(), secrets=("PLANTED_TOKEN",))
    assert store.run(spec) == 2
    assert store.end(spec)["class"] == "user-error" and "PLANTED_TOKEN" in store.end(spec)["message"]
    assert store.run(spec, PLANTED_TOKEN=SECRET) == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5 and not any(SECRET.encode() in path.read_bytes() for path in files)


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "db_password", "AWS_SECRET"])
def test_a_profile_holds_no_secrets(name: str) -> None:
    with pytest.raises(SpecError, match="looks like a secret"):
        Profile(name="p", scheduler="slurm", env={name: "x"})
    with pytest.raises(SpecError, match="looks like a secret"):
        Profile(name="p", scheduler="slurm", env={"ANY": f"hf_{SECRET}{SECRET}"})
    assert replace(Profile(name="p", scheduler="slurm"), env={"TOKENIZERS_PARALLELISM": "false"})
