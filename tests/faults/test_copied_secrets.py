"""Secrets that lie beside code or among uncommitted changes, and what is copied into a store that others may read."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.cluster import load_profile
from launcher.snapshot import with_snapshot
from tests.supervisor.counting import counting_run

PLANTED = "PLANTEDplanted0123"
#: What is put beside the package's code, and whether the snapshot takes it.
BESIDE = {
    **dict.fromkeys((".env", ".netrc", ".git/config", "deploy.pem", "id_rsa", "id_ed25519.old", "server.key"), False),
    **dict.fromkeys((".aws/credentials", ".npmrc", "kubeconfig.yaml", "credentials.prod.json", "prod.env"), False),
    **dict.fromkeys(("secrets/db.txt", "service-account-1.json", "token", ".hidden/notes.txt", ".pypirc"), False),
    **dict.fromkeys(("secrets.py", "tokens.json", "style.css", "report/page.html"), True),
}


def git(folder: Path, *words: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main")
    subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True)


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A folder with a package called launcher."""
    (tmp_path / "code" / "launcher").mkdir(parents=True)
    (tmp_path / "code" / "launcher" / "__init__.py").write_text("")
    return tmp_path / "code"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe in a repository of its own."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "r.yaml").write_text("name: it\n")
    git(tmp_path / "recipes", "init", "--quiet")
    return tmp_path / "recipes" / "r.yaml"


def snapshot(tmp_path: Path, code: Path, recipe: Path, *secrets: str) -> tuple[Path, dict[str, Any]]:
    """The snapshot's folder, and what it says of itself."""
    run = replace(counting_run(("a", (), {})), recipe=str(recipe))
    run = replace(run, stages=tuple(replace(s, spec=replace(s.spec, secrets=secrets)) for s in run.stages))
    made = with_snapshot(tmp_path / "root", run, replace(load_profile("example-pyxis"), code=str(code)))
    folder = tmp_path / "root" / (made.stages[0].spec.snapshot or "")
    return folder, json.loads((folder / "snapshot.json").read_text())


def hits(folder: Path) -> list[str]:
    return [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and PLANTED.encode() in p.read_bytes()]


def test_what_is_called_as_secrets_are_is_not_copied_and_is_named(tmp_path: Path, code: Path, recipe: Path) -> None:
    for name, is_taken in BESIDE.items():
        path = code / "launcher" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("nothing" if is_taken else PLANTED)
    folder, facts = snapshot(tmp_path, code, recipe)
    assert hits(folder) == []
    assert all((folder / "launcher" / name).is_file() == is_taken for name, is_taken in BESIDE.items())
    named = facts["launcher"]["left_out"]
    for name in (name for name, is_taken in BESIDE.items() if not is_taken):
        assert name in named or name.split("/")[0] in named


@pytest.mark.parametrize("where", ["file", "folder", "code"])
def test_what_a_link_leads_to_is_not_copied(where: str, tmp_path: Path, code: Path, recipe: Path) -> None:
    (tmp_path / "private").mkdir()
    target = tmp_path / "private" / ("it.py" if where == "code" else "it.txt")
    target.write_text(PLANTED)
    link = code / "launcher" / ("it.py" if where == "code" else "link")
    link.symlink_to(target.parent if where == "folder" else target)
    folder, facts = snapshot(tmp_path, code, recipe)
    assert hits(folder) == [] and facts["launcher"]["left_out"] == {link.name: "a link"}


def test_a_package_that_was_installed_as_links_is_copied(tmp_path: Path, code: Path, recipe: Path) -> None:
    (tmp_path / "cache").mkdir()
    for name in ("__init__.py", "cli.py"):
        (tmp_path / "cache" / name).write_text("value = 1\n")
        (code / "launcher" / name).unlink(missing_ok=True)
        (code / "launcher" / name).symlink_to(tmp_path / "cache" / name)
    folder, _ = snapshot(tmp_path, code, recipe)
    assert (folder / "launcher" / "cli.py").read_text() == "value = 1\n"


