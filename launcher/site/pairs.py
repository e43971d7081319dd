"""Two tasks on two nodes meet over TCP: is a file that one writes seen by the other, when, and how fast is the network.

Rank 0 listens at MASTER_ADDR and takes the others one after another. The delay is measured by the reader's own clock,
from the moment at which the writer says over the network that the file is whole. Standard library only.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from launcher import store

Lines = io.BufferedRWPair
#: Longer than the 60 s for which NFS may remember that a name is absent.
SEEN_WITHIN_S = 90.0
_MEET_S = 60.0
_SEND_S = 1.0


def meet(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    """What this rank found; the others' side of the files is told by rank 0. Nothing where there is one rank."""
    if ranks == 1:
        return {}
    # Torch's rendezvous has MASTER_PORT itself.
    place = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]) + 7)
    try:
        return _receive_all(folder, place, ranks) if rank == 0 else _call(folder, place, rank)
    except (OSError, ValueError) as error:
        return {"error": f"{place[0]}:{place[1]}: {error}"}


def _receive_all(folder: Path, place: tuple[str, int], ranks: int) -> dict[str, Any]:
    absent = set(range(1, ranks))
    with socket.create_server(("", place[1]), backlog=ranks) as server:
        server.settimeout(_MEET_S + 10)
        for _ in range(1, ranks):
            connection, _ = server.accept()
            with connection, _lines(connection) as peer:
                rank = int(_hear(peer)["rank"])
                _write_mark(folder, f"from-0-for-{rank}", peer)
                _say(peer, delay_s=_await_mark(folder, f"from-{rank}", peer))
                _send(connection)
                absent.discard(rank)
    return {"absent": sorted(absent)}


def _call(folder: Path, place: tuple[str, int], rank: int) -> dict[str, Any]:
    with _connect(place) as connection, _lines(connection) as peer:
        _say(peer, rank=rank)
        seen = _await_mark(folder, f"from-0-for-{rank}", peer)
        _write_mark(folder, f"from-{rank}", peer)
        seen_by_first = _hear(peer)["delay_s"]
        gbit = _receive(peer)
        return {
            "sees_first_after_s": seen,
            "seen_by_first_after_s": seen_by_first,
            "tcp_gbit_s": gbit,
            "address": connection.getsockname()[0],
        }


def _connect(place: tuple[str, int]) -> socket.socket:
    """The first rank may be later than this one."""
    end = time.monotonic() + _MEET_S
    while True:
        try:
            connection = socket.create_connection(place, timeout=5)
            connection.settimeout(SEEN_WITHIN_S + 30)
            return connection
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


# --------------------------------------------------------------------------------------------------------------- files


def _await_mark(folder: Path, name: str, peer: Lines) -> float | None:
    """Ask for a file and wait until it is seen here; seconds since it was whole there, None if it never was."""
    os.listdir(folder)  # this node now knows, and may remember, that the name is absent
    (folder / name).exists()
    _say(peer, please=name)
    _hear(peer)
    began = time.monotonic()
    while time.monotonic() - began < SEEN_WITHIN_S:
        with contextlib.suppress(OSError):
            if (folder / name).read_text(encoding="utf-8") == name:
                return time.monotonic() - began
        time.sleep(0.01)
    return None


def _write_mark(folder: Path, name: str, peer: Lines) -> None:
    _hear(peer)
    error = ""
    try:
        store.write_atomic(folder / name, name)
    except OSError as failed:
        error = str(failed)
    _say(peer, error=error)


# ------------------------------------------------------------------------------------------------------------- network


def _lines(connection: socket.socket) -> Lines:
    return connection.makefile("rwb")


def _say(peer: Lines, **what: Any) -> None:
    peer.write(json.dumps(what).encode() + b"\n")
    peer.flush()


def _hear(peer: Lines) -> dict[str, Any]:
    line = peer.readline()
    if not line:
        raise ConnectionError("the other node has gone")
    value: dict[str, Any] = json.loads(line)
    return value


def _send(connection: socket.socket) -> None:
    chunk = bytes(2**20)
    end = time.monotonic() + _SEND_S
    while time.monotonic() < end:
        connection.sendall(chunk)
    connection.shutdown(socket.SHUT_WR)


def _receive(peer: Lines) -> float:
    """Gbit/s of one stream."""
    began, count = time.monotonic(), 0
    while got := len(peer.read(2**20)):
        count += got
    return count * 8 / 1e9 / (time.monotonic() - began)
