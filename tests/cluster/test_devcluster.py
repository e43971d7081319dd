"""The dev cluster is a Slurm like any other, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import pytest
import yaml
from on_slurm import CHECKOUT, Prism, lacking, shown, state, submit, until

from launcher.cluster import load_profile
from launcher.devcluster import boot, cluster, config, daemons, nodes
from launcher.devcluster.cluster import DevCluster
from launcher.errors import UserError, WorldError


def left_behind(folder: Path) -> list[str]:
    """Living processes, network interfaces and mounts that speak of a cluster's folder."""
    found = [p.parent.name for p in Path("/sys/class/net").glob("*/ifalias") if p.read_text().strip() == str(folder)]
    found += [line for line in Path("/proc/mounts").read_text().splitlines() if str(folder) in line]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            texts = [(process / name).read_bytes() for name in ("cmdline", "environ")]
        except OSError:
            continue
        if any(os.fsencode(folder) in text for text in texts) and int(process.name) != os.getpid():
            found.append(texts[0].decode().replace("\0", " "))
    return found


def all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def spaces(pids: Iterable[int]) -> set[str]:
    """The network and host-name namespaces that processes are in."""
    found = set()
    for link in (f"/proc/{pid}/ns/{kind}" for pid in pids for kind in ("net", "uts")):
        with contextlib.suppress(OSError):
            found.add(os.readlink(link))
    return found


# --------------------------------------------------------------------------------------------------- a cluster's nodes


def test_every_node_is_idle_and_as_large_as_it_pretends(devcluster: DevCluster) -> None:
    lines = devcluster.call("sinfo", "-hN", "--partition=batch", "--format=%N %T %G %c %m").splitlines()
    assert sorted(lines) == [f"n{i} idle gpu:8 64 200000" for i in (1, 2, 3, 4)]
    partitions = devcluster.call("sinfo", "-h", "--format=%R").split()
    assert sorted(partitions) == ["batch", "grace", "high", "low"]


#: Task 0 answers at a port; task 1 calls it by the first node's name and at localhost.
MEET = """
import json, os, pathlib, socket, sys, time
folder, me = pathlib.Path(sys.argv[1]), socket.gethostname()
said = {"name": me, "net": os.readlink("/proc/self/ns/net"), "address": socket.gethostbyname(me)}
if os.environ["SLURM_PROCID"] == "0":
    server = socket.create_server(("", 0))
    (folder / "new").write_text(f"{me} {server.getsockname()[1]}")
    (folder / "new").rename(folder / "address")
    server.settimeout(20)
    server.accept()[0].sendall(me.encode())
else:
    end = time.monotonic() + 20
    while not (folder / "address").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    host, port = (folder / "address").read_text().split()
    try:
        socket.create_connection(("127.0.0.1", int(port)), 5)
        said["localhost"] = "answers"
    except ConnectionRefusedError:
        said["localhost"] = "refused"
    said["heard"] = socket.create_connection((host, int(port)), 5).recv(100).decode()
(folder / f"said.{os.environ['SLURM_PROCID']}").write_text(json.dumps(said))
"""


def test_nodes_are_machines_of_their_own(devcluster: DevCluster, tmp_path: Path) -> None:
    if devcluster.site.isolation != "network":
        lacking("only root can give each node its own network")
    devcluster.call("srun", "--nodes=2", sys.executable, "-c", MEET, str(tmp_path), seconds=30)
    first, second = (json.loads((tmp_path / f"said.{rank}").read_text()) for rank in (0, 1))
    here = os.readlink("/proc/self/ns/net")
    assert first["name"] != second["name"] and first["address"] != second["address"]
    assert len({first["net"], second["net"], here}) == 3
    assert second["heard"] == first["name"] and second["localhost"] == "refused"


def test_gpus_are_dealt_out(devcluster: DevCluster) -> None:
    show = ("sh", "-c", "echo $SLURM_PROCID $CUDA_VISIBLE_DEVICES $SLURM_GPUS_ON_NODE")
    lines = devcluster.call("srun", "--nodes=2", "--gpus-per-node=2", *show).splitlines()
    assert sorted(lines) == ["0 0,1 2", "1 0,1 2"]
    lines = devcluster.call("srun", "--ntasks=4", "--nodes=1", "--gpus-per-task=2", *show).splitlines()
    assert sorted(lines) == ["0 0,1 8", "1 2,3 8", "2 4,5 8", "3 6,7 8"]


