"""`up` and `down`: one dev cluster a folder, prepared, started and stopped, with its profile."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from launcher import store
from launcher.data import own_profiles
from launcher.devcluster import config, daemons, nodes
from launcher.devcluster.cluster import DevCluster, find
from launcher.devcluster.config import Site
from launcher.errors import UserError, WorldError
from launcher.users import user_name

#: What must be installed.
PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmdbd", "sacctmgr", "srun", "mariadbd", "mariadb-install-db")
#: Slurm's files cannot quote a path, and a unix socket's is at most 107 bytes long.
_PLAIN_PATH = re.compile(r"[A-Za-z0-9/._+@-]+")
_LONGEST_PATH = 90
MOST_NODES = 64
MOST_GPUS = 64


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
            _stop(found)
        cluster = DevCluster(_decide(folder, 4 if node_count is None else node_count, 8 if gpus is None else gpus))
        try:
            _begin(cluster)
            cluster.start_all()
            write_profile(cluster.site)
        except BaseException:
            _stop(cluster)
            raise
        return cluster, True


def down(folder: Path) -> bool:
    """Stop the cluster in a folder; whether there was one."""
    if not folder.is_dir():
        return False
    with _claimed(folder):
        found = find(folder)
        if found:
            _stop(found)
    return found is not None


def _stop(cluster: DevCluster) -> None:
    cluster.stop()
    remove_profile(cluster.folder)


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
        user=user_name(),
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
    _write(
        folder / "etc" / "hosts",
        config.hosts_text(site, Path("/etc/hosts").read_text(encoding="utf-8", errors="surrogateescape")),
        0o644,
    )
    if not (folder / "munge.key").exists():
        _write(folder / "munge.key", os.urandom(64).hex(), 0o600)
    for log in (folder / "log").iterdir():
        log.unlink()


def _write(path: Path, text: str, mode: int) -> None:
    path.unlink(missing_ok=True)
    with open(
        os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8", errors="surrogateescape"
    ) as file:
        file.write(text)


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
