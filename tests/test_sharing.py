"""A store that a group shares: what one user makes, another may go on with; without a group nobody else may look."""

from __future__ import annotations

import grp
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher import store
from launcher.errors import UserError

CHECKOUT = Path(__file__).resolve().parents[1]
#: Two users of every Linux, and a group of the second that the first is put in.
ONE, TWO, GROUP = 65534, 2, 2

_ONE = """
root = store.open_root(Path(sys.argv[1]), sys.argv[2])
store.write_json(store.run_dir(root, "run") / "run.json", {"by": "one"})
with (store.run_dir(root, "run") / "jobs.jsonl").open("a") as file:
    file.write("one\\n")
store.working_path(root, "artifacts/train/f", "artifacts/train/f/checkpoint").mkdir(parents=True)
(store.partial_dir(root, "artifacts/train/f") / "checkpoint" / "weights").write_text("half")
with claimed(root, "run"):
    print("claimed", flush=True)
    sys.stdin.readline()
print("released", flush=True)
"""
_TWO = """
root = store.open_root(Path(sys.argv[1]), sys.argv[2])
holder = store.claim_holder(store.driver_claim(root, "run"))
print("alive", store.is_alive(holder))
try:
    with claimed(root, "run"):
        print("stolen")
except UserError as error:
    print(f"process {holder.pid} on" in str(error))
sys.stdout.flush()
sys.stdin.readline()
with claimed(root, "run"):
    store.write_json(store.run_dir(root, "run") / "run.json", {"by": "two"})
    with (store.run_dir(root, "run") / "jobs.jsonl").open("a") as file:
        file.write("two\\n")
    weights = store.partial_dir(root, "artifacts/train/f") / "checkpoint" / "weights"
    weights.write_text(weights.read_text() + " and half")
    files = store.list_files(store.partial_dir(root, "artifacts/train/f"))
    receipt = store.Receipt("train", 1, "a", "run", "f", {}, 0, {}, {}, files)
    store.seal(root, "artifacts/train/f", receipt)
print("sealed")
"""


#: Imports all that is needed while it may still read it, then is another user for good.
_BECOME = """
import grp, json, os, pwd, sys, tempfile
from pathlib import Path
from launcher import run_record, spec, store
from launcher.errors import UserError
from launcher.run_record import claimed
user, group = int(sys.argv.pop()), int(sys.argv.pop())
os.umask(0o022)
os.setgroups([group])
os.setgid(user)
os.setuid(user)
os.chdir("/")
"""


def as_user(user: int, program: str, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _BECOME + program, *args, str(GROUP), str(user)],
        env={"PYTHONPATH": str(CHECKOUT), "PATH": os.environ["PATH"]},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture
def common() -> Iterator[Path]:
    """A folder that the group may write in; pytest's own are closed to others."""
    if os.geteuid() != 0:
        pytest.skip("only root can act as two users")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o711)
        place = Path(folder, "common")
        place.mkdir()
        os.chown(place, 0, GROUP)
        place.chmod(0o2775)
        yield place


def test_two_users_go_on_with_each_others_work(common: Path) -> None:
    root, group = str(common / "root"), grp.getgrgid(GROUP).gr_name
    one = as_user(ONE, _ONE, root, group)
    assert one.stdin and one.stdout
    assert one.stdout.readline() == "claimed\n", one.communicate()[1]
    two = as_user(TWO, _TWO, root, group)
    assert two.stdin and two.stdout
    told = [two.stdout.readline() for _ in range(2)]
    assert told == ["alive True\n", "True\n"], told or two.communicate()[1]
    assert one.communicate("go\n", timeout=30)[0] == "released\n"
    out, err = two.communicate("go\n", timeout=30)
    assert (out, err) == ("sealed\n", "")
    assert (Path(root) / "runs/run/jobs.jsonl").read_text() == "one\ntwo\n"
    assert (Path(root) / "artifacts/train/f/checkpoint/weights").read_text() == "half and half"
    for path in (Path(root), *Path(root).rglob("*")):
        mode, gid = path.stat().st_mode, path.stat().st_gid
        wanted = 0o2770 if path.is_dir() else 0o660
        assert (oct(stat.S_IMODE(mode)), gid) == (oct(wanted), GROUP), path


def test_without_a_group_nobody_else_may_look(tmp_path: Path) -> None:
    root = store.open_root(tmp_path / "root")
    store.write_json(root / "runs" / "run" / "run.json", {})
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    assert stat.S_IMODE((root / "runs" / "run" / "run.json").stat().st_mode) == 0o600
    assert not store.is_shared(root)


def test_a_store_that_is_private_is_not_opened_by_the_way(tmp_path: Path) -> None:
    root = store.open_root(tmp_path / "root")
    (root / "runs").mkdir()
    group = grp.getgrgid(os.getegid()).gr_name
    with pytest.raises(UserError, match="not shared with the profile's share_group; share it with: chgrp -R"):
        store.open_root(root, group)
    with pytest.raises(UserError, match="there is no group nobody-has-this"):
        store.open_root(tmp_path / "other", "nobody-has-this")


def test_a_hidden_process_of_another_user_counts_as_one_that_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc mounted with hidepid shows nothing of it; the kernel still says that it is there."""
    owner = store.this_process()
    exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda p: not str(p).startswith("/proc/") and exists(p))

    def kill(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    assert store.is_alive(owner) is None
    monkeypatch.undo()
    assert store.is_alive(owner) is True
