"""Terminals and locales without UTF-8: characters that they lack, and files whose encoding was left to them."""

from __future__ import annotations

import ast
import hashlib
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.cli import main
from launcher.interpreter import module_command
from tests.report.report_run import make_run, plan_run

LAUNCHER = Path(__file__).resolve().parents[2] / "launcher"
POSIX = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
TERMINALS = {"latin-1": {"PYTHONIOENCODING": "latin-1"}, "ascii": {"PYTHONIOENCODING": "ascii"}, "POSIX": POSIX}


def prism(*words: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, **variables, "COLUMNS": "60"}
    return subprocess.run(module_command("launcher.cli", *words), cwd=cwd, env=environment, capture_output=True)


@pytest.mark.parametrize("terminal", TERMINALS)
@pytest.mark.parametrize(
    "command",
    [
        "recipes",
        "backends",
        "fit llama-3.1-8b --gpus 8",
        "plan demo",
        "plan prism/llama-3.1-8b --cluster example-pyxis",
        "cluster list",
        "doctor",
        "--help",
        "fit --help",
        "check grün.yaml",
        "check Grüße-→.yaml",
    ],
)
def test_no_terminal_is_too_small_for_words(command: str, terminal: str, tmp_path: Path) -> None:
    recipe = 'description: "→ × …"\nbase: demo\n'
    (tmp_path / "grün.yaml").write_text(recipe, encoding="utf-8")
    (tmp_path / "Grüße-→.yaml").write_text(recipe, encoding="utf-8")
    done = prism(*command.split(), cwd=tmp_path, **TERMINALS[terminal])
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr and done.stdout
    done.stdout.decode("latin-1" if terminal == "latin-1" else "ascii")


def test_what_a_terminal_lacks_is_shown_as_what_it_is_like(tmp_path: Path) -> None:
    shown = prism("fit", "llama-3.1-8b", "--gpus", "8", cwd=tmp_path, PYTHONIOENCODING="ascii").stdout.decode("ascii")
    assert "8 x h100-80gb" in shown and "#" in shown and "?" not in shown and "\\u" not in shown
    shown = prism("check", "grün.yaml", cwd=tmp_path, PYTHONIOENCODING="ascii").stderr.decode("ascii")
    assert "gr\\xfcn.yaml: no such file" in shown


@pytest.mark.parametrize("locale", [{}, POSIX], ids=["utf-8", "POSIX"])
def test_a_name_is_the_same_run_under_every_locale(locale: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "grün.yaml").write_text("base: demo\nname: null\n", encoding="utf-8")
    done = prism("check", "grün.yaml", cwd=tmp_path, **locale)
    digest = hashlib.sha256("grün".encode()).hexdigest()[:8]
    assert f": run gr_n-{digest}: 9 stages".encode() in done.stdout


@pytest.mark.parametrize("terminal", TERMINALS)
def test_a_report_is_written_under_every_locale(terminal: str, tmp_path: Path) -> None:
    record = replace(plan_run(), recipe=str(tmp_path / "grün.yaml"))
    make_run(tmp_path / "root", record)
    (tmp_path / "root").chmod(0o700)
    done = prism("report", "demo", "--root", "root", cwd=tmp_path, **TERMINALS[terminal])
    assert done.returncode == 0 and b"+-" in done.stdout + b"+-" * (terminal == "latin-1"), done.stderr
    page = (tmp_path / "root" / "runs" / "demo" / "report" / "report.html").read_text(encoding="utf-8")
    assert "\u00b1" in page


def test_a_terminal_that_is_not_there_is_no_error(tmp_path: Path) -> None:
    command = f"{' '.join(module_command('launcher.cli'))} recipes >&- 2>&-"
    assert subprocess.run(["bash", "-c", command], cwd=tmp_path, check=False).returncode == 0


# ---------------------------------------------------------------------------------------------------------- the code


def names_no_encoding(call: ast.Call) -> bool:
    """Whether a call opens text in the encoding of the locale."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if "encoding" in given or None in given:
        return False
    if isinstance(call.func, ast.Attribute) and name in ("read_text", "write_text"):
        return len(call.args) <= (name == "write_text")
    if isinstance(call.func, ast.Attribute) and name == "open":
        foreign = ast.unparse(call.func.value) in ("os", "tarfile", "archive")
        return not foreign and is_text(call.args[:1], given)
    if name in ("open", "fdopen"):
        return is_text(call.args[1:2], given)
    return name in ("run", "Popen", "check_output") and any(key in given for key in ("text", "universal_newlines"))


def is_text(mode: list[ast.expr], given: dict[str | None, Any]) -> bool:
    value = given.get("mode", mode[0] if mode else None)
    return value is None or "b" not in ast.unparse(value)


def test_every_file_and_every_program_is_read_and_written_in_a_named_encoding() -> None:
    found = [
        f"{path.relative_to(LAUNCHER)}:{call.lineno}"
        for path in sorted(LAUNCHER.rglob("*.py"))
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and names_no_encoding(call)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("code", "is_one"),
    [
        ("path.read_text()", True),
        ("path.write_text('x')", True),
        ("path.open('a')", True),
        ("open(path)", True),
        ("os.fdopen(1, 'w')", True),
        ("subprocess.run(x, text=True)", True),
        ("path.open('rb')", False),
        ("open(path, mode='xb')", False),
        ("os.open(path, 1)", False),
        ("path.write_text('x', encoding='utf-8')", False),
        ("subprocess.run(x, capture_output=True)", False),
    ],
)
def test_the_search_knows_what_it_looks_for(code: str, is_one: bool) -> None:
    (call,) = (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call))
    assert names_no_encoding(call) == is_one


def test_main_leaves_the_streams_as_they_were(capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    before = sys.stdout, sys.stderr
    assert main(["recipes", "--json"]) == 0
    assert (sys.stdout, sys.stderr) == before
