"""What a person reads while a run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.state import StageState
from launcher.watch import Follower, Pace, describe_change, describe_progress, follow_file, states_table


def running(step: int | None = None, attempt: str = "local.1", **figures: float) -> StageState:
    return StageState("base", "train", "running", False, attempt, step=step, total=100, figures=figures, started=0.0)


def test_time_left_is_told_from_the_pace_since_the_first_heartbeat() -> None:
    pace = Pace()
    pace.see(running(), 0.0)
    pace.see(running(1), 20.0)  # start-up took 20 s: no part of the pace
    assert pace.seconds_left(100) is None
    pace.see(running(11), 25.0)
    assert pace.seconds_left(100) == pytest.approx(89 * 0.5)
    pace.see(running(11), 60.0)  # no news
    assert pace.seconds_left(100) == pytest.approx(89 * 0.5)


def test_a_resumed_attempt_has_a_pace_of_its_own() -> None:
    pace = Pace()
    for step, now in ((1, 0.0), (50, 10.0)):
        pace.see(running(step), now)
    for step, now in ((51, 100.0), (61, 110.0)):
        pace.see(running(step, "local.2"), now)
    assert pace.seconds_left(100) == pytest.approx(39.0)


def test_words_for_changes_and_progress() -> None:
    failed = StageState("rl", "rl", "failed", False, exit_class="diverged", message="loss is nan")
    assert describe_change(failed) == "failed: diverged: loss is nan"
    assert describe_change(StageState("a", "train", "done", False, seconds=61.0)) == "done in 1 min 01 s"
    assert describe_progress(running(7, loss=1.23456, tokens_per_s=16400.0), Pace()) == (
        "step 7/100  loss 1.235  16.4 k tokens/s"
    )


def test_plain_lines_say_each_change_once_and_progress_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter(range(0, 1000, 4))
    with Follower("run", clock=lambda: float(next(clock))) as follower:
        for step in (None, 1, 2, 3, 4, 5, 6):
            follower.show([running(step), StageState("rl", "rl", "waiting", False)])
        done = StageState("base", "train", "done", False, "local.1", seconds=24.0)
        follower.show([done])
        follower.show([done])
    lines = [line.split("  ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "base: started (local.1)" and lines[-1] == "base: done in 24.0 s"
    progress = [line for line in lines if "step" in line]
    assert len(progress) == 2 and "left" in progress[-1] and len(lines) == 4


def test_hostile_names_are_shown_as_they_are() -> None:
    from rich.console import Console

    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    state = StageState("[red]x[/red]", "train", "failed", False, message="[bold]no[/bold]", exit_class="crashed")
    console.print(states_table("run", [state]))
    console.file.close()
    assert "[red]x[/red]" in (text := console.export_text()) and "[bold]no[/bold]" in text


def test_a_followed_log_is_printed_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log"
    path.write_text("before\n")
    turns = iter([True, True, False])

    def still_running() -> bool:
        with path.open("a") as file:
            file.write("more\n")
        return next(turns)

    follow_file(path, still_running, poll_s=0.0)
    assert capsys.readouterr().out == "more\n" * 3
