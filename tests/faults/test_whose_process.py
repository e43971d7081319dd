"""A process is believed in, or signalled, by its id, start, boot and host together; where that cannot be told, not."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launcher import store
from launcher.clean import uses
from launcher.errors import UserError
from launcher.local import cancel_run, stop_owners
from launcher.run_record import claimed, write_run
from launcher.state import stage_states
from launcher.store import Owner, claims
from tests.left_attempts import leave_attempt
from tests.supervisor.counting import counting_run


@pytest.fixture
def stranger() -> subprocess.Popen[bytes]:
    """A process that has nothing to do with a run, and got the id of one that had."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield child
    child.kill()
    child.wait()


@pytest.mark.parametrize("change", [{"start": "1"}, {"start": ""}, {"boot": "another"}])
def test_an_id_that_was_given_out_again_is_neither_believed_nor_signalled(
    tmp_path: Path, stranger: subprocess.Popen[bytes], change: dict[str, str]
) -> None:
    owner = replace(store.this_process(stranger.pid), **change)
    record = counting_run(("a", (), {}))
    write_run(tmp_path, record)
    leave_attempt(tmp_path, record.stages[0].spec, "local.1", 100, steps=(1, 3), owner=owner)
    store.claim(store.driver_claim(tmp_path, "run"), owner)
    assert store.is_alive(owner) is False
    assert stage_states(tmp_path, record)[0].state == "interrupted"
    assert uses(tmp_path, {"run": set()}, set()).busy == set()
    assert cancel_run(tmp_path, record) == []
    stop_owners([owner])
    assert stranger.poll() is None
    with claimed(tmp_path, "run"):
        pass


@pytest.mark.parametrize("pid", [0, -1, 1 << 40, 10**30])
def test_an_id_that_is_none_is_nobodys(tmp_path: Path, pid: int) -> None:
    owner = replace(store.this_process(), pid=pid)
    assert store.is_alive(owner) is False
    stop_owners([owner])


@pytest.fixture
def no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where /proc is not mounted; the system's other calls say what they say."""
    for name, nothing in (("process_start", None), ("_boot_id", ""), ("_pid_namespace", "")):
        monkeypatch.setattr(claims, name, lambda *_, nothing=nothing: nothing)


@pytest.mark.usefixtures("no_proc")
def test_without_proc_a_run_is_not_driven_twice(tmp_path: Path, stranger: subprocess.Popen[bytes]) -> None:
    driver = store.this_process(stranger.pid)
    assert driver.start == driver.boot == ""
    claim = store.driver_claim(tmp_path, "run")
    assert store.claim(claim, driver) is None
    assert store.claim(claim, store.this_process()) == driver, "it may live"
    with pytest.raises(UserError, match="run"), claimed(tmp_path, "run", patience_s=0.0):
        pass
    stranger.kill()
    stranger.wait()
    assert store.claim(claim, store.this_process()) is None, "nothing has its id"


def test_what_saw_no_proc_is_not_judged_by_one_who_sees_it(tmp_path: Path) -> None:
    """Ids may be of another namespace: nobody can tell."""
    assert store.is_alive(Owner(store.this_process().host, "", os.getpid(), "")) is None


@pytest.mark.usefixtures("no_proc")
def test_who_sees_no_proc_does_not_judge_what_did(tmp_path: Path) -> None:
    for pid in (os.getpid(), 2**22 + 1):
        assert store.is_alive(Owner(store.this_process().host, "boot", pid, "77")) is None


def test_a_full_disk_leaves_no_half_a_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space"):
            store.claim(tmp_path / "x.claim", store.this_process())
    assert list(tmp_path.iterdir()) == []
