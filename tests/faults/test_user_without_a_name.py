"""A user without a name is known by number, in every command."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.users import user_name

CHECKOUT = Path(__file__).resolve().parents[2]


def test_the_number_stands_for_a_name_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "somebody-else")
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    assert user_name() == "54321"


def test_nothing_asks_in_another_way() -> None:
    other = re.compile(r"getuser\(|getlogin\(|getpwuid\(|\.expanduser\(\)|Path\.home\(")
    lines = [
        f"{path.name}: {line.strip()}"
        for path in sorted((CHECKOUT / "launcher").rglob("*.py"))
        if path.name not in ("users.py", "prepare.py")  # prepare: a full path by then
        for line in path.read_text().splitlines()
        if other.search(line)
    ]
    assert lines == []


PROGRAM = """
import pwd, sys
def nobody(number):
    raise KeyError(f"getpwuid(): uid not found: {number}")
pwd.getpwuid = nobody
from launcher.cli import main
sys.exit(main())
"""


def test_commands_work_without_a_name(tmp_path: Path) -> None:
    """With an empty environment, where no passwd file knows the user."""
    recipe = "stages: {p: {kind: prepare, tokenizer: {vocab_size: 300}, sources: {t: {kind: files, path: '~/no'}}}}\n"
    (tmp_path / "r.yaml").write_text(recipe)
    for words in (["recipes"], ["check", "r.yaml"], ["run", "r.yaml", "--root", "root"], ["cluster", "list"]):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *words],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(CHECKOUT), "PYTHONDONTWRITEBYTECODE": "1"},
        )
        assert "Traceback" not in done.stderr and done.returncode in (0, 1, 2), done.stderr
