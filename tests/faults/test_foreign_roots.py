"""A store's root that somebody else owns or may write, whose runs would be executed as one's own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher import store
from launcher.cli import main
from launcher.errors import UserError
from launcher.run_record import write_run
from tests.supervisor.counting import counting_run

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user, which root alone may")
COMMANDS = (["resume", "run"], ["status", "run"], ["watch", "run"], ["cancel", "run"], ["report", "run"], ["logs"])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store with a run in it."""
    folder = tmp_path / "root"
    folder.mkdir(mode=0o755)
    write_run(folder, counting_run(("a", (), {"until": 3})))
    return folder


@pytest.mark.parametrize("command", [*COMMANDS, ["clean"], ["run", "demo"]], ids=" ".join)
def test_a_root_open_to_all_is_refused_with_the_mend(
    command: list[str], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root.chmod(0o777)
    assert main([*command, "--root", str(root)]) == 2
    assert "open to all), and what lies here would be executed as you; look at what it holds, then close it: " in (
        capsys.readouterr().err
    )
    root.chmod(0o755)
    assert main(["status", "run", "--root", str(root)]) == 0, "the mend helps"


def test_a_folder_inside_that_is_open_to_all_is_refused_where_others_can_come(root: Path) -> None:
    (root / "runs").chmod(0o777)
    with pytest.raises(UserError, match=f"{root}/runs: everybody may write here"):
        store.refuse_foreign(root)
    root.chmod(0o700)
    store.refuse_foreign(root)


def test_a_root_by_way_of_a_link_is_what_it_leads_to(root: Path) -> None:
    link = root.with_name("link")
    link.symlink_to(root)
    store.refuse_foreign(link)
    root.chmod(0o777)
    with pytest.raises(UserError, match="everybody may write here"):
        store.refuse_foreign(link)


def test_a_folder_elsewhere_that_a_link_leads_to_is_looked_at_too(root: Path) -> None:
    (root / "runs").rename(root.with_name("elsewhere"))
    (root / "runs").symlink_to(root.with_name("elsewhere"))
    store.refuse_foreign(root)
    root.with_name("elsewhere").chmod(0o777)
    with pytest.raises(UserError, match=f"{root}/runs: everybody may write here"):
        store.refuse_foreign(root)


@pytest.mark.parametrize("name", ["run.json", "stages", "stages/a", "stages/a/stage.json", "snapshot", "snapshot/d1"])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_what_a_run_executes_is_refused_where_everybody_may_write_it(
    command: list[str], name: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = root / "runs" / "run" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}") if path.suffix else path.mkdir()
    path.chmod(0o777)
    assert main([*command, "--root", str(root)]) == 2
    assert f"{path}: everybody may write here" in capsys.readouterr().err
    root.chmod(0o700)
    assert main(["status", "run", "--root", str(root)]) == 0, "nobody else comes here"


@needs_root
@pytest.mark.parametrize("name", ["runs", "runs/run", "runs/run/run.json"])
def test_what_somebody_else_put_into_a_root_is_refused(
    name: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.chown(root / name, 65534, -1)
    assert main(["resume", "run", "--root", str(root)]) == 2
    assert f"{root / name}: belongs to " in capsys.readouterr().err


@needs_root
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_root_of_somebody_else_is_refused(command: list[str], root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.chown(root, 65534, -1)
    assert main([*command, "--root", str(root)]) == 2
    assert f"{root}: belongs to " in capsys.readouterr().err


@needs_root
def test_a_root_that_is_shared_on_purpose_is_taken(root: Path) -> None:
    os.chown(root, 65534, 65534)
    root.chmod(0o2770)
    store.refuse_foreign(root)


def test_a_root_that_is_not_there_yet_is_no_trouble(tmp_path: Path) -> None:
    store.refuse_foreign(tmp_path / "none")
