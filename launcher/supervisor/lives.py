"""Whether a stage gets another life, and without which nodes: from the lives that it has had. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from launcher.attempts import Attempt, step_of
from launcher.spec import ExitClass, Limits
from launcher.supervisor.classify import Outcome

#: Ends that say nothing of the stage itself; what fails a preflight is bounded by the nodes that may be left out.
_NOT_ITS_FAULT: tuple[ExitClass, ...] = ("preempted", "requeued", "node-failure")


def next_life(result: Outcome, lives: Sequence[Attempt], limits: Limits) -> Outcome:
    """The outcome of the newest of a stage's lives, with what the earlier ones add to it.

    `lives`: all of this submission, the newest last, whose end is `result` and not written yet.
    """
    if result.action != "again":
        return result
    result = _with_strikes(result, lives)
    fruitless = lives_without_progress(lives, result)
    if fruitless > limits.max_no_progress:
        return _stop(result, f"given up: {fruitless} lives in a row without progress, at the end of the last: ")
    known = {node for life in lives for node in (life.end.excluded if life.end else ())}
    if len(known | set(result.exclude)) <= limits.max_excluded:
        return result
    if result.exit_class == "node-failure":  # Slurm itself gives no job to a node that is down
        return replace(result, exclude=())
    out = f", and {', '.join(sorted(known))} are left out already" if known else ""
    return _stop(replace(result, exclude=()), f"given up: limits.max_excluded is {limits.max_excluded}{out}: ")


def _stop(result: Outcome, why: str) -> Outcome:
    return replace(result, action="stop", message=f"{why}{result.message or result.exit_class}")


def _with_strikes(result: Outcome, lives: Sequence[Attempt]) -> Outcome:
    """A suspect that was one before is left out."""
    before = {node for life in lives for node in (life.end.suspect if life.end else ())}
    twice = tuple(node for node in result.suspect if node in before)
    return replace(result, exclude=(*result.exclude, *twice))


def lives_without_progress(lives: Sequence[Attempt], result: Outcome) -> int:
    """How many of the latest lives in a row did not get further than those before them, through their own fault."""
    count = best = 0
    for life in lives:
        ended, excluded = (life.end.exit_class, life.end.excluded) if life.end else (None, ())
        if life is lives[-1]:
            ended, excluded = result.exit_class, result.exclude
        further = step_of(life) > best
        best = max(best, step_of(life))
        if further:
            count = 0
        elif ended not in _NOT_ITS_FAULT and not excluded:
            count += 1
    return count


def end_of_chain(result: Outcome, jobs: int) -> Outcome:
    """The outcome of a chain's last job that would need another one."""
    mend = "run again for another chain, or raise limits.chain_jobs"
    return _stop(result, f"the chain of {jobs} jobs is used up; {mend}: ")
