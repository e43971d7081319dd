"""Words of GPUs and networks in a dying rank's log. The lines are as NVIDIA's driver, CUDA and PyTorch write them."""

from __future__ import annotations

import pytest

from launcher.supervisor.faults import gpu_fault, is_peers_fault


@pytest.mark.parametrize(
    ("line", "blame"),
    [
        ("NVRM: Xid (PCI:0000:41:00): 79, pid=1234, GPU has fallen off the bus.", "node"),
        ("kernel: NVRM: Xid (PCI:0000:cb:00): 48, pid='<unknown>', An uncorrectable double bit error", "node"),
        ("Xid 95", "node"),
        ("NVRM: Xid (PCI:0000:41:00): 145, RLW_REMAP", "node"),
        ("NVRM: Xid (PCI:0000:41:00): 94, Contained: SM (0x1).", "innocent"),
        ("RuntimeError: CUDA error: CUDA-capable device(s) is/are busy or unavailable", "node"),
        ("torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered", "node"),
        ("RuntimeError: No CUDA-capable device is detected", "node"),
        ("[E ProcessGroupNCCL.cpp:616] [Rank 3] Watchdog caught collective operation timeout: WorkNCCL(", "suspect"),
        ("[PG 0 Rank 3] Process group watchdog thread terminated with exception: CUDA error", "suspect"),
        ("NVRM: Xid (PCI:0000:41:00): 13, pid=1234, Graphics SM Warp Exception", None),
        ("NVRM: Xid (PCI:0000:41:00): 31, pid=1234, MMU Fault", None),
        ("NVRM: Xid (PCI:0000:41:00): 43, pid=1234, channel 00000010", None),
        ("NVRM: Xid (PCI:0000:41:00): 63, Row Remapper", None),
        ("RuntimeError: CUDA error: an illegal memory access was encountered", None),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", None),
        ("loaded 48 shards, 79 files", None),
    ],
)
def test_who_is_to_blame(line: str, blame: str | None) -> None:
    found = gpu_fault(f"step 7 of 9\n  {line}\nTraceback (most recent call last):")
    assert (found and found.blame) == blame
    assert found is None or found.line == line


def test_the_worst_of_several_counts() -> None:
    text = "Xid 94\nWatchdog caught collective operation timeout\nNVRM: Xid (PCI:0000:41:00): 79, gone\nXid 94"
    found = gpu_fault(text)
    assert found is not None and "79" in found.line


@pytest.mark.parametrize(
    ("message", "peers"),
    [
        ("RuntimeError: [../gloo/transport/tcp/pair.cc:534] Connection closed by peer [198.18.0.11]:20011", True),
        ("DistBackendError: NCCL error: remote process exited or there was a network error", True),
        ("ConnectionResetError: [Errno 104] Connection reset by peer", True),
        ("ValueError: loss is not finite", False),
        ("", False),
    ],
)
def test_a_lost_connection_is_the_other_ends_fault(message: str, peers: bool) -> None:
    assert is_peers_fault(message) == peers
