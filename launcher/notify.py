"""The hook: a command that is told of a change of state, as JSON on its standard input. Standard library only.

It runs without a shell, for a few seconds at most, and can do no harm: whatever becomes of it, the work goes on.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from launcher.spec import StageSpec

#: Seconds after which the hook is killed.
LIMIT_S = 10.0
#: Characters of a message at most.
_MOST = 4000
SCHEMA = 1


def state_after(exit_class: str) -> str:
    """The state of a stage whose attempt ended like this and gets no other."""
    return {"finished": "done", "cancelled": "stopped", "time-limit": "stopped"}.get(exit_class, "failed")


def notify(spec: StageSpec, old: str, new: str, limit_s: float = LIMIT_S, **facts: Any) -> str | None:
    """Tell the stage's hook that the stage went from state `old` to `new`; returns what went wrong, if anything did.

    `facts` are exit_class, message, action, attempt and job as far as they are known.
    """
    if not spec.notify:
        return None
    secrets = {name: os.environ[name] for name in spec.secrets if os.environ.get(name)}
    text = json.dumps(_body(spec, old, new, facts, secrets)) + "\n"
    try:
        said = _run(spec.notify, text, {k: v for k, v in os.environ.items() if k not in secrets}, limit_s)
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or str(error)
    return f"{spec.notify[0]}: {said}" if said else None


def _run(argv: Sequence[str], text: str, environment: Mapping[str, str], limit_s: float) -> str:
    """Run the hook; returns what went wrong. Files, not pipes: what it leaves behind may hold a pipe open for ever."""
    with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile("w+", errors="replace") as said:
        given.write(text)
        given.seek(0)
        child = subprocess.Popen(
            argv, stdin=given, stdout=subprocess.DEVNULL, stderr=said, env=environment, start_new_session=True
        )
        try:
            code = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            return f"did not end within {limit_s:.0f} s"
        said.seek(0)
        words = said.read(10_000).strip().splitlines()
    return f"exit code {code}{': ' + words[-1] if words else ''}" if code else ""


def _body(spec: StageSpec, old: str, new: str, facts: Mapping[str, Any], secrets: Mapping[str, str]) -> dict[str, Any]:
    known = dict.fromkeys(("exit_class", "message", "action", "attempt", "job")) | dict(facts)
    known["message"] = _without(secrets, str(known["message"] or ""))[:_MOST]
    names = {"run": spec.run, "stage": spec.stage, "kind": spec.kind, "fingerprint": spec.fingerprint}
    return {"schema": SCHEMA, **names, "old_state": old, "new_state": new, **known, "time": time.time()}


def _without(secrets: Mapping[str, str], text: str) -> str:
    """A worker's last words may quote what it was given."""
    for name, value in secrets.items():
        text = text.replace(value, f"({name})")
    return text
