"""The dev cluster's configuration files as text: pure, from a `Site` and the templates in `slurm/devcluster/`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Literal

from launcher.data import data_dir

#: What sets nodes apart: `network` is host name and network, `name` is host name alone, `none` is neither.
Isolation = Literal["network", "name", "none"]
CPUS = 64
MEMORY_MB = 200_000
CLUSTER = "dev"
ACCOUNT = "dev"
#: Port of every slurmd where each node has its own address.
SLURMD_PORT = 6818
_TEMPLATES = ("slurm.conf", "slurmdbd.conf", "gres.conf", "cgroup.conf", "plugstack.conf", "my.cnf")


@dataclass(frozen=True)
class Site:
    """Everything about a dev cluster that is decided before it starts.

    `network` numbers the bridge and the addresses 198.18.N.0/24 (a range kept for benchmarks, RFC 2544); None where
    nodes share this machine's network.
    """

    folder: str
    nodes: int
    gpus: int
    user: str
    host: str
    isolation: Isolation
    gpu_files: str
    ctld_port: int
    dbd_port: int
    slurmd_ports: tuple[int, ...]
    network: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The nodes' names: n1, n2, …"""
        return tuple(f"n{i + 1}" for i in range(self.nodes))

    @property
    def bridge(self) -> str:
        """The network interface that joins the nodes and this machine."""
        return f"prismdev{self.network}"

    @property
    def address(self) -> str:
        """Where slurmctld listens."""
        return "127.0.0.1" if self.network is None else f"198.18.{self.network}.1"

    def address_of(self, node: str) -> str:
        """A node's address."""
        return "127.0.0.1" if self.network is None else f"198.18.{self.network}.{10 + self.names.index(node)}"


def packages() -> tuple[str, ...]:
    """The Debian packages that a dev cluster needs."""
    return tuple((data_dir("slurm") / "devcluster" / "packages.txt").read_text(encoding="utf-8").split())


def install_command() -> str:
    """What installs them."""
    return f"apt-get install -y --no-install-recommends {' '.join(packages())}"


def config_files(site: Site) -> dict[str, str]:
    """File name under `etc/` to text."""
    values = {
        **{name: str(getattr(site, name)) for name in ("folder", "user", "host", "address", "ctld_port", "dbd_port")},
        "gpu_files": site.gpu_files,
        "node_lines": "\n".join(_node_line(site, i) for i in range(site.nodes)),
    }
    files = {name: Template(_template(name)).substitute(values) for name in _TEMPLATES}
    return {**files, **({} if site.gpus else {"gres.conf": ""})}


def _template(name: str) -> str:
    return (data_dir("slurm") / "devcluster" / name).read_text(encoding="utf-8")


def _node_line(site: Site, i: int) -> str:
    name = site.names[i]
    host = site.host if site.isolation == "none" else name
    size = f"CPUs={CPUS} Boards=1 SocketsPerBoard=1 CoresPerSocket={CPUS} ThreadsPerCore=1 RealMemory={MEMORY_MB}"
    gpus = f" Gres=gpu:{site.gpus}" if site.gpus else ""
    where = f"NodeHostname={host} NodeAddr={site.address_of(name)} Port={site.slurmd_ports[i]}"
    return f"NodeName={name} {where} {size}{gpus} State=UNKNOWN"


def hosts_text(site: Site, machine: str) -> str:
    """The nodes' /etc/hosts: this machine's, and every node by name."""
    nodes = [f"{site.address_of(name)} {name}" for name in site.names]
    # A machine's own name often stands at a loopback address, which on a node would be the node itself.
    others = [line for line in machine.splitlines() if site.host not in line.split("#")[0].split()[1:]]
    return "\n".join([*others, f"{site.address} {site.host}", *nodes]) + "\n"


def profile_text(site: Site, python: str, code: Path | None) -> str:
    """The cluster profile. `python` is the interpreter of jobs, `code` the checkout they import from."""
    size = (
        f"{site.nodes} pretended {'node' if site.nodes == 1 else 'nodes'} of this machine, {site.gpus} fake GPUs each"
    )
    values = {
        "description": f"dev cluster in {site.folder}: {size}",
        "python": python,
        "slurm_conf": f"{site.folder}/etc/slurm.conf",
        "code": str(code) if code else None,
    }
    quoted = {name: json.dumps(value) for name, value in values.items()}
    return Template(_template("dev.yaml")).substitute(nodes=site.nodes, gpus=site.gpus, **quoted)
