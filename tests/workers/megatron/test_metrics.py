"""What a training run tells of itself: parts of a step, held-out losses, TensorBoard, spikes, kept checkpoints."""

from __future__ import annotations

import signal
from collections import deque
from pathlib import Path

import pytest
import train_stages as ts
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launcher.workers.megatron.loop import Step, _what_is_wrong
from launcher.workers.megatron.metrics import Clock

HELD_OUT = {"validation": ["prepare/one", "prepare/two"], "eval_interval": 3, "eval_iters": 2}


def board(stage: ts.TrainStage, name: str) -> dict[int, float]:
    events = EventAccumulator(str(stage.workdir / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def test_held_out_losses_come_at_the_interval_and_the_end_and_change_nothing(root: Path) -> None:
    plain = ts.make_stage(root, "plain", data={"prepare/one": 1.0}, lr=2e-3)
    measured = ts.make_stage(root, "measured", data={"prepare/one": 1.0}, log_interval=4, lr=2e-3, **HELD_OUT)
    assert ts.run(plain) == [0] == ts.run(measured), ts.log(measured)
    losses = {row["iteration"]: row["loss"] for row in plain.metrics()}
    rows = {row["iteration"]: row for row in measured.metrics()}
    assert sorted(rows) == [3, 4, 6, 8]
    assert {i: row["loss"] for i, row in rows.items()} == {i: losses[i] for i in rows}
    measurements = {i: [row.get(f"validation/prepare/{n}") for n in ("one", "two")] for i, row in rows.items()}
    assert measurements[4] == [None, None]
    one, two = zip(*(measurements[i] for i in (3, 6, 8)), strict=True)
    assert one[2] < two[2] - 0.1, "it learns what it reads, and not the other text"
    assert board(measured, "validation/prepare/two") == pytest.approx(dict(zip((3, 6, 8), two, strict=True)))


def test_held_out_losses_are_the_same_on_two_ranks(root: Path) -> None:
    one = ts.make_stage(root, "one-rank", **HELD_OUT)
    assert ts.run(one) == [0], ts.log(one)
    for name, layout in {"dp": {}, "pp": {"pipeline_model_parallel_size": 2}}.items():
        changes = {"num_hidden_layers": 4} if name == "pp" else {}
        reference = one
        if changes:
            reference = ts.make_stage(root, "four-layers", model=ts.model("llama-tiny", **changes), **HELD_OUT)
            assert ts.run(reference) == [0]
        model = ts.model("llama-tiny", **changes)
        two = ts.make_stage(root, f"two-{name}", ranks=2, parallelism=layout, model=model, **HELD_OUT)
        assert ts.run(two) == [0, 0], ts.log(two)
        for mine, theirs in zip(two.metrics(), reference.metrics(), strict=True):
            named = [key for key in theirs if key.startswith("validation/")]
            assert [mine[k] for k in named] == pytest.approx([theirs[k] for k in named], rel=2e-6)


def test_a_step_says_where_its_time_went_and_tensorboard_has_every_step_once(root: Path) -> None:
    stage = ts.make_stage(root, "told", save_interval=3)
    assert ts.run(stage, ts.signal_at(5, signal.SIGKILL)) == [-9]
    assert ts.run(stage, attempt=1) == [0], ts.log(stage, 1)
    for row in stage.metrics():
        parts = {k: v for k, v in row.items() if k.startswith("seconds_")}
        assert {"seconds_data", "seconds_forward", "seconds_backward", "seconds_optimizer"} <= parts.keys()
        assert all(v > 0 for v in parts.values())
        assert sum(v for k, v in parts.items() if k != "seconds_checkpoint") <= row["seconds"]
        assert row["tflops_per_rank"] > 0 and row["memory_gib"] > 0.1 and "mfu" not in row, "a CPU has no known peak"
    assert {row["iteration"] for row in stage.metrics() if "seconds_checkpoint" in row} == {7, 8}, (
        "begun after step 6 of the second life and finished a step later"
    )
    assert board(stage, "train/loss") == pytest.approx({row["iteration"]: row["loss"] for row in stage.metrics()})


def test_checkpoints_to_keep(root: Path) -> None:
    stage = ts.make_stage(root, "kept", train_iters=9, save_interval=1, keep_last=1, keep_every=3)
    assert ts.run(stage) == [0], ts.log(stage)
    assert stage.saved() == ["iter_0000003", "iter_0000006", "iter_0000008"]


def test_a_clock_takes_apart_what_runs_inside_another() -> None:
    clock = Clock({"data": 1.0, "forward": 0.5, "backward": 3.0, "optimizer": 0.5})
    assert clock.take() == {
        "seconds_data": 1.0,
        "seconds_forward": 0.5,
        "seconds_backward": 1.5,
        "seconds_optimizer": 0.5,
    }
    assert clock.take() == {}


@pytest.mark.parametrize(
    ("loss", "norm", "seen", "wrong"),
    [(2.0, 1.0, 100, False), (9.0, 1.0, 100, True), (9.0, 1.0, 5, False), (2.0, float("inf"), 5, True),
     (float("nan"), 1.0, 0, True), (7.9, 1.0, 20, False), (8.1, 1.0, 20, True)],
)  # fmt: skip
def test_a_spike_is_divergence_once_there_is_something_to_compare_with(
    loss: float, norm: float, seen: int, wrong: bool
) -> None:
    recent = deque([2.0] * seen, maxlen=100)
    assert (_what_is_wrong(Step(loss, 1e-3, norm, False), recent, 4.0) is not None) is wrong


def test_a_spike_is_one_for_the_attempt_that_goes_on_too(root: Path) -> None:
    """The losses before are those of all attempts: else what has diverged would pass when it is run again."""
    learns = {"train_iters": 30, "save_interval": 5, "loss_spike": 1.0001, "lr": 1e-9, "ranks": 2}
    stage = ts.make_stage(root, "spike", **learns)
    for attempt in range(2):
        assert ts.run(stage, attempt=attempt) == [1, 1], ts.log(stage, attempt)
    first, second = (stage.ending(attempt) for attempt in range(2))
    assert first["class"] == second["class"] == "diverged" and first["message"] == second["message"]
    assert "is more than 1.0001 (loss_spike) times" in first["message"]
    assert "resumed from" in ts.log(stage, 1)


def test_wandb_that_is_not_installed_is_the_users_to_mend(root: Path) -> None:
    stage = ts.make_stage(root, "no-wandb", wandb_project="prism")
    assert ts.run(stage) == [2]
    assert "pip install wandb" in stage.ending()["message"]