def test_one_that_runs_is_said_to(devcluster: DevCluster, prism: Prism) -> None:
    where = ("--dir", str(devcluster.folder))
    done = prism("devcluster", "up", *where, "--nodes", "4")
    assert (done.returncode, done.stderr) == (0, "") and "runs already" in done.stdout
    done = prism("devcluster", "up", *where, "--gpus", "2")
    assert done.returncode == 2 and "--gpus 2" in done.stderr
    again = cluster.find(devcluster.folder)
    assert again and again.processes["slurmctld"] == devcluster.processes["slurmctld"]


def test_a_shell_speaks_to_it(devcluster: DevCluster, prism: Prism) -> None:
    lines = prism("devcluster", "env", "--dir", str(devcluster.folder), PATH="/nowhere").stdout
    env = {"PATH": "/usr/bin:/bin"}
    shell = ["sh", "-c", 'eval "$1"; scontrol ping; command -v slurmctld', "sh", lines]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=20, env=env, check=False)
    assert "UP" in done.stdout and "/sbin/slurmctld" in done.stdout, done.stderr


# ------------------------------------------------------------------------------------------------------------- jobs


@dataclass(frozen=True)
class Faults:
    node: str
    job: str
    lives: Path


@pytest.fixture(scope="module")
def faults(devcluster: DevCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    """A node whose slurmd was killed, and a job that was requeued.

    Slurm takes half a minute to see the one and ten seconds to start the other: other tests run meanwhile.
    """
    lives = tmp_path_factory.mktemp("requeued") / "lives"
    script = f'echo ${{SLURM_RESTART_COUNT:-0}} >>{lives}; [ -n "$SLURM_RESTART_COUNT" ] || sleep 100'
    job = submit(devcluster, "--nodelist=n2", script=script)
    until(lives.exists, 10, "the first life")
    devcluster.call("scontrol", "requeue", job)
    daemons.kill([devcluster.processes["slurmd.n4"]])
    yield Faults("n4", job, lives)
    if not devcluster.is_alive("slurmd.n4"):
        devcluster.start("slurmd.n4")
        devcluster.await_idle()


def test_dependents_run_after_success_and_end_with_failure(devcluster: DevCluster, faults: Faults) -> None:
    chain = ("--kill-on-invalid-dep=yes", "--nodelist=n1")
    good, bad = (submit(devcluster, "--nodelist=n1", script=script) for script in ("true", "exit 3"))
    after_good = submit(devcluster, f"--dependency=afterok:{good}", *chain, script="true")
    after_bad = submit(devcluster, f"--dependency=afterok:{bad}", *chain, script="true")
    jobs = [good, bad, after_good, after_bad]

    def told() -> list[str]:
        """State and exit code of each, as slurmdbd has them."""
        return devcluster.call("sacct", "-nXP", f"--jobs={','.join(jobs)}", "--format=State,ExitCode,Account").split()

    want = ["COMPLETED|0:0|dev", "FAILED|3:0|dev", "COMPLETED|0:0|dev", "CANCELLED|0:0|dev"]
    until(lambda: told() == want, 20, f"{want}, but {told()}")


def test_what_can_never_run_is_refused_at_once(devcluster: DevCluster) -> None:
    for option in ("--nodes=5", "--time=2-0", "--account=nobodys", "--qos=nosuch", "--partition=nosuch", "--gpus=33"):
        with pytest.raises(WorldError, match="sbatch: error"):
            submit(devcluster, option, script="true")


def test_a_higher_partition_takes_the_nodes_of_a_lower(devcluster: DevCluster) -> None:
    where = ("--nodelist=n1", "--exclusive")
    low = submit(devcluster, "--partition=low", *where, script="sleep 100")
    until(lambda: state(devcluster, low) == "RUNNING", 10, "the low job runs")
    high = submit(devcluster, "--partition=high", *where, script="true")
    until(lambda: state(devcluster, high) == "COMPLETED", 20, "the high job runs")
    assert shown(devcluster, low)["Restarts"] == "1"
    devcluster.call("scancel", low)


# ---------------------------------------------------------------------------------------------------------- profile


def test_the_profile_is_found_and_its_scripts_are_taken(
    devcluster: DevCluster, prism: Prism, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = prism("cluster", "list", "--json")
    assert [row["scheduler"] for row in json.loads(done.stdout) if row["name"] == "dev"] == ["slurm"]
    done = prism(
        "render", "recipes/demo.yaml", "--cluster", "dev", "--root", str(tmp_path / "root"), "-o", str(tmp_path / "out")
    )
    assert done.returncode == 0, done.stderr
    scripts = sorted((tmp_path / "out").rglob("*.sbatch"))
    assert scripts
    for script in scripts:
        devcluster.call("sbatch", "--test-only", str(script))


def test_a_profile_quotes_what_yaml_would_read_otherwise(devcluster: DevCluster, tmp_path: Path) -> None:
    (tmp_path / "odd.yaml").write_text(config.profile_text(devcluster.site, "/opt/a b: #c/python", Path("/x: y")))
    profile = load_profile(str(tmp_path / "odd.yaml"))
    assert (profile.python, profile.code) == ("/opt/a b: #c/python", "/x: y")
    assert profile.partitions["batch"].max_nodes == 4 and profile.partitions["low"].gpus_per_node == 8


# ----------------------------------------------------------------------------------------------- starting and stopping


def test_beside_another_mended_and_gone(
    devcluster: DevCluster, prism: Prism, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second cluster, first without namespaces, killed in part, mended by `up`, and stopped."""
    where = ("--dir", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(nodes, "possible_isolation", lambda: "none")
    second, started = boot.up(tmp_path, 2, 1)
    assert started and second.node_states() == {"n1": "idle", "n2": "idle"}
    first_job = submit(second, "--nodes=2", script="srun sleep 200")
    until(lambda: len(nodes.steps_of(tmp_path)) > 3, 10, "steps run")
    daemons.kill([second.processes["slurmctld"]])
    done = prism("devcluster", "status", *where, "--json")
    assert done.returncode == 1 and json.loads(done.stdout)["processes"]["slurmctld"]["alive"] is False

    done = prism("devcluster", "up", *where, "--nodes", "1", "--gpus", "0")
    assert done.returncode == 0, done.stderr
    mended = cluster.find(tmp_path)
    assert mended and mended.dead() == [] and nodes.steps_of(tmp_path) == []
    assert not any(daemons.lives(owner) for owner in second.processes.values())
    job = submit(mended, script="sleep 200")
    assert int(job) > int(first_job), "job ids must not come again"
    until(lambda: state(mended, job) == "RUNNING", 10, "a job runs")
    own = spaces(p.pid for p in mended.processes.values()) - spaces([os.getpid()])
    assert left_behind(tmp_path) and bool(own) == (mended.site.isolation != "none")

    done = prism("devcluster", "down", *where)
    assert (done.returncode, done.stderr) == (0, "")
    assert left_behind(tmp_path) == [] and not own & spaces(all_pids())
    assert [name for name in os.listdir("/sys/class/net") if name.startswith(mended.site.bridge)] == []
    assert not (tmp_path / "dev.yaml").exists()
    done = prism("devcluster", "down", *where)
    assert (done.returncode, done.stderr) == (0, "") and "none runs" in done.stdout
    done = prism("devcluster", "env", *where)
    assert done.returncode == 1 and done.stdout == "" and "devcluster up" in done.stderr
    assert devcluster.call("srun", "--nodelist=n1", "hostname").strip() == "n1", "the other cluster lives on"


def test_a_failed_start_names_the_log_and_leaves_nothing(slurm_packages: None, prism: Prism, tmp_path: Path) -> None:
    broken = tmp_path / "bin" / "mariadbd"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho fatal: out of luck\nexit 1\n")
    broken.chmod(0o755)
    folder = tmp_path / "cluster"
    (folder / "db" / "mysql").mkdir(parents=True)
    done = prism("devcluster", "up", "--dir", str(folder), "--nodes", "2", PATH=f"{broken.parent}:{os.environ['PATH']}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "mariadbd has died" in done.stderr and "out of luck" in done.stderr
    assert str(folder / "log" / "mariadbd.out") in done.stderr
    assert left_behind(folder) == []
    assert cluster.find(folder) is None


@pytest.fixture
def ordinary_user(slurm_packages: None) -> Iterator[tuple[Path, list[str]]]:
    """A home, and the words before a command that make an ordinary user with that home run it."""
    if os.geteuid() != 0:
        lacking("only root can become another user; without root all other tests here are this one")
    home = Path(tempfile.mkdtemp(prefix="prism-user-"))  # pytest's own folders are closed to other users
    home.chmod(0o755)
    for name in ("launcher", "slurm", "recipes"):
        shutil.copytree(CHECKOUT / name, home / "code" / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(Path(yaml.__file__).parent, home / "code" / "yaml", ignore=shutil.ignore_patterns("*.so"))
    shutil.copy(CHECKOUT / "pyproject.toml", home / "code")
    shutil.chown(home, "slurm", "slurm")
    env = [f"HOME={home}", "PATH=/usr/bin:/bin", f"PYTHONPATH={home}/code", "PYTHONDONTWRITEBYTECODE=1"]
    yield home, ["setpriv", "--reuid=slurm", "--regid=slurm", "--clear-groups", "env", "-i", *env]
    shutil.rmtree(home)


def test_an_ordinary_user_has_one_too(ordinary_user: tuple[Path, list[str]]) -> None:
    home, become = ordinary_user
    python = next((p for p in (sys.executable, "/usr/bin/python3") if not run([*become, p, "-c", ""]).returncode), None)
    if python is None:
        lacking(f"user slurm may run neither {sys.executable} nor /usr/bin/python3")
    prism = [*become, python, "-m", "launcher.cli", "devcluster"]
    done = run([*prism, "up", "--nodes", "2", "--gpus", "2"])
    try:
        assert done.returncode == 0, done.stderr
        env = run([*prism, "env"]).stdout
        job = [*become, "sh", "-c", 'eval "$1"; srun -N2 --gpus-per-node=2 sh -c "$2"', "sh", env]
        done = run([*job, "echo $(hostname) $(id -un) $CUDA_VISIBLE_DEVICES $(getent hosts n2 | wc -l)"])
        names = ("n1", "n2") if "own host name" in run([*prism, "up"]).stdout else 2 * (os.uname().nodename,)
        assert sorted(done.stdout.splitlines()) == [f"{name} slurm 0,1 1" for name in names], done.stderr
        assert run([*prism, "status"]).returncode == 0
        assert (home / ".config/prism-launch/clusters/dev.yaml").exists()
    finally:
        done = run([*prism, "down"])
    assert (done.returncode, done.stderr) == (0, "")
    assert left_behind(home / ".local/state/prism-launch/devcluster") == []
    assert not os.path.lexists(home / ".config/prism-launch/clusters/dev.yaml")


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/", check=False)


# ------------------------------------------------------------------------------------------------------------ faults


def test_a_requeued_job_comes_back_soon(devcluster: DevCluster, faults: Faults) -> None:
    until(lambda: state(devcluster, faults.job) == "COMPLETED", 40, "the second life")
    assert faults.lives.read_text().split() == ["0", "1"]
    job = shown(devcluster, faults.job)
    assert job["Restarts"] == "1"
    held = datetime.fromisoformat(job["EligibleTime"]) - datetime.fromisoformat(job["SubmitTime"])
    assert 9 <= held.total_seconds() <= 12, "Slurm holds a requeued job back for cred_expire"


def test_a_node_without_its_slurmd_goes_down_and_comes_back(devcluster: DevCluster, faults: Faults) -> None:
    until(lambda: devcluster.node_states()[faults.node].startswith("down"), 60, "the node is down")
    assert devcluster.dead() == [f"slurmd.{faults.node}"]
    devcluster.start(f"slurmd.{faults.node}")
    devcluster.await_idle()


def slurmd_start(on: DevCluster, node: str) -> str:
    """When the node's slurmd started, as it told slurmctld."""
    words = on.call("scontrol", "--oneliner", "show", "node", node).split()
    return next(word for word in words if word.startswith("SlurmdStartTime="))


def test_a_whole_node_is_lost_and_comes_back(devcluster: DevCluster) -> None:
    if devcluster.site.isolation == "none":
        lacking("without namespaces a node is its slurmd alone")
    job = submit(devcluster, "--nodelist=n3", "--no-requeue", script="srun sleep 100 & wait")
    until(lambda: len(devcluster.node_processes("n3")) > 5, 10, "the job's step runs")
    there, before = devcluster.node_processes("n3"), slurmd_start(devcluster, "n3")
    devcluster.kill_node("n3")
    assert not any(daemons.lives(owner) for owner in there) and devcluster.node_processes("n3") == []
    assert devcluster.dead() == ["node.n3", "slurmd.n3"]
    devcluster.start("node.n3")
    devcluster.start("slurmd.n3")
    until(lambda: slurmd_start(devcluster, "n3") != before, 30, "the new slurmd has registered")
    devcluster.call("scancel", job)
    devcluster.await_idle()
    assert devcluster.call("srun", "--nodelist=n3", "hostname").strip() == "n3"


# ------------------------------------------------------------------------------------------------- without a cluster


def test_absent_packages_are_one_line_with_the_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemons, "PATH", "/nowhere")
    with pytest.raises(WorldError) as caught:
        boot.up(tmp_path / "new", None, None)
    assert "slurmctld" in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).endswith(config.install_command())
    assert "mariadb-server" in config.install_command() and "slurm-wlm" in config.install_command()


def test_the_documentation_names_the_packages() -> None:
    assert config.install_command() in (CHECKOUT / "docs" / "clusters.md").read_text()


def test_unusable_sizes_and_folders_are_refused_together(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        boot.up(tmp_path / "with space", 0, 65)
    assert [problem.partition(" ")[0] for problem in caught.value.problems] == ["--nodes", "--gpus", "--dir"]
    with pytest.raises(UserError, match="--dir"):
        boot.up(tmp_path / ("long" * 30), 1, 1)


def test_a_profile_of_the_users_own_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    mine = boot.profile_link()
    mine.parent.mkdir(parents=True)
    mine.write_text("scheduler: local\n")
    site = config.Site(str(tmp_path), 1, 1, "me", "host", "none", "/dev/tty0", 1, 2, (3,))
    boot.write_profile(site)
    boot.remove_profile(tmp_path)
    assert mine.read_text() == "scheduler: local\n" and not (tmp_path / "dev.yaml").exists()
    mine.unlink()
    mine.symlink_to(tmp_path / "gone.yaml")
    boot.write_profile(site)
    assert load_profile("dev").partitions["high"].max_nodes == 1, "a link to nothing gives way"
    other = tmp_path / "other"
    other.mkdir()
    boot.write_profile(replace(site, folder=str(other), nodes=9))
    assert load_profile("dev").partitions["high"].max_nodes == 1, "a link to a profile that is there does not"
    DevCluster(site).write()
    boot.write_profile(replace(site, folder=str(other), nodes=9))
    assert load_profile("dev").partitions["high"].max_nodes == 9, "a dead cluster's gives way"
    boot.remove_profile(tmp_path)
    assert load_profile("dev").partitions["high"].max_nodes == 9, "only a cluster's own link goes with it"
    boot.remove_profile(other)
    assert not os.path.lexists(mine)


def test_nodes_do_not_find_this_machine_at_their_own_localhost() -> None:
    site = config.Site("/d", 2, 1, "root", "login", "network", "/dev/x0", 1, 2, (6818, 6818), network=7)
    machine = "127.0.0.1 localhost\n127.0.1.1 login.site login\n# login\n10.0.0.1 other\n"
    assert config.hosts_text(site, machine).splitlines() == [
        *("127.0.0.1 localhost", "# login", "10.0.0.1 other"),
        *("198.18.7.1 login", "198.18.7.10 n1", "198.18.7.11 n2"),
    ]
