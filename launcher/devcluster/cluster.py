"""A dev cluster as it runs, and how its parts start and end. `DIR/devcluster.json` holds what is known of it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from launcher import store
from launcher.devcluster import config, daemons, nodes
from launcher.devcluster.config import Site
from launcher.errors import WorldError
from launcher.spec import SpecError, decode, encode
from launcher.store import Owner

STATE = "devcluster.json"


@dataclass
class DevCluster:
    """A dev cluster: what was decided, and its processes by name.

    Names: `munged`, `mariadbd`, `slurmdbd`, `slurmctld`, and for each node `node.NAME` (holds its namespaces) and
    `slurmd.NAME`. Each may be stopped and started again alone, as faults do.
    """

    site: Site
    processes: dict[str, Owner] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where everything of it lies."""
        return Path(self.site.folder)

    @property
    def slurm_conf(self) -> Path:
        """The file that SLURM_CONF names."""
        return self.folder / "etc" / "slurm.conf"

    def call(self, *argv: str, seconds: float = 10) -> str:
        """Run one of Slurm's clients on this cluster; returns what it printed. Raises WorldError where it fails."""
        return daemons.must(argv, seconds, SLURM_CONF=str(self.slurm_conf))

    @property
    def names(self) -> list[str]:
        """The processes of the whole cluster, living or not."""
        holders = [] if self.site.isolation == "none" else [f"node.{name}" for name in self.site.names]
        slurmds = [f"slurmd.{name}" for name in self.site.names]
        return ["munged", "mariadbd", "slurmdbd", "slurmctld", *holders, *slurmds]

    def dead(self) -> list[str]:
        """Names of processes that should live and do not."""
        return [name for name in self.names if not self.is_alive(name)]

    def is_alive(self, name: str) -> bool:
        """Whether the process of that name lives."""
        return name in self.processes and daemons.lives(self.processes[name])

    def node_states(self) -> dict[str, str]:
        """State of each node as sinfo says it; empty where slurmctld does not answer."""
        if not self.is_alive("slurmctld"):  # sinfo would go on asking for a while
            return {}
        try:
            lines = self.call("sinfo", "--noheader", "--Node", "--partition=batch", "--format=%N %T").splitlines()
        except WorldError:
            return {}
        return dict(line.split() for line in lines)

    # ------------------------------------------------------------------------------------------------------- starting

    def start(self, name: str) -> None:
        """Start one process and write down that it is ours; a node's needs its `node.NAME` first."""
        self._read_again()
        kind, _, node = name.partition(".")
        if kind == "node":
            self.processes[name] = nodes.hold(self.site, node)
            self.write()
            nodes.connect(self.site, node, self.processes[name])
        else:
            enter = nodes.entering(self.site, self.processes.get(f"node.{node}")) if node else []
            variables = {"SLURM_CONF": str(self.slurm_conf), "MYSQL_UNIX_PORT": str(self.folder / "run/mysql.sock")}
            self.processes[name] = daemons.spawn(
                self.folder, name, [*enter, *_argv(self.folder, kind, node)], **variables
            )
        self.write()

    def _read_again(self) -> None:
        """Another process may have stopped this cluster and started it anew since."""
        now = find(self.folder)
        if now:
            self.site, self.processes = now.site, now.processes

    def await_idle(self, seconds: float = 30) -> None:
        """Wait until Slurm calls every node idle."""

        def ready() -> bool:
            states = self.node_states()
            return set(states) == set(self.site.names) and set(states.values()) == {"idle"}

        self._wait("nodes idle", ready, seconds, "slurmctld")

    def _wait(self, what: str, ready: Callable[[], bool], seconds: float, name: str) -> None:
        daemons.wait_until(what, ready, seconds, self.folder, name, self.processes[name])

    def start_all(self) -> None:
        """Start everything, each as soon as what it needs answers."""
        run = self.folder / "run"
        self.start("munged")
        _install_database(self.site)
        self.start("mariadbd")
        for name in self.site.names if self.site.isolation != "none" else ():
            self.start(f"node.{name}")
        self._wait("munge", lambda: daemons.listens(run / "munge.sock"), 10, "munged")
        self._wait("database", lambda: daemons.listens(run / "mysql.sock"), 30, "mariadbd")
        self.start("slurmdbd")
        self._wait("accounting", lambda: _port_listens(self.site.dbd_port), 30, "slurmdbd")
        _add_accounts(self)
        self.start("slurmctld")
        self._wait("controller", lambda: _port_listens(self.site.ctld_port), 30, "slurmctld")
        for name in self.site.names:
            self.start(f"slurmd.{name}")
        self.await_idle()

    # ------------------------------------------------------------------------------------------------------- stopping

    def node_processes(self, name: str) -> list[Owner]:
        """Everything that runs on a node, jobs included; where nodes have no namespaces, its slurmd alone."""
        own = [self.processes[key] for key in (f"node.{name}", f"slurmd.{name}") if key in self.processes]
        return nodes.processes_in(own) if self.site.isolation != "none" else own[-1:]

    def kill_node(self, name: str) -> None:
        """End a node as a power cut does. `start` its two processes to have it back."""
        while living := [owner for owner in self.node_processes(name) if daemons.lives(owner)]:
            daemons.kill(living)

    def stop(self) -> None:
        """End every process of this cluster, jobs included, and remove its interfaces."""
        if self.is_alive("munged") and self.is_alive("slurmctld"):
            _cancel_jobs(self)
        daemons.end(self._owners("slurmctld"), 8)
        # A slurmd that is asked to end waits for its jobs.
        daemons.kill(self._owners(*(f"slurmd.{name}" for name in self.site.names)))
        for name in self.site.names:
            self.kill_node(name)
        while steps := nodes.steps_of(self.folder):
            daemons.kill(steps)
        for name in ("slurmdbd", "mariadbd", "munged"):
            daemons.end(self._owners(name), 15)
        nodes.remove_bridges(self.folder)
        (self.folder / STATE).unlink(missing_ok=True)

    def _owners(self, *names: str) -> list[Owner]:
        return [self.processes[name] for name in names if name in self.processes]

    def write(self) -> None:
        """Write down what is known, so that another process can stop it."""
        store.write_json(self.folder / STATE, {"site": encode(self.site), "processes": encode(self.processes)})


