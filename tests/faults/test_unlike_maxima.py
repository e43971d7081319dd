"""A maximum is taken over like things alone: whole GPUs and MIG slices are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.cluster import Profile, load_profile
from launcher.site import ask, trial
from launcher.site.draft import draft_profile
from tests.site.sites import FakeSite, partition


def drafted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sinfo: str, refuses: tuple[str, ...] = ()
) -> tuple[Profile, str]:
    def refusal(options: list[str]) -> str | None:
        return "Requested node configuration is not available" if any(w in " ".join(options) for w in refuses) else None

    site = FakeSite([partition("gpu", 4, Default="YES"), partition("cpu", 9)], sinfo, refusal)
    monkeypatch.setattr(ask, "call", site.call)
    text = draft_profile(ask.look(None))
    (tmp_path / "site.yaml").write_text(text)
    return load_profile(str(tmp_path / "site.yaml")), text


MIXED = (
    "gpu|2|64|gpu:h100:8(S:0-1)|(null)|idle\ngpu|2|64|gpu:h100:4(S:0-1),gpu:h100_1g.10gb:14(S:0-1)|(null)|idle\n"
    "cpu|9|64|(null)|(null)|idle\n"
)


@pytest.mark.parametrize("refuses", [(), ("gpu:14", "node=14", ":h100:14"), ("node=8", "gpu:8")])
def test_slices_beside_whole_gpus(refuses: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """14 slices are more than 8 GPUs by number alone; a request without a type might be given them."""
    profile, text = drafted(monkeypatch, tmp_path, MIXED, refuses)
    assert (profile.partition, profile.gpu_type) == ("gpu", "h100")
    assert profile.partitions["gpu"].gpus_per_node == 8 and ":14" not in text and "h100_1g.10gb (14 a node)" in text


def test_each_type_has_its_own_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sinfo = "gpu|2|64|gpu:v100:8|(null)|idle\ngpu|2|64|gpu:a100:4|(null)|idle\ncpu|9|64|(null)|(null)|idle\n"
    too_many = ("a100:8", "gpu:8", "node=8", "v100:4")
    profile, text = drafted(monkeypatch, tmp_path, sinfo, too_many)
    assert (profile.gpu_type, profile.partitions["gpu"].gpus_per_node) == ("v100", 8)
    assert "v100 (8 a node), a100 (4 a node)" in " ".join(text.replace("\n# ", " ").split())
    profile, _ = drafted(monkeypatch, tmp_path, sinfo, (*too_many, "v100"))
    assert (profile.gpu_type, profile.partitions["gpu"].gpus_per_node) == ("a100", 4)


def test_slices_alone_are_no_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sinfo = "gpu|4|64|gpu:1g.5gb:28|(null)|idle\ncpu|9|64|(null)|(null)|idle\n"
    profile, _ = drafted(monkeypatch, tmp_path, sinfo)
    assert (profile.partition, profile.partitions["gpu"].gpus_per_node) == ("cpu", 0)


@pytest.mark.parametrize(
    ("kind", "slice"),
    [
        *[
            (kind, True)
            for kind in ("1g.5gb", "h100_3g.40gb", "a100-1g.10gb+me", "nvidia_a100_1g_5gb", "mig", "MIG-1g.12gb")
        ],
        *[
            (kind, False)
            for kind in ("", "h100", "a100_80gb", "a100-40gb", "rtx6000", "gh200", "nvidia_h100_80gb_hbm3")
        ],
    ],
)
def test_slices_are_told_by_their_names(kind: str, slice: bool) -> None:
    assert ask.is_slice(kind) is slice


def test_gpus_of_one_type_on_both_sockets_are_one_count() -> None:
    (queue,) = ask.parse_queues("PartitionName=p TotalNodes=1\n", "p|1|64|gpu:h100:4(S:0),gpu:h100:4(S:1)|x|idle\n", ())
    assert (queue.gpus, queue.gpus_of("h100"), queue.gpus_of("a100")) == (8, 8, 0)


def test_the_smallest_node_does_not_bound_what_a_partition_bounds() -> None:
    said = "PartitionName=p TotalNodes=2 MaxCPUsPerNode=96\n"
    (queue,) = ask.parse_queues(said, "p|1|64|(null)|x\np|1|128|(null)|x\n", ())
    assert queue.cpus == 96


def test_a_test_of_the_cluster_asks_for_as_many_as_there_are_of_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = ask.Queue("p", 2, is_default=True, max_nodes=2, types={"h100": 8, "a100": 4}, slices={"1g.10gb": 14})
    monkeypatch.setattr(trial, "show_queues", lambda: (queue,))
    asked = {
        kind: trial.plan_trial(
            Profile(name="x", scheduler="slurm", gpu_type=kind), Path("/r"), None
        ).resources.gpus_per_node
        for kind in (None, "a100", "v100")
    }
    assert asked == {None: 8, "a100": 4, "v100": 0}
