"""What sets the pretended nodes apart: namespaces held open by one idle process a node, joined by a bridge.

    this machine ── prismdevN (198.18.N.1) ──┬── n1 (eth0 198.18.N.10)
                                             └── n2 (eth0 198.18.N.11)

A namespace, and the interface in it, goes when its last process ends: nothing else is left to clean but the bridge.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from launcher import store
from launcher.devcluster import daemons
from launcher.devcluster.config import Isolation, Site
from launcher.errors import WorldError
from launcher.store import Owner

_USER = ("--user", "--map-current-user", "--keep-caps")
_UNSHARE = {"network": ("--net", "--uts", "--mount"), "name": (*_USER, "--uts", "--mount")}
_ENTER = {"network": ("--net", "--uts", "--mount"), "name": ("--user", "--preserve-credentials", "--uts", "--mount")}
#: Names the node, then keeps its namespaces: $1 the name, $2 its /etc/hosts.
_HOLD = 'hostname "$1" && mount --bind "$2" /etc/hosts && exec sleep infinity'


def possible_isolation() -> Isolation:
    """The most that this user may do on this machine."""
    modes: tuple[Isolation, ...] = ("network",) if os.geteuid() == 0 else ("name",)
    for mode in modes:
        if not daemons.absent(("unshare", "nsenter")):
            probe = ["unshare", *_UNSHARE[mode], "sh", "-c", "hostname probe && mount --bind /etc/hosts /etc/hosts"]
            if daemons.call(probe).returncode == 0:
                return mode
    return "none"


def fake_gpus(folder: Path, count: int) -> str:
    """Character devices that stand for GPUs, as gres.conf names them: root's own, else this machine's terminals."""
    made = folder / "dev" / "nvidia"
    try:
        for i in range(count):
            if not Path(f"{made}{i}").is_char_device():
                os.mknod(f"{made}{i}", 0o20666, os.makedev(1, 3))  # a second /dev/null
        return f"{made}[0-{count - 1}]"
    except PermissionError:
        short = [f"/dev/tty{i}" for i in range(count) if not Path(f"/dev/tty{i}").is_char_device()]
        if short:
            raise WorldError(
                f"dev cluster: without root, terminals stand for GPUs, and {short[0]} is absent; ask for fewer --gpus"
            ) from None
        return f"/dev/tty[0-{count - 1}]"


def hold(site: Site, name: str) -> Owner:
    """Start the process that holds a node's namespaces; `connect` has to follow."""
    folder = Path(site.folder)
    argv = ["unshare", *_UNSHARE[site.isolation], "sh", "-c", _HOLD, "sh", name, str(folder / "etc" / "hosts")]
    return daemons.spawn(folder, f"node.{name}", argv)


def connect(site: Site, name: str, holder: Owner) -> None:
    """Wait until a node's namespaces are made, and join its network to the others'."""
    folder = Path(site.folder)
    daemons.wait_until(
        f"namespaces of {name}", lambda: _command(holder.pid) == "sleep", 10, folder, f"node.{name}", holder
    )
    if site.isolation == "network":
        _plug_in(site, name, holder)


def entering(site: Site, holder: Owner | None) -> list[str]:
    """The words before a command that make it run on the node."""
    return ["nsenter", "--target", str(holder.pid), *_ENTER[site.isolation]] if holder else []


def _plug_in(site: Site, name: str, holder: Owner) -> None:
    veth = f"{site.bridge}-{name}"
    if Path(f"/sys/class/net/{veth}").exists():  # the kernel takes its time with a dead node's
        daemons.call(["ip", "link", "delete", veth])
    peer = f"peer name eth0 netns {holder.pid}".split()
    daemons.must(["ip", "link", "add", veth, "type", "veth", *peer])
    daemons.must(["ip", "link", "set", veth, "master", site.bridge, "up"])
    inside = [*entering(site, holder), "ip"]
    daemons.must([*inside, "address", "add", f"{site.address_of(name)}/24", "dev", "eth0"])
    daemons.must([*inside, "link", "set", "eth0", "up"])
    daemons.must([*inside, "link", "set", "lo", "up"])


def make_bridge(folder: Path) -> int:
    """Make a bridge of an unused number with its address; returns the number. Its alias says whose it is."""
    for number in range(256):
        name = f"prismdev{number}"
        if Path(f"/sys/class/net/{name}").exists():
            continue
        if daemons.call(["ip", "link", "add", name, "type", "bridge"]).returncode == 0:
            daemons.must(["ip", "link", "set", name, "alias", str(folder), "up"])
            daemons.must(["ip", "address", "add", f"198.18.{number}.1/24", "dev", name])
            return number
        if not Path(f"/sys/class/net/{name}").exists():  # else another cluster was quicker
            break
    raise WorldError("dev cluster: `ip link add type bridge` makes none; is the kernel module `bridge` there?")


def remove_bridges(folder: Path) -> None:
    """Remove the bridges that `make_bridge` made for this folder, and what is still plugged into them."""
    for bridge in Path("/sys/class/net").glob("prismdev*"):
        if (bridge / "brif").is_dir() and (bridge / "ifalias").read_text(encoding="utf-8").strip() == str(folder):
            for port in os.listdir(bridge / "brif"):
                daemons.call(["ip", "link", "delete", port])
            daemons.must(["ip", "link", "delete", bridge.name])


def processes_in(members: Iterable[Owner]) -> list[Owner]:
    """Every process that shares the host name's namespace with one of these, jobs included; none outside a node."""
    spaces = {_space(owner.pid) for owner in members if daemons.lives(owner)} - {_space(os.getpid()), None}
    return [store.this_process(pid) for pid in _pids() if _space(pid) in spaces]


def steps_of(folder: Path) -> list[Owner]:
    """The slurmstepds that log into this folder, and all that they started: what nodes without namespaces leave."""
    parents = {pid: _parent(pid) for pid in _pids()}
    found = {pid for pid in parents if _logs_into(pid, folder / "log")}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return [store.this_process(pid) for pid in found]


def _logs_into(pid: int, logs: Path) -> bool:
    try:
        files = [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return False
    return _command(pid) == "slurmstepd" and any(name.startswith(f"{logs}/slurmd.") for name in files)


def _pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def _command(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _space(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/uts")
    except OSError:
        return None


def _parent(pid: int) -> int | None:
    try:
        return int(
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1]
        )
    except OSError:
        return None
