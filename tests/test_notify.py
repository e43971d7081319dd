"""The hook: what it is told, and that nothing it does can harm."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher import store
from launcher.attempts import attempts
from launcher.cluster import load_profile
from launcher.errors import UserError
from launcher.notify import notify, state_after
from launcher.run_record import write_run
from launcher.spec import StageSpec
from tests.supervisor.counting import CHECKOUT, Store, counting_run, counting_stage, counting_step

HOSTILE = 'line\n"quoted" $(touch pwned) `touch pwned`; touch pwned & ünïcode'


def hooked(program: str, *arguments: str, **changes: Any) -> StageSpec:
    """A stage whose hook is a Python program."""
    return counting_stage(counting_step(), notify=(sys.executable, "-c", program, *arguments), **changes)


def writer(path: Path) -> tuple[str, ...]:
    """A hook that appends what it hears, its arguments and variables, to a file."""
    return (
        "import json, os, sys; body = json.load(sys.stdin); body['argv'] = sys.argv[1:]; body['env'] = dict(os.environ)"
        f"; open({str(path)!r}, 'a').write(json.dumps(body) + '\\n')",
    )


def heard(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_it_hears_one_object_and_no_shell_sees_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = hooked(*writer(tmp_path / "heard"), HOSTILE, stage="a;touch pwned")
    said = notify(spec, "running", "failed", exit_class="diverged", message=HOSTILE, job="12", attempt="12.0")
    assert said is None
    (body,) = heard(tmp_path / "heard")
    assert body["argv"] == [HOSTILE] and body["message"] == HOSTILE
    keys = {"schema", "run", "stage", "kind", "fingerprint", "old_state", "new_state", "exit_class", "message"}
    assert keys | {"action", "attempt", "job", "time", "argv", "env"} == set(body)
    assert (body["schema"], body["stage"], body["new_state"]) == (1, "a;touch pwned", "failed")
    assert [p.name for p in tmp_path.iterdir()] == ["heard"]


def test_no_secret_reaches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_planted_secret")
    spec = hooked(*writer(tmp_path / "heard"), secrets=("HF_TOKEN", "NOT_SET"))
    notify(spec, "running", "failed", message="401 for hf_planted_secret; see its log")
    text = (tmp_path / "heard").read_text()
    assert "hf_planted" not in text and heard(tmp_path / "heard")[0]["message"] == "401 for (HF_TOKEN); see its log"


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("raise SystemExit('down')", "exit code 1: down"),
        ("import time; time.sleep(60)", "did not end within"),
        # It leaves a child that holds its streams: waiting for their end would take a minute.
        ("import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)", "did not end within"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "exit code -9"),
    ],
)
def test_a_hook_that_fails_or_hangs_is_a_line_of_text(program: str, words: str) -> None:
    said = notify(hooked(program), "queued", "running", limit_s=1.0)
    assert said is not None and words in said and said.startswith(sys.executable)


def test_a_hook_that_is_not_there_or_cannot_run_is_a_line_of_text(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("no program")
    for program, words in (("/no/such/hook", "No such file"), (str(tmp_path / "plain"), "Permission denied")):
        said = notify(replace(hooked(""), notify=(program,)), "queued", "running")
        assert said is not None and words in said


def test_a_hook_that_does_not_read_gets_as_much_as_there_is() -> None:
    assert notify(hooked("pass"), "running", "failed", message="x" * 1_000_000) is None


def test_without_a_hook_nothing_runs() -> None:
    assert notify(counting_stage(counting_step()), "queued", "running") is None


def test_states_after_the_exit_classes() -> None:
    found = {c: state_after(c) for c in ("finished", "cancelled", "time-limit", "diverged", "hang")}
    assert found == {
        "finished": "done", "cancelled": "stopped", "time-limit": "stopped", "diverged": "failed", "hang": "failed",
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------- by a supervisor


def changes(path: Path) -> list[tuple[str, str, str | None]]:
    return [(b["old_state"], b["new_state"], b["exit_class"]) for b in heard(path)]


def test_a_supervisor_tells_of_start_and_end(tmp_path: Path) -> None:
    on = Store(tmp_path / "root")
    spec = hooked(*writer(tmp_path / "heard"))
    assert on.run(spec) == 0
    assert changes(tmp_path / "heard") == [("waiting", "running", None), ("running", "done", "finished")]
    failing = counting_stage(counting_step(fail_at=2, fail="user"), notify=spec.notify, fingerprint="e" * 20)
    assert on.run(failing) == 2
    last = heard(tmp_path / "heard")[-1]
    assert (last["new_state"], last["exit_class"], last["attempt"]) == ("failed", "user-error", "local.2")
    assert last["message"] == "data.jsonl:3: not text; mend it" and last["action"] == "stop"


@pytest.mark.parametrize("program", ["raise SystemExit('down')", "import os; os.close(0); os.kill(os.getppid(), 0)"])
def test_a_failing_hook_leaves_the_work_alone(tmp_path: Path, program: str) -> None:
    on, spec = Store(tmp_path), hooked(program)
    assert on.run(spec) == 0
    assert store.read_receipt(tmp_path, spec.artifact) is not None
    troubles = [e["message"] for e in on.events(spec) if e["event"] == "notify"]
    assert len(troubles) == (2 if "down" in program else 0) and all("exit code 1: down" in t for t in troubles)


def test_a_hooks_trouble_does_not_hide_how_the_attempt_ended(tmp_path: Path) -> None:
    from launcher.attempts import newest_attempt

    on = Store(tmp_path)
    spec = replace(hooked("raise SystemExit('down')"), steps=(counting_step(fail_at=2, fail="diverge"),))
    on.run(spec)
    assert on.events(spec)[-1]["event"] == "notify"
    attempt = newest_attempt(tmp_path, spec)
    assert attempt is not None and attempt.end is not None and attempt.end.exit_class == "diverged"


def test_the_profile_takes_a_list_of_words_and_refuses_what_cannot_be_found_again(tmp_path: Path) -> None:
    profile = tmp_path / "mine.yaml"
    profile.write_text("scheduler: local\nnotify: [/usr/local/bin/tell, --channel, 'a b']\n")
    assert load_profile(str(profile)).notify == ("/usr/local/bin/tell", "--channel", "a b")
    for value, words in (("[./tell]", "give a full path"), ("tell me", "notify"), ("['']", "give a full path")):
        profile.write_text(f"scheduler: local\nnotify: {value}\n")
        with pytest.raises(UserError, match="mine.yaml:2") as caught:
            load_profile(str(profile))
        assert words in str(caught.value)


def test_the_profiles_hook_reaches_every_stage_and_no_fingerprint(tmp_path: Path) -> None:
    import argparse

    from launcher.commands.shared import records_of

    profile = tmp_path / "mine.yaml"
    args = argparse.Namespace(recipe="demo", overrides=[], name=None, cluster=str(profile))
    prints = []
    for text in ("", "notify: [tell]\n"):
        profile.write_text(f"scheduler: local\n{text}")
        (record,) = records_of(args, load_profile(str(profile)))
        prints.append([s.spec.fingerprint for s in record.stages])
        assert {s.spec.notify for s in record.stages} == {("tell",) if text else ()}
    assert prints[0] == prints[1]


DRIVER = """
import sys
from pathlib import Path
from launcher.local import run_local
from launcher.run_record import read_run
sys.exit(run_local(Path(sys.argv[1]), read_run(Path(sys.argv[1]), "run"), 2, as_json=True))
"""


def test_locally_the_driver_tells_of_a_supervisor_that_was_killed(tmp_path: Path) -> None:
    """And follows in JSON lines, of which nothing else stands between."""
    on = Store(tmp_path / "root")
    record = counting_run(("a", (), {"until": 60, "sleep": 0.05}))
    notify = (sys.executable, "-c", *writer(tmp_path / "heard"))
    record = replace(record, stages=(replace(record.stages[0], spec=replace(record.stages[0].spec, notify=notify)),))
    write_run(on.root, record)
    command, env = [sys.executable, "-c", DRIVER, str(on.root)], {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as driver:
        on.wait_for(lambda: attempts(on.root, "run", "a") and on.step_reached(record.stages[0].spec, 3))
        on.wait_for(lambda: len(heard(tmp_path / "heard")) == 1)
        ((attempt, _),) = attempts(on.root, "run", "a")
        assert attempt.owner is not None
        os.kill(attempt.owner.pid, signal.SIGKILL)
        out, _ = driver.communicate(timeout=60)
    assert driver.returncode == 0
    told = [(b["old_state"], b["new_state"], b["attempt"]) for b in heard(tmp_path / "heard")]
    assert told == [
        ("waiting", "running", "local.1"),
        ("running", "interrupted", "local.1"),
        ("waiting", "running", "local.2"),
        ("running", "done", "local.2"),
    ]
    lines = [json.loads(line) for line in out.splitlines()]
    assert {line["event"] for line in lines} == {"stage", "end"} and lines[-1]["state"] == "done"
