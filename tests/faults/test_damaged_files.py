"""One damaged file of a run costs what it would have said, which is told, and no command."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher import store
from launcher.cli import main
from launcher.progress import METRICS, StageJob
from launcher.run_record import RunRecord, write_run
from launcher.spec import StageSpec, stage_text
from launcher.state import stage_states
from launcher.supervisor.processes import read_said
from tests.left_attempts import leave_attempt
from tests.supervisor.counting import CHECKOUT, Store, counting_run, counting_stage, counting_step

DEEP = b"[" * 100_000
JUNK = [
    b"",
    b"\xff\xfe\n",
    b"[1]\n",
    b"null\n",
    b'"\n',
    b"{}\n",
    DEEP,
    b'{"a":' * 100_000,
    b"1" * 5000,
    b"\0" * 4096,
]
BEATS = [
    b'{"step": 1}',
    b'{"time": 1e400, "step": 1}',
    b'{"time": NaN, "step": 1}',
    b'{"time": "now", "step": 1}',
    b'{"time": 12, "step": "1"}',
    b'{"time": 12, "step": null}',
    b'{"time": 12, "step": 1' + b"0" * 400 + b"}",
]
#: Damage to a part alone, beside which the rest stands.
PARTS = [
    b'{"time": 12, "step": 4, "total": "x", "figures": [1], "first": 7}',
    b'{"time": 12, "step": 4, "figures": {"tokens_per_s": "fast", "loss": [1], "big": 1' + b"0" * 400 + b"}}",
    b'{"time": 12, "step": 4, "figures": {"loss": "\\ud83d", "\\udc00": 1}, "first": {"step": 1}}',
]
STARTS = [
    b'{"event": "start"}\n',
    b'{"event": "start", "time": "noon"}\n',
    b'{"event": "start", "time": 1e300, "fingerprint": 7}\n',
    b'{"event": 7, "time": 3}\n',
]


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    """`a` failed, in its second attempt; `b` has not begun."""
    record = counting_run(("a", (), {}), ("b", ("a",), {}))
    write_run(tmp_path, record)
    spec = record.stages[0].spec
    store.write_atomic(store.stage_dir(tmp_path, "run", "a") / "stage.json", stage_text(spec))
    dead = replace(store.this_process(), start="1")
    for number in (1, 2):
        folder = leave_attempt(
            tmp_path, spec, f"local.{number}", 100 * number, 100 * number + 50, "crashed", (1, 4), dead
        )
        (folder / "count.0.log").write_text("words\n")
        (folder / "exit.count.0.json").write_text('{"class": "crashed", "message": "why"}')
    return record


def folder(root: Path) -> Path:
    return store.stage_dir(root, "run", "a") / "local.2"


def every_command(root: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Run what reads a run; returns what `status --json` says of stage `a`."""
    for command in (["status", "run"], ["logs", "run", "a"], ["clean", "--dry-run"], ["cancel", "run"]):
        assert main([*command, "--root", str(root)]) in (0, 1), command
    capsys.readouterr()
    assert main(["status", "run", "--json", "--root", str(root)]) == 0
    return dict(json.loads(capsys.readouterr().out)["stages"][0])


@pytest.mark.parametrize("damage", [*JUNK, *BEATS], ids=lambda d: str(d[:40]))
def test_a_damaged_heartbeat(
    tmp_path: Path, record: RunRecord, capsys: pytest.CaptureFixture[str], damage: bytes
) -> None:
    path = folder(tmp_path) / "heartbeat.count.0.json"
    path.write_bytes(damage)
    found = every_command(tmp_path, capsys)
    assert (found["state"], found["attempt"], found["step"]) == ("failed", "local.2", None)
    assert [str(path) in words for words in found["damage"]] == [True]
    (folder(tmp_path) / "heartbeat.count.1.json").write_text('{"time": 12, "step": 3}')
    assert every_command(tmp_path, capsys)["step"] == 3, "another rank's counts"


