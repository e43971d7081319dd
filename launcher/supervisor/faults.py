"""What a rank's last words say of the machine under it: faults of a GPU, and errors that are another rank's. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

#: node: leave the node out. suspect: leave it out when it happens there again. innocent: another life is enough.
Blame = Literal["node", "suspect", "innocent"]


@dataclass(frozen=True)
class GpuFault:
    """A fault of a GPU or of the links between GPUs: the line that tells of it, and whether its node is to blame."""

    line: str
    blame: Blame


#: NVIDIA's Xid numbers by what they ask for (its Xid catalogue). 13, 31, 126 are the program's own faults, and 43, 63,
#: 92, 121 say nothing alone: all of these stand in no row.
_XID: dict[Blame, frozenset[int]] = {
    "node": frozenset({48, 54, 64, 74, 79, 95, 119, 120, 140, *range(144, 152)}),
    "innocent": frozenset({94}),  # a contained memory error: the GPU goes on, the program is lost
}
_XID_LINE = re.compile(r"\bXid\s*(?:\([^)]*\))?\s*:?\s*(\d+)\b")
_TIMED_OUT = "watchdog caught collective operation timeout"
#: The words of CUDA's, NCCL's and PyTorch's messages, in lower case.
_WORDS: dict[Blame, tuple[str, ...]] = {
    "node": (
        "device(s) is/are busy or unavailable",
        "no cuda-capable device is detected",
        "cannot use cuda",
        "fallen off the bus",
        "uncorrectable ecc error",
        "uncorrectable nvlink error",
        "sxid",
    ),
    "suspect": (_TIMED_OUT, "nccl watchdog thread terminated", "process group watchdog thread terminated", "ibv_"),
}
_PEER_LOST = (
    "connection reset by peer",
    "connection closed by peer",
    "connection closed by remote",
    "connection refused",
    "broken pipe",
    "ncclremoteerror",
    "remote process exited or there was a network error",
    "nccl communicator was aborted",
    "socket timeout",
)


def gpu_fault(text: str) -> GpuFault | None:
    """The fault of a GPU that a rank's log or message tells of, the worst where it tells of several."""
    found = [fault for line in text.splitlines() if (fault := _fault_in(line)) is not None]
    order: tuple[Blame, ...] = ("node", "suspect", "innocent")
    return min(found, key=lambda fault: order.index(fault.blame), default=None)


def _fault_in(line: str) -> GpuFault | None:
    number = _XID_LINE.search(line)
    if number:
        xid = int(number[1])
        return next((GpuFault(line.strip(), blame) for blame, known in _XID.items() if xid in known), None)
    lower = line.lower()
    found = (blame for blame, words in _WORDS.items() if any(word in lower for word in words))
    return next((GpuFault(line.strip(), blame) for blame in found), None)


def waited_in_vain(text: str) -> bool:
    """Whether a log or message tells that a rank's collective timed out: the others' ends may say why."""
    return _TIMED_OUT in text.lower()


def is_peers_fault(text: str) -> bool:
    """Whether a message speaks of a lost connection to another rank, whose own end is the cause."""
    return any(words in text.lower() for words in _PEER_LOST)