@dataclass(frozen=True)
class _Known:
    site: Site
    processes: Mapping[str, Owner]


def find(folder: Path) -> DevCluster | None:
    """The cluster that was started in a folder and not stopped, dead or alive."""
    data = store.read_json(folder / STATE)
    if data is None:
        return None
    try:
        known = decode(_Known, data)
    except SpecError as error:
        raise WorldError(f"{folder / STATE}: written by another version of prism-launch: {error}") from None
    return DevCluster(known.site, dict(known.processes))


# ------------------------------------------------------------------------------------------------------- preparations


def _argv(folder: Path, kind: str, node: str) -> list[str]:
    run, log = folder / "run", folder / "log"
    munged = {
        "key-file": folder / "munge.key",
        "socket": run / "munge.sock",
        "pid-file": run / "munged.pid",
        "log-file": log / "munged.log",
        "seed-file": run / "munge.seed",
    }
    return {
        # --force: the folder may lie in a home that is closed to others.
        "munged": ["munged", "--foreground", "--force", "--num-threads=2", *(f"--{k}={v}" for k, v in munged.items())],
        "mariadbd": ["mariadbd", f"--defaults-file={folder}/etc/my.cnf"],
        "slurmdbd": ["slurmdbd", "-D"],
        "slurmctld": ["slurmctld", "-D"],
        "slurmd": ["slurmd", "-D", "-N", node],
    }[kind]


def _install_database(site: Site) -> None:
    """Make MariaDB's own tables where there are none; the user who starts it is its administrator, by socket alone."""
    folder = Path(site.folder)
    if not (folder / "db" / "mysql").exists():
        root = ("--auth-root-authentication-method=socket", f"--auth-root-socket-user={site.user}", "--skip-test-db")
        config_file = f"--defaults-file={folder}/etc/my.cnf"
        daemons.must(["mariadb-install-db", config_file, f"--datadir={folder}/db", f"--user={site.user}", *root], 60)


def _add_accounts(cluster: DevCluster) -> None:
    """One account, charged by default, and the user who started the cluster in it."""
    user, account = cluster.site.user, config.ACCOUNT
    known = cluster.call("sacctmgr", "-nP", "show", "assoc", f"account={account}", f"user={user}", "format=user")
    if not known.strip():
        cluster.call("sacctmgr", "-iQ", "add", "cluster", config.CLUSTER)
        cluster.call("sacctmgr", "-iQ", "add", "account", account)
        cluster.call("sacctmgr", "-iQ", "add", "user", user, f"account={account}", f"defaultaccount={account}")


def _cancel_jobs(cluster: DevCluster) -> None:
    """Cancel all jobs, or they would start again with the cluster. Best effort: slurmctld may not answer."""
    with contextlib.suppress(WorldError):
        jobs = cluster.call("squeue", "--noheader", "--format=%A", seconds=3).split()
        if jobs:
            cluster.call("scancel", *jobs, seconds=5)


def _port_listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
