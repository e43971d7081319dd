"""Profiles drafted at sites of different kinds: each is read back by `load_profile`."""

from __future__ import annotations

from pathlib import Path

import pytest
from sites import FakeSite, partition

from launcher.cluster import Profile, load_profile
from launcher.errors import WorldError
from launcher.site import ask
from launcher.site.draft import draft_profile


def draft(site: FakeSite, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Profile, str]:
    monkeypatch.setattr(ask, "call", site.call)
    monkeypatch.setattr(ask, "_groups", lambda: {"users"})
    monkeypatch.setattr(ask.os, "geteuid", lambda: 1000)
    text = draft_profile(ask.look("/home/me/prism launch"))
    (tmp_path / "site.yaml").write_text(text)
    return load_profile(str(tmp_path / "site.yaml")), text


def drafted(site: FakeSite, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Profile:
    return draft(site, monkeypatch, tmp_path)[0]


def test_gpus_beside_a_default_partition_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    site = FakeSite(
        [
            partition("cpu", 40, Default="YES", DefaultTime="01:30:00", MaxTime="4:00:00"),
            partition("small", 2),
            partition("gpu", 16, MaxNodes="8", MaxTime="UNLIMITED", DefaultTime="00:01:00", MaxCPUsPerNode="96"),
            partition("vip", 64, AllowAccounts="boss,chief"),
            partition("old", 64, State="INACTIVE"),
            partition("staff", 64, AllowGroups="staff"),
        ],
        "cpu|40|64|(null)|(null)\nsmall|2|64|gpu:a100:4|(null)\ngpu|12|128|gpu:h100:8(S:0-1),shard:8|ib,h100\n"
        "gpu|4|112|gpu:h100:8|h100\nvip|64|128|gpu:h200:8|(null)\nold|64|1|gpu:8|(null)\nstaff|64|1|gpu:8|(null)\n",
        srun_help="      --container-image=[USER@][REGISTRY#]IMAGE[:TAG]|PATH\n",
        mpi="pmix",
        assoc="proj|long,normal|200\nother|normal|\n",
        qos="long|7-00:00:00||4|\nnormal|||||\nroot||||\n",
    )
    profile, text = draft(site, monkeypatch, tmp_path)
    assert (profile.partition, profile.cpu_partition, profile.account) == ("gpu", "cpu", "proj")
    assert list(profile.partitions) == ["cpu", "small", "gpu"]
    gpu = profile.partitions["gpu"]
    assert (gpu.max_nodes, gpu.max_time, gpu.gpus_per_node, gpu.cpus_per_node) == (8, None, 8, 96)
    assert profile.partitions["cpu"].gpus_per_node == 0 and profile.partitions["cpu"].max_time == "4:00:00"
    assert (profile.gpu_request, profile.gpu_type, profile.mem, profile.time) == (
        "gpus_per_node",
        None,
        None,
        "1:00:00",
    )
    assert (profile.runtime.container, profile.runtime.mpi) == ("none", "none")  # a working profile: no image is known
    assert profile.code == "/home/me/prism launch"
    for said in ("vip, for accounts boss,chief only", "old, its state is INACTIVE", "staff, for groups staff only"):
        assert said in " ".join(text.replace("\n# ", " ").split())
    assert "# gpu_type: h100" in text and "pyxis" in text and "MaxWall=7-00:00:00" in text
    assert not any(line.startswith("max_submit: 4") for line in text.splitlines())


def test_what_sbatch_refuses_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """gres with a type alone, memory always, no requeue, no accounts to be seen, a partition that is closed."""

    def refuses(options: list[str]) -> str | None:
        said = " ".join(options)
        if "--partition=big" in said:
            return "User's group not permitted to use this partition"
        if "--gpus-per-node" in said or "gres=gpu:4" in said:
            return "Invalid generic resource (gres) specification"
        if "--requeue" in said:
            return "Requeue is forbidden by policy"
        return None if "--mem" in said else "a memory limit must be given"

    site = FakeSite(
        [partition("big", 99), partition("booster", 24)],
        "big|99|48|gpu:4|(null)\nbooster|24|48|gpu:a100:4|(null)\n",
        refuses,
        absent=("sacctmgr",),
    )
    profile, text = draft(site, monkeypatch, tmp_path)
    assert (profile.partition, profile.cpu_partition, profile.account) == ("booster", None, None)
    assert (profile.gpu_request, profile.gpu_type, profile.mem) == ("gres", "a100", "0")
    assert "continuation: chain" in text and "forbidden by policy" in text
    assert "no sacctmgr here" in text and "# account: my-account" in text


def test_jobs_that_give_way_are_the_last_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    site = FakeSite(
        [partition("scavenge", 90, PreemptMode="REQUEUE"), partition("gpu", 4)],
        "scavenge|90|8|gpu:8|(null)\ngpu|4|8|gpu:8|(null)\n",
    )
    assert drafted(site, monkeypatch, tmp_path).partition == "gpu"
    site.partitions = site.partitions[:1]
    profile, text = draft(site, monkeypatch, tmp_path)
    assert profile.partition == "scavenge" and "give way to others (REQUEUE)" in text


def test_memory_that_slurm_does_not_count_is_not_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    site = FakeSite([partition("p5", 4, Default="YES")], "p5|4|192|gpu:8|(null)\n", select="CR_CORE")
    profile, text = draft(site, monkeypatch, tmp_path)
    assert profile.mem is None and "does not count memory" in text


def test_a_site_that_takes_nothing_is_said_so_and_the_file_is_a_profile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    site = FakeSite(
        [partition("a", 4, Default="YES"), partition("b", 4)],
        "a|4|8|gpu:8|(null)\nb|4|8|(null)|(null)\n",
        lambda options: "Invalid account or account/partition combination specified",
    )
    profile, text = draft(site, monkeypatch, tmp_path)
    assert profile.partition is None and "None takes a job of yours" in text and "Invalid account" in text


@pytest.mark.parametrize("name", ["on", "1", "a b", "null", 'q"u', "n\u00e4me", "#x", "a:b"])
def test_names_that_yaml_would_read_otherwise(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Slurm gives partitions no blanks; an account is any text.
    site = FakeSite([partition("gpu", 1)], "gpu|1|8|gpu:8|(null)\n", assoc=f"{name}|normal|\n", default_account=name)
    assert drafted(site, monkeypatch, tmp_path).account == name


def test_nothing_that_slurm_says_can_leave_its_comment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    site = FakeSite(
        [partition("gpu", 1)],
        "gpu|1|8|gpu:8|(null)\n",
        lambda options: "bad\x85time: 9\rtime: 9\u2028time: 9" if "--requeue" in options else None,
        assoc="proj|x\vtime: 9|\n",
    )
    profile, text = draft(site, monkeypatch, tmp_path)
    assert profile.time == "1:00:00" and "time: 9" in text


def test_a_controller_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    site = FakeSite([], "", absent=("scontrol",))
    monkeypatch.setattr(ask, "call", site.call)
    with pytest.raises(WorldError, match="no scontrol here"):
        ask.look(None)


def test_the_caps_on_submitted_jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    site = FakeSite(
        [partition("gpu", 1)],
        "gpu|1|8|gpu:8|(null)\n",
        assoc="proj|normal|100\n",
        qos="normal||50|8|gres/gpu=64\nother||2||\n",
    )
    monkeypatch.setattr(ask, "call", site.call)
    facts = ask.look(None)
    assert facts.max_submit == 50
    assert facts.qos == ("normal (MaxSubmitPU=50, MaxJobsPU=8, MaxTRESPU=gres/gpu=64)",)
    assert "max_submit: 50" in draft_profile(facts) and "max_array: 1001" in draft_profile(facts)
