"""Starting, finding and stopping a dev cluster. All that is known of a running one stands in `DIR/devcluster.json`."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from launcher import store
from launcher.data import own_profiles
from launcher.devcluster import config, daemons, nodes
from launcher.devcluster.config import Site
from launcher.errors import UserError, WorldError
from launcher.spec import SpecError, decode, encode
from launcher.store import Owner

STATE = "devcluster.json"
#: What must be installed.
PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmdbd", "sacctmgr", "srun", "mariadbd", "mariadb-install-db")
#: Slurm's files cannot quote a path, and a unix socket's is at most 107 bytes long.
_PLAIN_PATH = re.compile(r"[A-Za-z0-9/._+@-]+")
_LONGEST_PATH = 90
MOST_NODES = 64
MOST_GPUS = 64


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

    def dead(self) -> list[str]:
        """Names of processes that should live and do not."""
        return [name for name in _names(self.site) if not self.is_alive(name)]

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
        """End every process of this cluster, jobs included, and remove its interfaces and its profile."""
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
        remove_profile(self.folder)
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


def up(folder: Path, node_count: int | None, gpus: int | None) -> tuple[DevCluster, bool]:
    """The cluster in a folder, and whether this call started it. What is left of a dead one is cleaned first.

    Raises UserError where a running one has another size, WorldError where it does not start: then nothing runs on.
    """
    with _claimed(folder):
        found = find(folder)
        if found and not found.dead():
            _same_size(found.site, node_count, gpus)
            return found, False
        if found:
            found.stop()
        cluster = DevCluster(_decide(folder, 4 if node_count is None else node_count, 8 if gpus is None else gpus))
        try:
            _begin(cluster)
            cluster.start_all()
            write_profile(cluster.site)
        except BaseException:
            cluster.stop()
            raise
        return cluster, True


def down(folder: Path) -> bool:
    """Stop the cluster in a folder; whether there was one."""
    if not folder.is_dir():
        return False
    with _claimed(folder):
        found = find(folder)
        if found:
            found.stop()
    return found is not None


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """One `up` or `down` at a time in a folder."""
    me = store.this_process()
    folder.mkdir(parents=True, exist_ok=True)
    holder = store.claim(folder / "claim", me)
    if holder:
        raise WorldError(f"{folder}: process {holder.pid} is starting or stopping this dev cluster; wait for it")
    try:
        yield
    finally:
        store.release(folder / "claim", me)


def _same_size(site: Site, node_count: int | None, gpus: int | None) -> None:
    for name, wanted, there in (("nodes", node_count, site.nodes), ("gpus", gpus, site.gpus)):
        if wanted not in (None, there):
            raise UserError(f"--{name} {wanted}: the dev cluster in {site.folder} runs with {there}; `down` it first")


# ------------------------------------------------------------------------------------------------------- preparations


def _decide(folder: Path, node_count: int, gpus: int) -> Site:
    """Look at this machine and choose; changes nothing but the folder's `dev/`."""
    problems = [
        f"--{name} {count}: give {least} to {most}"
        for name, count, least, most in (("nodes", node_count, 1, MOST_NODES), ("gpus", gpus, 0, MOST_GPUS))
        if not least <= count <= most
    ]
    if not _PLAIN_PATH.fullmatch(str(folder)) or len(str(folder)) > _LONGEST_PATH:
        problems.append(
            f"--dir {folder}: choose a path of at most {_LONGEST_PATH} characters, of letters, digits and ._+@- alone;"
            " Slurm's files cannot quote others"
        )
    if problems:
        raise UserError(problems)
    if absent := daemons.absent(PROGRAMS):
        raise WorldError(f"dev cluster: {', '.join(absent)} not installed; as root: {config.install_command()}")
    (folder / "dev").mkdir(exist_ok=True)
    ctld, dbd, *slurmd = daemons.free_ports(2 + node_count)
    isolation = nodes.possible_isolation()
    return Site(
        folder=str(folder),
        nodes=node_count,
        gpus=gpus,
        user=getpass.getuser() if os.geteuid() else "root",
        host=socket.gethostname().partition(".")[0],
        isolation=isolation,
        gpu_files=nodes.fake_gpus(folder, gpus) if gpus else "",
        ctld_port=ctld,
        dbd_port=dbd,
        slurmd_ports=(config.SLURMD_PORT,) * node_count if isolation == "network" else tuple(slurmd),
    )


def _begin(cluster: DevCluster) -> None:
    """Make the network and write the configuration files."""
    cluster.write()
    if cluster.site.isolation == "network":
        cluster.site = replace(cluster.site, network=nodes.make_bridge(cluster.folder))
        cluster.write()
    site, folder = cluster.site, cluster.folder
    for name, mode in (
        ("etc", 0o755),
        ("run", 0o755),
        ("log", 0o755),
        ("state", 0o700),
        ("spool", 0o755),
        ("db", 0o700),
    ):
        (folder / name).mkdir(mode=mode, exist_ok=True)
    for name, text in config.config_files(site).items():
        _write(folder / "etc" / name, text, 0o600 if name == "slurmdbd.conf" else 0o644)
    _write(folder / "etc" / "hosts", config.hosts_text(site, Path("/etc/hosts").read_text()), 0o644)
    if not (folder / "munge.key").exists():
        _write(folder / "munge.key", os.urandom(64).hex(), 0o600)
    for log in (folder / "log").iterdir():
        log.unlink()


def _write(path: Path, text: str, mode: int) -> None:
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        file.write(text)


def _names(site: Site) -> list[str]:
    """The processes of a whole cluster."""
    holders = [] if site.isolation == "none" else [f"node.{name}" for name in site.names]
    return ["munged", "mariadbd", "slurmdbd", "slurmctld", *holders, *(f"slurmd.{name}" for name in site.names)]


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


# ------------------------------------------------------------------------------------------------------------ profile


def write_profile(site: Site) -> None:
    """Write DIR/dev.yaml, and let `--cluster dev` find it unless the user has a `dev` of their own."""
    checkout = Path(__file__).resolve().parents[2]
    code = checkout if (checkout / "pyproject.toml").exists() else None
    profile, link = Path(site.folder) / "dev.yaml", profile_link()
    store.write_atomic(profile, config.profile_text(site, sys.executable, code))
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_symlink() and _leads_nowhere(link):
        link.unlink()
    with contextlib.suppress(FileExistsError):
        link.symlink_to(profile)


def _leads_nowhere(link: Path) -> bool:
    """Whether a link's profile is gone, or is a dead dev cluster's."""
    other = find(Path(os.readlink(link)).parent)
    return not link.exists() or (other is not None and not other.is_alive("slurmctld"))


def profile_link() -> Path:
    """Where `--cluster dev` looks."""
    return own_profiles() / f"{config.CLUSTER}.yaml"


def remove_profile(folder: Path) -> None:
    """Take back what `write_profile` wrote."""
    link = profile_link()
    if link.is_symlink() and os.readlink(link) == str(folder / "dev.yaml"):
        link.unlink()
    (folder / "dev.yaml").unlink(missing_ok=True)
