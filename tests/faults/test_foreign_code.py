"""Code that a repository, an archive or the shell's folder brought along, and that no recipe asked to run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.cluster import load_profile
from launcher.git import describe
from launcher.interpreter import module_command, module_environment
from launcher.snapshot import with_snapshot
from tests.supervisor.counting import counting_run

CHECKOUT = Path(__file__).resolve().parents[2]
DEMO = (CHECKOUT / "recipes" / "demo.yaml").read_text(encoding="utf-8")
#: A module that says that it was imported.
CANARY = "import os, sys\nopen(os.environ['CANARY'], 'a').write(__name__ + ' ')\n"


def git(folder: Path, *words: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main")
    subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True)


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What stands there once foreign code has run."""
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    return tmp_path / "canary"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with a recipe and a data file, both changed since."""
    folder = tmp_path / "archive"
    folder.mkdir()
    (folder / "r.yaml").write_text(DEMO)
    (folder / "data.bin").write_text("one\n")
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=first")
    (folder / "data.bin").write_text("two\n")
    return folder


def command(canary: Path) -> str:
    path = canary.with_name("evil")
    path.write_text(f"#!/bin/sh\necho ran >> {canary}\nexec cat\n")
    path.chmod(0o755)
    return str(path)


def by_config(*lines: tuple[str, str], attributes: str = "") -> Callable[[Path, str], None]:
    def set_up(folder: Path, evil: str) -> None:
        for name, value in lines:
            git(folder, "config", name, value.format(evil=evil))
        if attributes:
            (folder / ".gitattributes").write_text(attributes)

    return set_up


def by_hook(folder: Path, evil: str) -> None:
    for name in ("post-index-change", "fsmonitor-watchman", "post-checkout"):
        hook = folder / ".git" / "hooks" / name
        hook.parent.mkdir(exist_ok=True)
        hook.write_text(Path(evil).read_text())
        hook.chmod(0o755)
    os.utime(folder / "r.yaml")


def by_included_file(folder: Path, evil: str) -> None:
    (folder / "more").write_text(f'[filter "a=b"]\n\tclean = {evil}\n\trequired = true\n')
    git(folder, "config", "include.path", "../more")
    (folder / ".gitattributes").write_text("* filter=a=b\n")


def by_submodule(folder: Path, evil: str) -> None:
    inner = folder / "inner"
    inner.mkdir()
    git(inner, "init", "--quiet")
    (inner / "file").write_text("1")
    git(inner, "add", "--all")
    git(inner, "commit", "--quiet", "--message=inner")
    git(folder, "add", "inner")
    git(folder, "commit", "--quiet", "--message=with a submodule")
    git(inner, "config", "core.fsmonitor", evil)
    (inner / "file").write_text("2")


def by_absent_object(folder: Path, evil: str) -> None:
    """A partial clone: git fetches what is absent, by whatever its configuration names."""
    for name, value in (
        ("core.repositoryformatversion", "1"),
        ("extensions.partialClone", "origin"),
        ("remote.origin.url", f"ext::{evil}"),
        ("remote.origin.promisor", "true"),
        ("protocol.ext.allow", "always"),
    ):
        git(folder, "config", name, value)
    for path in (folder / ".git" / "objects").glob("??/*"):
        kind = subprocess.run(
            ["git", "-C", str(folder), "cat-file", "-t", path.parent.name + path.name], capture_output=True, text=True
        )
        if kind.stdout.strip() == "blob":
            path.unlink()


EVIL = {
    "fsmonitor": by_config(("core.fsmonitor", "{evil}")),
    "clean filter": by_config(("filter.x.clean", "{evil}"), attributes="* filter=x\n"),
    "process filter": by_config(
        ("filter.x.process", "{evil}"), ("filter.x.required", "true"), attributes="*.bin filter=x\n"
    ),
    "textconv": by_config(("diff.x.textconv", "{evil}"), attributes="* diff=x\n"),
    "diff driver": by_config(("diff.x.command", "{evil}"), attributes="* diff=x\n"),
    "external diff": by_config(("diff.external", "{evil}")),
    "pager": by_config(("core.pager", "{evil}"), ("pager.diff", "true")),
    "hooks": by_hook,
    "hooks elsewhere": by_config(("core.hooksPath", ".")),
    "an included file": by_included_file,
    "a submodule": by_submodule,
    "an absent object": by_absent_object,
}


@pytest.mark.parametrize("way", EVIL)
def test_looking_at_a_repository_runs_nothing_of_it(way: str, repository: Path, canary: Path, tmp_path: Path) -> None:
    EVIL[way](repository, command(canary))
    run = replace(counting_run(("a", (), {})), recipe=str(repository / "r.yaml"))
    assert str(describe(repository)).endswith("+")
    made = with_snapshot(tmp_path / "root", run, replace(load_profile("example-pyxis"), code=str(repository)))
    assert (tmp_path / "root" / (made.stages[0].spec.snapshot or "") / "code.diff").is_file()
    assert not canary.exists()


def test_the_way_is_one_that_git_itself_would_go(repository: Path, canary: Path) -> None:
    EVIL["clean filter"](repository, command(canary))
    subprocess.run(["git", "-C", str(repository), "diff", "HEAD"], capture_output=True, check=False)
    assert canary.exists(), "the tests above prove something"


def test_check_runs_nothing_of_the_repository(repository: Path, canary: Path) -> None:
    EVIL["fsmonitor"](repository, command(canary))
    words = module_command("launcher.cli", "check", str(repository / "r.yaml"))
    done = subprocess.run(words, env=module_environment(os.environ), cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not canary.exists()


def test_a_commit_is_told_with_and_without_changes(repository: Path, tmp_path: Path) -> None:
    head = subprocess.run(["git", "-C", str(repository), "rev-parse", "HEAD"], capture_output=True, text=True)
    assert describe(repository) == head.stdout.strip() + "+"
    git(repository, "checkout", "--quiet", "data.bin")
    os.utime(repository / "r.yaml", (1, 1))
    assert describe(repository) == head.stdout.strip(), "a file that was only touched has not changed"
    (repository / "more").write_text("untracked")
    assert describe(repository) == head.stdout.strip()
    assert describe(tmp_path) is None
    git(repository, "config", "core.worktree", str(tmp_path))
    assert describe(repository / "..") is None


def test_another_work_tree_of_a_repository_is_told_too(repository: Path, tmp_path: Path) -> None:
    git(repository, "worktree", "add", "--quiet", str(tmp_path / "second"))
    assert not str(describe(tmp_path / "second")).endswith("+")
    (tmp_path / "second" / "data.bin").write_text("three\n")
    assert str(describe(tmp_path / "second")).endswith("+")


def test_a_work_tree_that_is_set_to_lie_elsewhere_is_not_looked_at(repository: Path, tmp_path: Path) -> None:
    private = tmp_path / "home"
    private.mkdir()
    (private / "data.bin").write_text("private\n")
    git(repository, "config", "core.worktree", str(private))
    assert describe(repository) is None


def test_a_folder_inside_that_says_to_be_a_repository_is_none(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "private.txt").write_text("private\n")
    (repository / ".git").rename(repository / "planted")
    (tmp_path / "archive" / "planted").rename(tmp_path / "planted")
    git(tmp_path / "planted", "config", "core.bare", "false")
    git(tmp_path / "planted", "config", "core.worktree", "..")
    assert describe(tmp_path / "planted") is None


@pytest.mark.parametrize("version", [(3, 10), (3, 11)])
def test_a_module_starts_without_the_folder_of_the_shell(
    version: tuple[int, int], tmp_path: Path, canary: Path
) -> None:
    for name in ("yaml", "json", "argparse", "rich", "matplotlib"):
        (tmp_path / f"{name}.py").write_text(CANARY)
    (tmp_path / "launcher").mkdir()
    (tmp_path / "launcher" / "__init__.py").write_text(CANARY)
    words = module_command("launcher.cli", "recipes", "--json", version=version)
    environment = module_environment({**os.environ, "PYTHONPATH": ":"})
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and '"demo"' in done.stdout, done.stderr
    assert not canary.exists()


def test_the_figures_are_drawn_without_the_folder_of_the_shell(
    tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launcher.report.write import draw_figures

    (tmp_path / "json.py").write_text(CANARY)
    (tmp_path / "matplotlibrc").write_text("backend: module://json\n")
    monkeypatch.chdir(tmp_path)
    draw_figures({})
    assert not canary.exists()


def test_every_python_of_ours_is_started_in_the_one_way() -> None:
    """`sys.executable` goes into a command in `interpreter` alone, apart from those that run in the store's folders."""
    in_the_store = {"workers/train_script.py", "site/probe.py"}
    found = {
        str(path.relative_to(CHECKOUT / "launcher"))
        for path in (CHECKOUT / "launcher").rglob("*.py")
        if '[sys.executable, "-' in path.read_text(encoding="utf-8")
    }
    assert found - {"interpreter.py"} == in_the_store
    assert sys.executable == module_command("x")[0]