UNCOMMITTED = {
    ".env": f"HF_TOKEN={PLANTED}\n",
    "deploy/prod.env": f"anything {PLANTED}\n",
    "id_rsa": f"{PLANTED}\n",
    "notes.md": f"use HF_TOKEN={PLANTED}\n",
    "train.py": f'WANDB_API_KEY = "{PLANTED}"\n',
    "values.yaml": f"db:\n  password: {PLANTED}\n",
    "config.json": f'{{"api_key": "{PLANTED}"}}\n',
    "shape.txt": f"hf_{PLANTED}{PLANTED}\n",
    "remote.txt": f"https://me:{PLANTED}@example.org/x.git\n",
    "key.txt": f"-----BEGIN OPENSSH PRIVATE KEY-----\n{PLANTED}\n",
}


@pytest.mark.parametrize("name", UNCOMMITTED)
def test_an_uncommitted_secret_is_not_in_the_diff_and_is_named(
    name: str, tmp_path: Path, code: Path, recipe: Path
) -> None:
    top = recipe.parent
    (top / name).parent.mkdir(exist_ok=True)
    (top / name).write_text("A=1\n")
    (top / "model.py").write_text("eos_token = tokenizer.eos_token\n")
    git(top, "add", "--all")
    git(top, "commit", "--quiet", "--message=first")
    (top / name).write_text("A=1\n" + UNCOMMITTED[name])
    (top / "model.py").write_text("pad_token = tokenizer.eos_token or missing_token\n")
    folder, facts = snapshot(tmp_path, code, recipe)
    assert hits(folder) == []
    assert list(facts["recipe"]["left_out_of_diff"]) == [name]
    assert "+pad_token = tokenizer.eos_token" in (folder / "code.diff").read_text()


def test_a_secret_that_was_taken_out_is_not_in_the_diff(tmp_path: Path, code: Path, recipe: Path) -> None:
    (recipe.parent / "a.yaml").write_text(f"api_key: {PLANTED}\nlr: 1\n")
    (recipe.parent / "b.sh").write_text(f"export HF_TOKEN={PLANTED}\n")
    (recipe.parent / "c.txt").write_text("one\n")
    git(recipe.parent, "add", "--all")
    git(recipe.parent, "commit", "--quiet", "--message=first")
    (recipe.parent / "a.yaml").write_text("lr: 2\n")
    (recipe.parent / "b.sh").unlink()
    (recipe.parent / "c.txt").write_text("two\n")
    folder, facts = snapshot(tmp_path, code, recipe)
    assert hits(folder) == [] and list(facts["recipe"]["left_out_of_diff"]) == ["a.yaml", "b.sh"]
    assert "-one\n+two\n" in (folder / "code.diff").read_text()


def test_the_value_of_a_secret_is_known_wherever_it_stands(
    tmp_path: Path, code: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINE", PLANTED)
    (code / "launcher" / "notes.txt").write_text(f"mine is {PLANTED}")
    (recipe.parent / "plain.txt").write_text("nothing\n")
    git(recipe.parent, "add", "--all")
    git(recipe.parent, "commit", "--quiet", "--message=first")
    (recipe.parent / "plain.txt").write_text(f"mine is {PLANTED}\n")
    folder, facts = snapshot(tmp_path, code, recipe, "MINE")
    assert hits(folder) == []
    assert "notes.txt" in facts["launcher"]["left_out"] and "plain.txt" in facts["recipe"]["left_out_of_diff"]


def test_what_a_filter_changes_is_named_and_not_shown(tmp_path: Path, code: Path, recipe: Path) -> None:
    (recipe.parent / ".gitattributes").write_text("*.bin filter=lfs\n")
    (recipe.parent / "w.bin").write_text("pointer\n")
    git(recipe.parent, "add", "--all")
    git(recipe.parent, "commit", "--quiet", "--message=first")
    (recipe.parent / "w.bin").write_text("a large file\n")
    folder, facts = snapshot(tmp_path, code, recipe)
    assert list(facts["recipe"]["left_out_of_diff"]) == ["w.bin"]
    assert (folder / "code.diff").read_text() == ""
