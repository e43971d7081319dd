"""The right log of the right component, and following it through the attempts of a stage."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from launcher import cli, store
from launcher.attempts import Attempt, newest_attempt
from launcher.errors import UserError
from launcher.logs import Look, NoLogYet, component_logs, find_log, follow, main_log, tail
from launcher.run_record import RunRecord, write_run
from launcher.spec import StageSpec
from launcher.submit import JOBS
from tests.left_attempts import leave_attempt
from tests.supervisor.counting import counting_run, counting_stage, counting_step


@pytest.fixture
def spec() -> StageSpec:
    """An RL stage: a reward server, and an actor with a dot in its name."""
    return counting_stage(
        replace(counting_step("critic"), role="server"), replace(counting_step("actor.1", ntasks=2)), stage="rl"
    )


def leave_logs(root: Path, spec: StageSpec, name: str, *logs: str) -> Path:
    folder = leave_attempt(root, spec, name, 10 + len(name), None)
    for log in logs:
        (folder / log).write_text(f"{log} of {name}\n")
    return folder


def found(root: Path, spec: StageSpec, component: str | None = None, rank: int | None = None) -> str:
    path = find_log(spec, _newest(root, spec), component, rank)
    return str(path.relative_to(store.stage_dir(root, spec.run, spec.stage)))


def _newest(root: Path, spec: StageSpec) -> Attempt:
    attempt = newest_attempt(root, spec)
    assert attempt is not None
    return attempt


def test_a_component_and_a_rank_name_their_log(tmp_path: Path, spec: StageSpec) -> None:
    folder = leave_logs(tmp_path, spec, "7.0", "actor.1.0.log", "actor.1.1.log", "critic.0.log", "notes.log")
    (folder.parent / "7_0_log.out").write_text("supervisor\n")
    assert set(component_logs(folder)) == {("actor.1", 0), ("actor.1", 1), ("critic", 0)}
    assert found(tmp_path, spec) == "7.0/actor.1.0.log"  # the main component, not the server
    assert found(tmp_path, spec, rank=1) == "7.0/actor.1.1.log"
    assert found(tmp_path, spec, "critic") == "7.0/critic.0.log"
    assert found(tmp_path, spec, "supervisor") == "7_0_log.out"


def test_an_element_of_an_array_has_its_batch_log_with_the_stage_it_is_part_of(tmp_path: Path, spec: StageSpec) -> None:
    folder = leave_logs(tmp_path, spec, "12_3.0", "actor.1.0.log")
    parent = folder.parent.with_name("evaluate")
    parent.mkdir()
    for name in ("12_3_0_log.out", "12_31_0_log.out", "12_0_log.out"):
        (parent / name).write_text("supervisor\n")
    assert find_log(spec, _newest(tmp_path, spec), "supervisor", None) == parent / "12_3_0_log.out"


def test_what_is_not_there_is_named_with_what_there_is(tmp_path: Path, spec: StageSpec) -> None:
    leave_logs(tmp_path, spec, "7.0", "actor.1.0.log", "actor.1.1.log")
    with pytest.raises(UserError, match="stage rl: no component actor; there is actor.1, critic, supervisor"):
        found(tmp_path, spec, "actor")
    with pytest.raises(NoLogYet, match=r"no log of component critic, rank 0; there is actor.1 \(rank 0 to 1\), super"):
        found(tmp_path, spec, "critic")
    with pytest.raises(NoLogYet, match="rank 5"):
        found(tmp_path, spec, rank=5)


def test_an_attempt_that_started_nothing_has_its_supervisors_log(tmp_path: Path, spec: StageSpec) -> None:
    folder = leave_logs(tmp_path, spec, "local.1", "supervisor.log")
    assert main_log(spec, _newest(tmp_path, spec)) == folder / "supervisor.log"


def test_the_end_of_a_log_of_any_length(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"first\n" + b"x" * (3 << 20) + b"\nlast but one\n\xff last\n")
    assert tail(path, 2) == ["last but one", "\ufffd last"] and len(tail(path, 10)) == 3
    assert tail(tmp_path / "absent", 2) == []


def test_following_goes_on_into_the_next_life_and_ends_with_the_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"

    def look(turn: list[int] = [0]) -> Look:  # noqa: B006
        turn[0] += 1
        if turn[0] == 1:
            return Look(None, True)  # in the queue
        if turn[0] < 5:
            with first.open("a") as file:
                file.write("".join(f"{turn[0]}.{i}\n" for i in range(4)))
            return Look(first, True)
        with first.open("a") as file:
            file.write("" if turn[0] > 5 else "last words\n")
        with second.open("a") as file:
            file.write(f"again {turn[0]}\n")
        return Look(second, turn[0] < 7)

    follow(look, 2, 0.0)
    out = capsys.readouterr()
    lines = ["2.2", "2.3", "3.0", "3.1", "3.2", "3.3", "4.0", "4.1", "4.2", "4.3", "last words"]
    assert out.out.splitlines() == [*lines, "again 5", "again 6", "again 7"]
    assert out.err.splitlines() == [f"==> {first} <==", f"==> {second} <=="]


# ---------------------------------------------------------------------------------------------------------- by command


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Run `old` and, written later, run `run`; both have stages `a` and `b`, and `old` has `z`; there is a run `b`."""
    for number, (name, stages) in enumerate((("old", "abz"), ("b", "a"), ("run", "ab"))):
        run = counting_run(*((s, (), {}) for s in stages))
        record: RunRecord = replace(
            run, run=name, stages=tuple(replace(s, spec=replace(s.spec, run=name)) for s in run.stages)
        )
        write_run(tmp_path, record)
        path = store.run_dir(tmp_path, name) / "run.json"
        os.utime(path, (1000 + number, 1000 + number))
        for stage in record.stages:
            leave_attempt(tmp_path, stage.spec, "local.1", 10, 20, "crashed", owner=store.this_process())
            folder = leave_attempt(tmp_path, stage.spec, "local.2", 30, 40)
            for rank, parent in ((0, folder), (0, folder.with_name("local.1")), (1, folder)):
                (parent / f"count.{rank}.log").write_text(f"{name} {stage.spec.stage} {parent.name} {rank}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("a",), "run a local.2 0"),
        (("b",), "run b local.2 0"),  # a stage of the latest run before a run of that name
        (("old", "z"), "old z local.2 0"),
        (("--run", "old", "a"), "old a local.2 0"),
        (("a", "--rank", "1"), "run a local.2 1"),
        (("a", "--attempt", "local.1"), "run a local.1 0"),
        (("old", "b", "--component", "count"), "old b local.2 0"),
    ],
)
def test_what_the_words_of_the_command_name(
    root: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], line: str
) -> None:
    assert cli.main(["logs", *words, "--root", str(root)]) == 0
    assert capsys.readouterr().out == line + "\n"