@pytest.mark.parametrize("damage", PARTS, ids=lambda d: str(d[:60]))
def test_a_heartbeat_of_which_a_part_is_damaged(
    tmp_path: Path, record: RunRecord, capsys: pytest.CaptureFixture[str], damage: bytes
) -> None:
    (folder(tmp_path) / "heartbeat.count.0.json").write_bytes(damage)
    assert every_command(tmp_path, capsys)["step"] == 4


@pytest.mark.parametrize("damage", [*JUNK[1:], *STARTS], ids=lambda d: str(d[:40]))
def test_damaged_events(tmp_path: Path, record: RunRecord, capsys: pytest.CaptureFixture[str], damage: bytes) -> None:
    """A whole file: its attempt counts no more. One line: it alone does not."""
    path = folder(tmp_path) / "events.jsonl"
    whole = path.read_bytes()
    path.write_bytes(damage)
    found = every_command(tmp_path, capsys)
    assert found["attempt"] == "local.1"
    assert any(str(path) in words for words in found["damage"]) or not damage.endswith(b"\n")
    start, end = whole.splitlines(keepends=True)
    path.write_bytes(start + damage.rstrip(b"\n") + b"\n" + end)
    found = every_command(tmp_path, capsys)
    assert (found["attempt"], found["exit_class"]) == ("local.2", "crashed")


@pytest.mark.parametrize("end", [{}, {"class": 7, "time": 9}, {"class": "crashed"}, {"class": "crashed", "time": []}])
def test_a_damaged_end_leaves_an_attempt_that_has_none(
    tmp_path: Path, record: RunRecord, capsys: pytest.CaptureFixture[str], end: dict[str, Any]
) -> None:
    path = folder(tmp_path) / "events.jsonl"
    start = path.read_text().splitlines()[0]
    path.write_text(f"{start}\n{json.dumps({'event': 'end', **end})}\n")
    found = every_command(tmp_path, capsys)
    assert (found["state"], found["attempt"]) == ("interrupted", "local.2")
    assert "its end cannot be read" in found["damage"][0]


def test_the_log_that_an_end_names_lies_in_its_folder(tmp_path: Path, record: RunRecord) -> None:
    path = folder(tmp_path) / "events.jsonl"
    start = path.read_text().splitlines()[0]
    end = {
        "event": "end",
        "time": 5,
        "class": "crashed",
        "log": "../../../../secret",
        "tail": "no list",
        "seconds": "x",
    }
    path.write_text(f"{start}\n{json.dumps(end)}\n")
    state = stage_states(tmp_path, record)[0]
    assert (state.state, state.log, state.tail, state.seconds) == ("failed", None, (), None)


