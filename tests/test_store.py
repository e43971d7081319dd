"""Receipts, claims and atomic writes: what counts as whole, who may make it, and what a crash leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launcher import store
from launcher.errors import UserError, WorldError
from launcher.store import Owner, Receipt

ARTIFACT = "artifacts/train/abc"


def unsealed(root: Path, text: str = "weights") -> Receipt:
    """An unfinished artifact with one file and something in progress, and the receipt it would get."""
    partial = store.partial_dir(root, ARTIFACT)
    (partial / "checkpoint").mkdir(parents=True)
    (partial / "checkpoint" / "file").write_text(text)
    (partial / "progress").mkdir()
    (partial / "progress" / "state").write_text("half")
    outputs = {"checkpoint": {"path": f"{ARTIFACT}/checkpoint", "format": "megatron"}}
    return Receipt(
        kind="train",
        kind_version=1,
        stage="base",
        run="run",
        fingerprint="abc",
        config={},
        seed=0,
        inputs={},
        outputs=outputs,
        files=store.list_files(partial),
    )


def test_a_sealed_artifact_is_whole_and_without_what_was_in_progress(tmp_path: Path) -> None:
    store.seal(tmp_path, ARTIFACT, unsealed(tmp_path))
    receipt = store.read_receipt(tmp_path, ARTIFACT)
    assert receipt is not None and set(receipt.files) == {"checkpoint/file"}
    assert sorted(p.name for p in (tmp_path / "artifacts" / "train").iterdir()) == ["abc"]
    assert not (tmp_path / ARTIFACT / "progress").exists()
    assert store.damaged_files(tmp_path, ARTIFACT, receipt) == []


@pytest.mark.parametrize("damage", ["cut", "gone", "schema", "json", "no receipt"])
def test_what_is_damaged_is_no_artifact(tmp_path: Path, damage: str) -> None:
    store.seal(tmp_path, ARTIFACT, unsealed(tmp_path))
    file, receipt = tmp_path / ARTIFACT / "checkpoint" / "file", tmp_path / ARTIFACT / store.RECEIPT
    if damage == "cut":
        file.write_text("weigh")
    elif damage == "gone":
        file.unlink()
    elif damage == "schema":
        receipt.write_text(receipt.read_text().replace('"schema": 1', '"schema": 2'))
    elif damage == "json":
        receipt.write_text(receipt.read_text()[:-20])
    else:
        receipt.unlink()
    assert store.read_receipt(tmp_path, ARTIFACT) is None


def test_a_changed_byte_of_the_same_size_is_found_by_checksum(tmp_path: Path) -> None:
    store.seal(tmp_path, ARTIFACT, unsealed(tmp_path))
    (tmp_path / ARTIFACT / "checkpoint" / "file").write_text("WEIGHTS")
    receipt = store.read_receipt(tmp_path, ARTIFACT)
    assert receipt is not None and store.damaged_files(tmp_path, ARTIFACT, receipt) == ["checkpoint/file"]


def test_sealing_over_a_whole_artifact_keeps_the_first(tmp_path: Path) -> None:
    store.seal(tmp_path, ARTIFACT, unsealed(tmp_path, "first"))
    store.seal(tmp_path, ARTIFACT, unsealed(tmp_path, "other"))
    assert (tmp_path / ARTIFACT / "checkpoint" / "file").read_text() == "first"
    assert not store.partial_dir(tmp_path, ARTIFACT).exists()


# ------------------------------------------------------------------------------------------------------------- claims


def test_a_claim_is_held_by_one_and_given_back(tmp_path: Path) -> None:
    folder, me = tmp_path / "x.claim", store.this_process()
    other = store.this_process(os.getppid())
    assert store.claim(folder, me) is None
    assert store.claim(folder, me) is None
    assert store.claim(folder, other) == me
    store.release(folder, other)
    assert store.claim_holder(folder) == me
    store.release(folder, me)
    assert store.claim(folder, other) is None


@pytest.mark.parametrize("change", [{"start": "1"}, {"boot": "another"}, {"pid": 2**22 + 1}])
def test_the_claim_of_the_dead_is_taken_over(tmp_path: Path, change: dict[str, object]) -> None:
    """A reused process id, a reboot, a process that is gone."""
    folder, me = tmp_path / "x.claim", store.this_process()
    assert store.claim(folder, replace(me, **change)) is None
    assert store.claim(folder, me) is None
    assert store.claim_holder(folder) == me
    assert [p.name for p in tmp_path.iterdir()] == ["x.claim"]


def test_a_claim_from_another_machine_counts_as_living(tmp_path: Path) -> None:
    folder = tmp_path / "x.claim"
    far = Owner("elsewhere", "boot", 1, "1")
    assert store.claim(folder, far) is None
    assert store.is_alive(far) is None
    assert store.claim(folder, store.this_process()) == far


def test_a_claim_taken_over_by_another_meanwhile_is_not_taken_again(
    tmp_path: Path,
) -> None:
    """Both see the claim of the dead; the other is quicker."""
    folder, me, other = tmp_path / "x.claim", store.this_process(), store.this_process(os.getppid())
    dead = replace(me, pid=2**22 + 1)
    assert store.claim(folder, dead) is None
    is_alive, looked = store.is_alive, []

    def quicker(owner: Owner) -> bool | None:
        answer = is_alive(owner)
        if owner == dead and not looked:
            looked.append(owner)
            assert store.claim(folder, other) is None
        return answer

    assert store.claim(folder, me, quicker) == other
    assert store.claim_holder(folder) == other
    assert [p.name for p in tmp_path.iterdir()] == ["x.claim"]


def test_what_cannot_be_claimed_is_not_taken_for_claimed(tmp_path: Path) -> None:
    (tmp_path / "x.claim").write_text("a file")
    with pytest.raises(WorldError, match="cannot be claimed"):
        store.claim(tmp_path / "x.claim", store.this_process())
    assert (tmp_path / "x.claim").read_text() == "a file"


CLAIMER = """
import sys, time
from pathlib import Path
from launcher import store
folder = Path(sys.argv[1])
while not (folder / "go").exists():
    time.sleep(0.001)
print("mine" if store.claim(folder / "x.claim", store.this_process()) is None else "not mine", flush=True)
sys.stdin.read()
"""


def test_of_many_that_claim_at_once_one_wins(tmp_path: Path) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", CLAIMER, str(tmp_path)], **pipes) for _ in range(6)]
    (tmp_path / "go").touch()
    answers = [p.stdout.readline().strip() for p in processes]
    for p in processes:
        p.communicate()
    assert sorted(answers) == ["mine"] + ["not mine"] * 5


# ------------------------------------------------------------------------------------------------------------- writes


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    store.write_json(path, {"a": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        store.write_json(path, {"a": 2})
    assert store.read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_attempts_never_share_a_folder(tmp_path: Path) -> None:
    names = [store.new_attempt(tmp_path / "stage").name for _ in range(3)]
    assert names == ["local.1", "local.2", "local.3"]
    names = [store.new_attempt(tmp_path / "stage", "77.0").name for _ in range(3)]
    assert names == ["77.0", "77.0.2", "77.0.3"]


def test_a_root_is_the_users_own(tmp_path: Path) -> None:
    root = store.open_root(tmp_path / "new" / "root")
    assert root.stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another with --root"):
        store.open_root(tmp_path / "file" / "root")
