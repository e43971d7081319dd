"""What a stage has cost a run: time over all its attempts, GPU-hours, what was lost, how long it waited. Reads only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.attempts import Attempt, attempts_at, step_of
from launcher.run_record import PlannedStage


@dataclass(frozen=True)
class Life:
    """The time of one attempt, in seconds since the epoch; that of a running one ends now."""

    attempt: Attempt
    started: float
    ended: float
    running: bool

    @property
    def seconds(self) -> float:
        """For how long it held its resources."""
        return self.ended - self.started

    @property
    def exit_class(self) -> str:
        """How it ended; one that could not say it was killed with its supervisor."""
        if self.running:
            return "running"
        return self.attempt.end.exit_class if self.attempt.end else "killed"

    @property
    def first(self) -> int | None:
        """The step of its first heartbeat: just behind what it went on from; None where it never beat."""
        return self.attempt.beat.first_step if self.attempt.beat else None


@dataclass(frozen=True)
class Cost:
    """What the attempts of a run at a stage have cost; `seconds` sums the times for which they held their resources.

    `lost_seconds` went into steps that a later attempt had to do again, and into attempts that did none. `gpus` and
    `cores` are those of the whole job.
    """

    attempts: int = 0
    seconds: float = 0.0
    lost_seconds: float = 0.0
    gpus: int = 0
    cores: int = 0
    classes: Mapping[str, int] | None = None

    @property
    def gpu_hours(self) -> float:
        """Hours of one GPU."""
        return self.gpus * self.seconds / 3600

    @property
    def core_hours(self) -> float:
        """Hours of one core."""
        return self.cores * self.seconds / 3600


def lives_of(root: Path, stage: PlannedStage, now: float, running: bool) -> list[Life]:
    """The attempts of this run at what is planned, the oldest first; `running` says whether the newest still runs."""
    found = attempts_at(root, stage.spec)
    lives = []
    for number, attempt in enumerate(found):
        newest = number == len(found) - 1
        going = newest and running and attempt.end is None
        ended = now if going else _end_of(attempt)
        following = None if newest else found[number + 1].started
        if following is not None and following >= attempt.started:  # else the clock was set back between them
            ended = min(ended, following)  # of a killed one the last sign of life may be later than that
        lives.append(Life(attempt, attempt.started, max(ended, attempt.started), going))
    return lives


def _end_of(attempt: Attempt) -> float:
    """When an attempt ended; of one that could not say so, its last sign of life."""
    if attempt.end:
        return attempt.end.time
    return max(attempt.started, attempt.beat.time) if attempt.beat else attempt.started


def cost_of(lives: Sequence[Life], stage: PlannedStage) -> Cost:
    """The sum over the attempts at a stage."""
    return Cost(
        attempts=len(lives),
        seconds=sum(life.seconds for life in lives),
        lost_seconds=sum(lost_seconds(lives)),
        gpus=stage.gpus,
        cores=stage.cores,
        classes=dict(Counter(life.exit_class for life in lives)),
    )


def lost_seconds(lives: Sequence[Life]) -> list[float]:
    """Of each attempt, the seconds whose work did not last, by steps; those of its start-up count with its steps."""
    lost = []
    for number, life in enumerate(lives):
        following = next((x.first for x in lives[number + 1 :] if x.first is not None), None)
        lost.append(life.seconds * _lost_share(life, following))
    return lost


def _lost_share(life: Life, following: int | None) -> float:
    if life.running or life.exit_class == "finished":
        return 0.0
    if life.first is None:
        return 1.0
    if following is None:
        return 0.0
    done = step_of(life.attempt) - life.first + 1
    again = step_of(life.attempt) - following + 1
    return min(1.0, max(0.0, again / done)) if done > 0 else 0.0


def queue_seconds(lives: Sequence[Life], submitted: Mapping[str, float], ready: float) -> float | None:
    """For how long the stage's jobs that have started waited in the queue, requeues included; None outside Slurm.

    `submitted` maps job ids to times; a job submitted before `ready`, the end of the stages it reads, waited from then.
    """
    waits = []
    since: dict[str, float] = {}
    for life in lives:
        job = life.attempt.job
        if job in submitted:
            waits.append(max(0.0, life.started - since.get(job, max(submitted[job], ready))))
            since[job] = life.ended
    return sum(waits) if waits else None