def test_damage_is_shown_and_bounded(
    tmp_path: Path, record: RunRecord, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    spec = record.stages[0].spec
    for number in range(3, 60):
        leave_attempt(tmp_path, spec, f"local.{number}", number, number + 1, "crashed", (1, 2))
        (folder(tmp_path).with_name(f"local.{number}") / "heartbeat.count.0.json").write_text("[1]")
    assert main(["status", "run", "--root", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "heartbeat.count.0.json: is no heartbeat" in shown and "more" in shown
    assert shown.count("is no heartbeat") == 3
    damage = every_command(tmp_path, capsys)["damage"]
    assert len(damage) == 21 and damage[-1].endswith("stages/a: 37 more damaged files")


@pytest.mark.parametrize("damage", [*JUNK, b'{"class": 7}', b'{"class": []}', b'{"message": "no class"}'])
def test_a_damaged_exit_file_says_nothing(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "exit.count.0.json"
    path.write_bytes(damage)
    assert read_said(path) is None
    path.write_bytes(b'{"class": "crashed", "message": ["x"], "cpu_seconds": "1", "peak_memory_bytes": -1}')
    said = read_said(path)
    assert said is not None and (said.message, said.cpu_seconds, said.peak_memory_bytes) == ("", 0.0, 0.0)


@pytest.mark.parametrize("damage", [b"[1]", b"\xff", DEEP, b'{"seconds": "x", "peak_memory_bytes": [], "more": 1}'])
def test_damaged_counts_of_an_unfinished_artifact_cost_no_attempt(tmp_path: Path, damage: bytes) -> None:
    at, spec = Store(tmp_path), counting_stage(counting_step(until=2))
    partial = store.partial_dir(tmp_path, spec.artifact)
    partial.mkdir(parents=True)
    for name in ("cost.json", "record.json", store.RECEIPT):
        (partial / name).write_bytes(damage)
    assert at.run(spec) == 0, at.end(spec)
    receipt = store.read_receipt(tmp_path, spec.artifact)
    assert receipt is not None and receipt.record["steps"] == 2


@pytest.mark.parametrize("damage", [*JUNK[1:], b'{"schema": 1, "files": {"\\ud83d": [1, "x"]}}'])
def test_a_damaged_receipt_is_no_artifact(tmp_path: Path, damage: bytes) -> None:
    at, spec = Store(tmp_path), counting_stage(counting_step(until=2))
    folder = tmp_path / spec.artifact
    folder.mkdir(parents=True)
    (folder / store.RECEIPT).write_bytes(damage)
    assert store.read_receipt(tmp_path, spec.artifact) is None and store.receipts(tmp_path, "train") == []
    assert at.run(spec) == 0, at.end(spec)


@pytest.mark.parametrize(
    "change",
    [
        b"\xff\xfe",
        DEEP,
        b"[]",
        {"stage": "../../elsewhere"},
        {"run": ".."},
        {"fingerprint": "../../../x"},
        {"outputs": {"checkpoint": {"path": "artifacts/train/../../../x", "format": "megatron"}}},
        {"outputs": {"checkpoint": {"path": "/tmp/x", "format": "megatron"}}},
    ],
    ids=lambda c: str(c)[:40],
)
def test_a_damaged_stage_file_is_named_and_nothing_is_written(tmp_path: Path, change: bytes | dict[str, Any]) -> None:
    spec: StageSpec = counting_stage(counting_step(until=1))
    path = store.stage_dir(tmp_path, spec.run, spec.stage) / "stage.json"
    data = change if isinstance(change, bytes) else json.dumps({**json.loads(stage_text(spec)), **change}).encode()
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    before = sorted(tmp_path.rglob("*"))
    variables = {
        "PYTHONPATH": str(CHECKOUT),
        "PRISM_ROOT": str(tmp_path),
        "PRISM_ATTEMPT": str(path.parent),
        "PATH": "/bin",
    }
    command = [sys.executable, "-m", "launcher.supervisor", str(path)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr and str(path) in done.stderr, done.stderr
    assert len(done.stderr) < 3000 and sorted(tmp_path.rglob("*")) == before


def test_a_million_events_are_read_at_both_ends(
    tmp_path: Path, record: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 80 MB no more than two are held."""
    path = folder(tmp_path) / "events.jsonl"
    start, end = path.read_bytes().splitlines(keepends=True)
    line = b'{"time": 150, "event": "launched", "step": "count", "rank": 0, "argv": ["x"]}\n'
    path.write_bytes(start + line * 1_000_000 + end)
    read = []
    loads = json.loads
    monkeypatch.setattr("launcher.attempts.json.loads", lambda text: read.append(len(text)) or loads(text))
    state = stage_states(tmp_path, record)[0]
    assert (state.attempt, state.exit_class, state.damage) == ("local.2", "crashed", ())
    assert sum(read) < 3 << 20


def test_damaged_metrics_cost_their_own_lines(tmp_path: Path) -> None:
    job = StageJob(counting_stage(counting_step()), tmp_path, tmp_path, "count")
    for step in (1, 2, 3):
        job.metric(iteration=step, loss=1.0)
    path = job.workdir / METRICS
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(whole[0] + b"\xff\n[1]\n" + DEEP + b'\n{"iteration": "x"}\n' + b"".join(whole[1:]) + b'{"iter')
    assert [row["iteration"] for row in store.read_rows(path)] == [1, "x", 2, 3]
    job.truncate_metrics("iteration", 2)
    assert path.read_bytes() == b"".join(whole[:2])
