"""A stage as one job or as a chain of them."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher import links, slurm, store
from launcher.errors import WorldError
from launcher.links import link_that_counts, newest_links, submit_links
from launcher.slurm import Job
from launcher.spec import Limits
from tests.supervisor.counting import counting_stage, counting_step

CHAIN = Limits(continuation="chain", chain_jobs=3)


class Queue:
    """Stands for sbatch and scancel: takes `room` jobs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int = 99):
        self.calls: list[tuple[str, ...]] = []
        self.cancelled: list[str] = []
        self.room = room
        monkeypatch.setattr(slurm, "submit", self.submit)
        monkeypatch.setattr(slurm, "cancel", self.cancelled.extend)

    def submit(self, script: str, *options: str, known: Set[str]) -> str:
        if len(self.calls) == self.room:
            raise WorldError("sbatch: no more")
        self.calls.append(options)
        return str(10 + len(self.calls))


@pytest.mark.parametrize(
    ("limits", "after", "options"),
    [
        (Limits(), (), [()]),
        (Limits(), ("7", "8"), [("--dependency=afterok:7:8",)]),
        (CHAIN, (), [(), ("--dependency=afterany:11",), ("--dependency=afterany:12",)]),
        (
            CHAIN,
            ("7",),
            [
                ("--dependency=afterok:7",),
                ("--dependency=afterok:7,afterany:11",),
                ("--dependency=afterok:7,afterany:12",),
            ],
        ),
    ],
)
def test_each_job_waits_for_inputs_and_the_one_before(
    monkeypatch: pytest.MonkeyPatch, limits: Limits, after: tuple[str, ...], options: list[tuple[str, ...]]
) -> None:
    queue, written = Queue(monkeypatch), []
    last = submit_links("script", limits, after, lambda job, chain: written.append((job, chain)))
    assert queue.calls == options
    jobs = [str(11 + i) for i in range(len(options))]
    assert last == jobs[-1] and written == [(job, "11" if len(jobs) > 1 else None) for job in jobs]


def test_half_a_chain_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(monkeypatch, room=2)
    with pytest.raises(WorldError):
        submit_links("script", CHAIN, (), lambda job, chain: None)
    assert queue.cancelled == ["11", "12"]


@dataclass(frozen=True)
class Line:
    job: str
    chain: str | None = None


def test_the_newest_submission_counts() -> None:
    old, new = [Line("1", "1"), Line("2", "1")], [Line("5", "5"), Line("6", "5")]
    assert newest_links([*old, *new]) == new
    assert newest_links([*old, Line("3")]) == [Line("3")]
    assert newest_links([Line("3"), *old]) == old
    assert newest_links([]) == []


@pytest.mark.parametrize(
    ("states", "counts"),
    [
        (("PENDING", "PENDING", "PENDING"), "1"),
        (("RUNNING", "PENDING", "PENDING"), "1"),
        (("FAILED", "PENDING", "PENDING"), "2"),
        (("FAILED", "RUNNING", "PENDING"), "2"),
        (("COMPLETING", "RUNNING", "PENDING"), "2"),
        (("FAILED", "FAILED", "FAILED"), "3"),
        (("CANCELLED", "CANCELLED", None), "3"),
    ],
)
def test_which_link_tells_of_the_stage(tmp_path: Path, states: tuple[str | None, ...], counts: str) -> None:
    known = {str(i): Job(str(i), state) for i, state in enumerate(states, 1) if state}
    found = link_that_counts(tmp_path, counting_stage(counting_step()), ("1", "2", "3"), known)
    assert (found.id, found.state) == (counts, states[int(counts) - 1] or "GONE")


@pytest.mark.parametrize(("action", "counts"), [("stop", "1"), ("again", "2")])
def test_a_link_that_failed_for_good_tells_at_once(tmp_path: Path, action: str, counts: str) -> None:
    spec = counting_stage(counting_step())
    folder = store.new_attempt(store.stage_dir(tmp_path, spec.run, spec.stage), "1.0")
    end = f'{{"time": 2, "event": "end", "class": "crashed", "action": "{action}"}}'
    start = f'{{"time": 1, "event": "start", "owner": null, "fingerprint": "{spec.fingerprint}"}}'
    (folder / "events.jsonl").write_text(f"{start}\n{end}\n")
    known = {"1": Job("1", "FAILED"), "2": Job("2", "PENDING")}
    assert link_that_counts(tmp_path, spec, ("1", "2"), known).id == counts
    assert links.job_count(CHAIN) == 3 and links.job_count(Limits(chain_jobs=9)) == 1
