"""What the nodes said, and who is left out for it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from launcher.progress import PREFLIGHT_LEFT
from launcher.spec import AllReduce, Preflight
from launcher.supervisor.beats import RunningTime
from launcher.supervisor.preflight import Findings, judge, look

BOTH = ("n1", "n2")


@pytest.mark.parametrize(
    ("nodes", "problems", "action", "excluded"),
    [
        (BOTH, {"n1": [], "n2": []}, None, ()),
        (BOTH, {"n1": [], "n2": ["sees 7 GPUs of 8"]}, "again", ("n2",)),
        (BOTH, {"n1": ["no room"], "n2": ["no room"]}, "stop", ()),
        (("n1",), {"n1": ["no room"]}, "again", ("n1",)),
    ],
)
def test_who_is_left_out(
    nodes: tuple[str, ...], problems: dict[str, list[str]], action: str | None, excluded: tuple[str, ...]
) -> None:
    found = judge(Findings(nodes, problems))
    assert (found and found.action) == action
    if found is not None:
        assert found.exit_class == "preflight" and found.exclude == excluded
        assert all(f"{node}: {why[0]}" in found.message for node, why in problems.items() if why)


def test_what_is_no_single_nodes_fault_leaves_nobody_out() -> None:
    found = judge(Findings(BOTH, {"n1": [], "n2": []}, common="the all-reduce failed"))
    assert found is not None and (found.action, found.exclude) == ("again", ())


def looked(folder: Path, *scripts: str, asked: Preflight | None = None, stopped: bool = False) -> Findings:
    """Findings of a preflight whose sruns are programs of Python; each may write into the folder `at`."""
    names = ("preflight", "all-reduce")
    commands = [(n, (sys.executable, "-c", f"at = {str(folder)!r}\n{s}")) for n, s in zip(names, scripts, strict=False)]
    return look(asked or Preflight(deadline_s=20.0), BOTH, commands, {}, folder, lambda: stopped)


def node(name: str, *problems: str, leaves: bool = True) -> str:
    left = f"open(at + '/{PREFLIGHT_LEFT.format(node=name)}', 'w').close()\n" if leaves else ""
    return f"import json\n{left}print(json.dumps({{'node': {name!r}, 'problems': {list(problems)!r}}}))\n"


def test_answers_are_taken_by_node_among_noise(tmp_path: Path) -> None:
    found = looked(tmp_path, "print('a module says hello')\n" + node("n2", "sees 7 GPUs of 8") + node("n1"))
    assert found.problems == {"n1": [], "n2": ["sees 7 GPUs of 8"]}


def test_a_node_that_cannot_run_the_check_or_says_nothing_has_failed(tmp_path: Path) -> None:
    failed = "import sys\nprint('srun: error: n1: task 0: Exited with exit code 1', file=sys.stderr)\n"
    found = looked(tmp_path, failed, asked=Preflight(deadline_s=3.0))
    assert "could not run: Exited with exit code 1" in found.problems["n1"][0]
    assert found.problems["n2"] == ["no answer in 3 s"]


def test_what_srun_says_of_itself_is_told_where_nobody_answers(tmp_path: Path) -> None:
    words = "srun: fatal: SLURM_MEM_PER_CPU and SLURM_MEM_PER_NODE are mutually exclusive."
    found = looked(tmp_path, f"print({words!r})")
    assert found.problems == {name: [f"no answer ({words})"] for name in BOTH}


def test_a_check_that_stood_still_with_its_job_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Suspended for an hour: its deadline counts the time in which it could run."""
    hands = iter(range(0, 10_000_000, 3600))
    monkeypatch.setattr("launcher.supervisor.preflight.RunningTime", lambda: RunningTime(lambda: float(next(hands))))
    slow = "import time\ntime.sleep(0.5)\n" + node("n1") + node("n2")
    assert looked(tmp_path, slow, asked=Preflight(deadline_s=300.0)).problems == {"n1": [], "n2": []}


def test_a_node_whose_writes_are_not_seen_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.supervisor.preflight._APPEARS_S", 0.2)
    found = looked(tmp_path, node("n1") + node("n2", leaves=False))
    assert found.problems["n1"] == [] and "not seen from the first node" in found.problems["n2"][0]


def test_a_check_that_hangs_is_killed_at_its_deadline(tmp_path: Path) -> None:
    hangs = node("n1") + "import sys, time\nsys.stdout.flush()\ntime.sleep(600)"
    found = looked(tmp_path, hangs, asked=Preflight(deadline_s=1.0))
    assert found.problems == {"n1": [], "n2": ["no answer in 1 s"]}


@pytest.mark.parametrize(("floor", "passes"), [(2.0, True), (4.0, False)])
def test_the_floor_of_the_all_reduce_decides(tmp_path: Path, floor: float, passes: bool) -> None:
    asked = Preflight(deadline_s=20.0, all_reduce=AllReduce(floor))
    measured = 'print(\'{"mode": "nccl", "bus_gbs": 3.0, "ranks": 2}\')'
    found = looked(tmp_path, node("n1") + node("n2"), measured, asked=asked)
    assert found.facts["bus_gbs"] == 3.0
    result = judge(found)
    assert (result is None) == passes
    assert passes or (result is not None and "3 GB/s" in result.message and "n1, n2" in result.message)


def test_an_all_reduce_that_fails_is_told(tmp_path: Path) -> None:
    asked = Preflight(deadline_s=20.0, all_reduce=AllReduce(1.0))
    failed = "import sys\nprint('srun: error: n2: task 1: Exited with exit code 1', file=sys.stderr)\n"
    result = judge(looked(tmp_path, node("n1") + node("n2"), failed, asked=asked))
    assert result is not None and "failed on n2" in result.message and result.exclude == ()


def started(folder: Path, script: str) -> Findings:
    """Findings where both nodes are well from outside, and CUDA was started in the image by this script."""
    commands = [
        (n, (sys.executable, "-c", f"at = {str(folder)!r}\n{s}"))
        for n, s in (("preflight", node("n1") + node("n2")), ("cuda", script))
    ]
    return look(Preflight(deadline_s=20.0), BOTH, commands, {}, folder, lambda: False)


def test_a_node_on_which_cuda_does_not_start_is_left_out_with_the_reason(tmp_path: Path) -> None:
    found = started(tmp_path, node("n1", leaves=False) + node("n2", "CUDA does not start: too old", leaves=False))
    result = judge(found)
    assert result is not None and (result.action, result.exclude) == ("again", ("n2",))
    assert result.message == "n2: CUDA does not start: too old"


def test_an_image_that_starts_nowhere_is_no_nodes_fault(tmp_path: Path) -> None:
    failed = "for n in ('n1', 'n2'): print(f'srun: error: {n}: task 0: Exited with exit code 1')\n"
    result = judge(started(tmp_path, failed))
    assert result is not None and result.action == "stop" and "every node failed" in result.message


def test_silence_of_a_started_image_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.supervisor.preflight._IMAGE_S", 1.0)
    found = started(tmp_path, node("n1", leaves=False))
    assert found.problems == {"n1": [], "n2": ["no answer by CUDA in 21 s"]}


def test_with_a_bad_node_no_all_reduce_is_tried(tmp_path: Path) -> None:
    asked = Preflight(deadline_s=20.0, all_reduce=AllReduce(1.0))
    looked(tmp_path, node("n1") + node("n2", "bad"), "open(at + '/tried', 'w').close()", asked=asked)
    assert not (tmp_path / "tried").exists()
