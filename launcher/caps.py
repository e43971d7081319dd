"""What a cluster's profile lets a user submit now, and the note of what it held back.

ROOT/runs/NAME/held.json    stages that the last `run` did not submit, each with the reason
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher import store
from launcher.cluster import Profile

HELD = "held.json"
_HELD_BACK = "held back"


@dataclass
class Room:
    """What is left of `submit_rate` (calls of sbatch) and `max_submit` (jobs); None: no cap. Lives for one submission.

    `refused` is set where Slurm itself would take no more.
    """

    profile: Profile
    calls: int | None
    jobs: int | None
    refused: bool = False

    def fits(self, jobs: int, calls: int = 1) -> int:
        """How many of these jobs so many calls, which belong together, may submit now."""
        if self.refused or (self.calls is not None and self.calls < min(calls, self.profile.submit_rate or calls)):
            return 0
        return jobs if self.jobs is None else max(0, min(jobs, self.jobs))

    def take(self, jobs: int, calls: int = 1) -> None:
        """So many calls have submitted so many jobs."""
        if self.calls is not None:
            self.calls -= calls
        if self.jobs is not None:
            self.jobs -= jobs

    def why(self, jobs: int = 1) -> str:
        """Why no more jobs, at least so many at once, fit, in words."""
        if self.refused:
            reason = "Slurm's own limit of submitted jobs reached"
        elif self.jobs is not None and self.jobs < jobs:
            reason = f"max_submit {self.profile.max_submit} reached"
        else:
            reason = f"submit_rate {self.profile.submit_rate} a minute reached"
        return f"{_HELD_BACK}: {reason}; `prism-launch run` submits it"


def room_now(profile: Profile, calls_in_minute: int, jobs_in_queue: int) -> Room:
    """What the caps leave after the calls of the last minute and the user's jobs in the queue."""
    rate, most = profile.submit_rate, profile.max_submit
    return Room(
        profile,
        None if rate is None else max(0, rate - calls_in_minute),
        None if most is None else max(0, most - jobs_in_queue),
    )


def read_held(root: Path, run: str) -> Mapping[str, str]:
    """Stages that were held back, with the reasons in words."""
    found = store.read_json(store.run_dir(root, run) / HELD)
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def damaged_held(root: Path, run: str) -> list[str]:
    """What is wrong with the note, as a message."""
    path = store.run_dir(root, run) / HELD
    is_whole = not path.exists() or isinstance(store.read_json(path), dict)
    return [] if is_whole else [f"{path}: damaged, so nothing counts as held back; `prism-launch run` writes it anew"]


def write_held(root: Path, run: str, held: Mapping[str, str]) -> None:
    """Note what is held back now."""
    path = store.run_dir(root, run) / HELD
    if held:
        store.write_json(path, dict(held))
    else:
        path.unlink(missing_ok=True)


def waits_for_room(root: Path, run: str) -> bool:
    """Whether a cap holds stages back, so that they can be submitted later without anything else changing."""
    return any(why.startswith(_HELD_BACK) for why in read_held(root, run).values())
