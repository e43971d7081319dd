"""Text of others that would steer a terminal or a spreadsheet: escape sequences, turned directions, formulas."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launcher import terminal
from launcher.cli import main
from launcher.interpreter import module_command, module_environment
from launcher.report import markup
from launcher.report.write import _write_csv
from launcher.run_record import write_run
from launcher.terminal import plain, plain_output
from tests.left_attempts import leave_attempt
from tests.supervisor.counting import counting_run

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp\x7f\x08done"
STEERING = ("\x1b", "\x07", "\x9b", "\u202e", "\x7f", "\x08")


def steers(text: str) -> bool:
    return any(character in text for character in STEERING)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run that failed, and whose worker had much to say."""
    record = replace(counting_run(("a", (), {})), cluster="local")
    root = tmp_path / "root"
    root.mkdir(mode=0o700)
    write_run(root, record)
    end = {"message": f"cannot go on {HOSTILE}", "action": "stop"}
    folder = leave_attempt(root, record.stages[0].spec, "local.1", 10.0, 20.0, "crashed", **end)
    (folder / "count.0.log").write_text(f"first\r 50 %\r100 %\r\nlast {HOSTILE}\n")
    return root


@pytest.mark.parametrize("command", ["status", "watch", "logs", "status --json", "watch --json"])
def test_what_a_worker_says_steers_no_terminal(command: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*command.split(), "--root", str(root)])
    out, err = capsys.readouterr()
    assert not steers(out + err)
    assert "\\x1b" in out + err or "\\u001b" in out, "it is shown as what it is"


def test_a_terminal_is_shown_no_more_than_a_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    for command in ("status", "watch"):
        shown = Terminal()
        monkeypatch.setattr(sys, "stdout", shown)
        main([command, "run", "--root", str(root)])
        assert "\x1b[" in shown.getvalue(), "what we draw has colours"
        assert "\x1b]0;owned" not in shown.getvalue() and "\x1b[2J" not in shown.getvalue()
        assert not any(c in shown.getvalue() for c in ("\x9b", "\u202e", "\x7f"))


def test_logs_are_raw_where_that_is_asked_for(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["logs", "--root", str(root)])
    assert "first\n 50 %\n100 %\nlast \\x1b]0;owned" in capsys.readouterr().out
    main(["logs", "--raw", "--root", str(root)])
    assert f"last {HOSTILE}" in capsys.readouterr().out


def test_errors_and_the_keys_of_a_recipe_are_plain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text('"a\\e]0;owned\\a\\u202e": 1\nstages: {p: {kind: "x\\e[2J"}}\n')
    assert main(["check", str(tmp_path / "r.yaml")]) == 2
    assert main(["check", str(tmp_path / HOSTILE.replace("/", ""))]) == 2
    assert main(["status", HOSTILE, "--root", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert not steers(out + err) and "a\\x1b]0;owned" in err and "x\\x1b[2J" in err


@pytest.mark.parametrize("program", ["workers.weight_diff", "workers.cka", "convert"])
def test_what_programs_by_hand_say_of_names_is_plain(program: str, tmp_path: Path) -> None:
    folder = tmp_path / HOSTILE.replace("/", "")
    folder.mkdir()
    more = {"workers.cka": ("--texts", str(folder)), "convert": ("--to", "hf")}.get(program, ())
    words = module_command(f"launcher.{program}", str(folder), str(folder), *more)
    done = subprocess.run(words, env=module_environment(os.environ), capture_output=True, text=True)
    assert done.returncode == 2 and "\\x1b]0;owned" in done.stderr
    assert not steers(done.stdout + done.stderr)


def test_a_page_shows_no_text_in_another_direction() -> None:
    shown = markup.table("a\u202e", ["b\x9b"], [["c\u2066"]]) + markup.bullets(["d\x1b"])
    assert all(f"{piece}<" in shown for piece in ("a\\u202e", "b\\x9b", "c\\u2066", "d\\x1b"))


def test_names_that_are_not_utf_8_can_be_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tmp_path / "r\udcfc.yaml")]) == 2
    assert "r\\xfc.yaml: no such file" in capsys.readouterr().err


def test_text_in_words_stays_as_it_is() -> None:
    for text in ("plain", "Grüße, 日本, ½ × π\n\ttab", "e\u0301", ""):
        assert plain(text) == text
    assert plain("a\rb\r\nc\u2028d\ufeff") == "a\nb\nc\\u2028d\\ufeff"


def test_tables_are_drawn_by_the_one_console_alone() -> None:
    launcher = Path(terminal.__file__).parent
    users = [p.name for p in launcher.rglob("*.py") if " Console(" in p.read_text() or "=Console(" in p.read_text()]
    assert users == []


def test_markup_in_a_name_is_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    with plain_output():
        terminal.console().print("[/x] [bold]y[/bold] :smile:", highlight=False)
    assert capsys.readouterr().out == "[/x] [bold]y[/bold] :smile:\n"


FORMULAS = ("=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", " =1", "\n@x", "\uff1d1", "\tx")
NUMBERS = ("-1.5", "+3", "-1e-5", "1_0", "-inf", "text = x", "a@b")


def test_no_cell_begins_a_formula_and_numbers_stay_numbers(tmp_path: Path) -> None:
    import csv

    rows = [{"name": text, "value": -1.5, "n": -3, "=key": None} for text in (*FORMULAS, *NUMBERS, HOSTILE)]
    _write_csv(tmp_path / "t.csv", rows)
    text = (tmp_path / "t.csv").read_text()
    assert not steers(text)
    head, *cells = list(csv.reader(io.StringIO(text)))
    assert head == ["name", "value", "n", "'=key"]
    assert all(row[0].startswith("'") for row in cells[: len(FORMULAS)])
    assert [row[0] for row in cells[len(FORMULAS) : -1]] == list(NUMBERS)
    assert {tuple(row[1:]) for row in cells} == {("-1.5", "-3", "")}


def test_json_of_an_escape_is_an_escape(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["status", "--json", "--root", str(root)])
    assert HOSTILE in json.loads(capsys.readouterr().out)["stages"][0]["message"], "programs get what was said"
