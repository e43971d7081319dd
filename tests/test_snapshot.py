"""The code snapshot: what it holds, when it is a new one, and what it says of where it came from."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.cluster import Profile, load_profile, place_record
from launcher.errors import UserError
from launcher.run_record import RunRecord, refuse_unbuilt
from launcher.snapshot import refuse_gone, with_snapshot
from tests.supervisor.counting import counting_run


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main")
    return subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with a package called launcher, a recipe, a change and a file that git does not know."""
    folder = tmp_path / "check out"
    (folder / "launcher" / "__pycache__").mkdir(parents=True)
    (folder / "launcher" / "__init__.py").write_text("")
    (folder / "launcher" / "old.py").write_text("value = 1\n")
    (folder / "launcher" / "__pycache__" / "old.pyc").write_text("compiled")
    (folder / "recipe.yaml").write_text("name: it\n")
    git(folder, "init", "--quiet")
    git(folder, "add", "launcher/__init__.py", "launcher/old.py", "recipe.yaml")
    git(folder, "commit", "--quiet", "--message=first")
    (folder / "launcher" / "old.py").write_text("value = 2\n")
    (folder / "launcher" / "new.py").write_text("value = 3\n")
    return folder


def planned(checkout: Path) -> tuple[RunRecord, Profile]:
    run = replace(counting_run(("a", (), {}), ("b", ("a",), {})), recipe=str(checkout / "recipe.yaml"))
    return run, replace(load_profile("example-pyxis"), code=str(checkout))


def snapshot_of(root: Path, checkout: Path) -> Path:
    record = with_snapshot(root, *planned(checkout))
    (relative,) = {s.spec.snapshot for s in record.stages}
    assert relative is not None
    return root / relative


def test_it_holds_the_code_as_it_is_and_says_what_was_not_committed(tmp_path: Path, checkout: Path) -> None:
    root = tmp_path / "root"
    made = snapshot_of(root, checkout)
    assert made.parent == root / "runs" / "run" / "snapshot"
    assert {str(p.relative_to(made)) for p in made.rglob("*") if p.is_file()} == {
        *("launcher/__init__.py", "launcher/old.py", "launcher/new.py"),
        *("recipe.yaml", "snapshot.json", "code.diff"),
    }
    assert (made / "launcher" / "old.py").read_text() == "value = 2\n"
    facts = json.loads((made / "snapshot.json").read_text())
    assert facts["launcher"]["commit"] == git(checkout, "rev-parse", "HEAD").strip()
    assert facts["launcher"]["untracked"] == ["launcher/__pycache__/old.pyc", "launcher/new.py"]
    diff = (made / "code.diff").read_text()
    assert "-value = 1\n+value = 2\n" in diff and diff.count("diff --git") == 1, "one repository, told once"


def test_the_diff_is_a_patch_whatever_git_is_set_to_show(tmp_path: Path, checkout: Path) -> None:
    for name, value in (("diff.external", "echo"), ("color.ui", "always"), ("diff.noprefix", "true")):
        git(checkout, "config", name, value)
    patch = snapshot_of(tmp_path / "root", checkout) / "code.diff"
    git(checkout, "checkout", "--quiet", "launcher/old.py")
    git(checkout, "apply", str(patch))
    assert (checkout / "launcher" / "old.py").read_text() == "value = 2\n"


def test_the_same_code_is_one_snapshot_and_a_change_another(tmp_path: Path, checkout: Path) -> None:
    first = snapshot_of(tmp_path / "root", checkout)
    assert snapshot_of(tmp_path / "root", checkout) == first
    (checkout / "launcher" / "new.py").write_text("value = 4\n")
    second = snapshot_of(tmp_path / "root", checkout)
    assert second != first and (first / "launcher" / "new.py").read_text() == "value = 3\n"
    assert sorted(p.name for p in first.parent.iterdir()) == sorted([first.name, second.name]), "nothing half made"


def test_steps_import_it_and_it_needs_no_mount_of_its_own(tmp_path: Path, checkout: Path) -> None:
    root = tmp_path / "root"
    record, profile = planned(checkout)
    placed = place_record(with_snapshot(root, record, profile), profile, root)
    step = placed.stages[0].spec.steps[0]
    assert step.env["PYTHONPATH"] == str(root / (placed.stages[0].spec.snapshot or ""))
    assert not any(str(checkout) in mount for mount in step.mounts)


def test_code_that_only_the_nodes_see_is_taken_from_here(tmp_path: Path, checkout: Path) -> None:
    record, profile = planned(checkout)
    there = with_snapshot(tmp_path / "root", record, replace(profile, code="/only/on/nodes"))
    assert (tmp_path / "root" / (there.stages[0].spec.snapshot or "") / "launcher" / "snapshot.py").is_file()


def test_a_run_whose_snapshot_is_gone_is_planned_anew(tmp_path: Path, checkout: Path) -> None:
    record = with_snapshot(tmp_path / "root", *planned(checkout))
    refuse_gone(tmp_path / "root", record)
    with pytest.raises(UserError, match="the code that the run was planned with is gone; plan it anew") as caught:
        refuse_gone(tmp_path / "elsewhere", record)
    assert len(caught.value.problems) == 1


def test_stages_that_are_not_built_are_all_named() -> None:
    run = counting_run(("a", (), {}), ("b", (), {}), ("c", (), {}))
    a, b, c = run.stages
    refuse_unbuilt([run])
    unbuilt = replace(run, stages=(replace(a, not_built="no rl yet"), b, replace(c, not_built="no nemo yet")))
    with pytest.raises(UserError) as caught:
        refuse_unbuilt([run, unbuilt])
    assert caught.value.problems == ("stages.a: not built yet: no rl yet", "stages.c: not built yet: no nemo yet")
