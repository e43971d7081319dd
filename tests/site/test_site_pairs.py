"""Two ranks that meet: here as two threads and, for a file that is never seen, two folders."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from launcher.site import pairs


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port - 7))
    monkeypatch.setattr(pairs, "_SEND_S", 0.02)
    monkeypatch.setattr(pairs, "_MEET_S", 30.0)
    monkeypatch.setattr(pairs, "SEEN_WITHIN_S", 30.0)


def meet(folders: Sequence[Path]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{} for _ in folders]

    def rank(number: int) -> None:
        found[number] = pairs.meet(folders[number], number, len(folders))

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(len(folders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_files_and_network_of_three(tmp_path: Path) -> None:
    first, *others = meet([tmp_path] * 3)
    assert first == {"absent": []}
    for told in others:
        assert told["sees_first_after_s"] >= 0 and told["seen_by_first_after_s"] >= 0
        assert told["tcp_gbit_s"] > 0 and told["address"] == "127.0.0.1"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["from-0-for-1", "from-0-for-2", "from-1", "from-2"]


def test_files_that_the_other_never_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "SEEN_WITHIN_S", 0.2)
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    _, told = meet([here, there])
    assert told["sees_first_after_s"] is None and told["seen_by_first_after_s"] is None
    assert told["tcp_gbit_s"] > 0


def test_nobody_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "_MEET_S", 0.2)
    told = pairs.meet(tmp_path, 1, 2)
    assert "refused" in told["error"] and "127.0.0.1:" in told["error"]
    assert pairs.meet(tmp_path, 0, 1) == {}