def test_a_run_alone_or_nothing_means_the_stage_that_asks_for_attention(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = store.stage_dir(root, "old", "b") / "local.2" / "events.jsonl"
    failing.write_text(failing.read_text().replace('"finished"', '"diverged"'))
    assert cli.main(["logs", "old", "--root", str(root)]) == 0
    assert capsys.readouterr().out == "old b local.2 0\n"
    assert cli.main(["logs", "--root", str(root)]) == 2  # all of `run` waits for another attempt
    assert "no stage has been started yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("z",), "run run: no stage z; there is a, b"),
        (("nope", "a"), "no such run; runs under this root: run, b, old"),
        (("old", "a", "b"), "old a b: give a STAGE, or RUN and STAGE"),
        (("--run", "old", "old", "a"), "give a STAGE, or RUN and STAGE"),
        (("a", "--attempt", "9.0"), "stage a: no attempt 9.0; there is local.1, local.2"),
        (("a", "--component", "actor"), "no component actor; there is count, supervisor"),
        (("a", "--rank", "7"), "no log of component count, rank 7; there is count (rank 0 to 1), supervisor"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    root: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert cli.main(["logs", *words, "--root", str(root)]) == 2
    assert message in capsys.readouterr().err


def test_following_a_stage_that_is_over_prints_it_and_ends(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["logs", "a", "-f", "--root", str(root)]) == 0
    assert capsys.readouterr().out == "run a local.2 0\n"


def test_without_a_stage_a_job_whose_supervisor_never_began_shows_its_batch_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = counting_run(("a", (), {}), ("b", ("a",), {}))
    write_run(tmp_path, record)
    told = {"stage": "a", "fingerprint": record.stage("a").spec.fingerprint, "job": "7", "time": 1.0}
    (tmp_path / "runs" / "run" / JOBS).write_text(json.dumps(told) + "\n")
    assert cli.main(["logs", "run", "--root", str(tmp_path)]) == 2
    assert "no stage has been started yet" in capsys.readouterr().err
    folder = store.stage_dir(tmp_path, "run", "a")
    folder.mkdir(parents=True)
    (folder / "7_0_log.out").write_text("/opt/py: No such file or directory\n")
    assert cli.main(["logs", "run", "--root", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "/opt/py: No such file or directory\n"
