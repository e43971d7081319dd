"""Reasoning problems from reasoning-gym: drawn, held out by text, written with a trace, and judged.

A problem is a plain dict, one line of SET.jsonl: `id, task, prompt, answer, trace, entry`; `entry` is what the task's
own verifier needs.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from launcher.configs import GeneratedSet
from launcher.errors import UserError
from launcher.files import MOST_ROWS, read_bytes
from launcher.user_json import bounded, decode, rows

OPEN, CLOSE = "<think>", "</think>"
#: Draws for each problem wanted, before a task is called exhausted.
DRAWS = 200
_WELL_FORMED = re.compile(rf"\s*{OPEN}((?:(?!</?think>).)+){CLOSE}((?:(?!</?think>).)+)", re.DOTALL)

Problem = Mapping[str, Any]


# ------------------------------------------------------------------------------------------------------------ traces


def _trace_chain_sum(entry: Problem) -> str:
    parts = entry["question"].rpartition(": ")[2].rstrip(" =").split()
    total, steps = int(parts[0]), []
    for sign, term in zip(parts[1::2], parts[2::2], strict=True):
        new = total + int(term) if sign == "+" else total - int(term)
        steps.append(f"{total}{sign}{term}={new}")
        total = new
    return " ".join(steps) or parts[0]


def _trace_gcd(entry: Problem) -> str:
    found, *others = map(int, re.findall(r"\d+", entry["question"]))
    steps = []
    for number in others:
        a, b = max(found, number), min(found, number)
        while b:
            steps.append(f"{a}={a // b}*{b}+{a % b}")
            a, b = b, a % b
        found = a
    return " ".join(steps)


def _trace_count_bits(entry: Problem) -> str:
    number, ones = int(re.findall(r"\d+", entry["question"])[-1]), 0
    steps: list[str] = []
    while number or not steps:
        ones += number % 2
        steps.append(f"{number}=2*{number // 2}+{number % 2},{ones}")
        number //= 2
    return " ".join(steps)


#: Tasks whose working can be written out from the question, by rule.
TRACES: dict[str, Callable[[Problem], str]] = {
    "chain_sum": _trace_chain_sum,
    "gcd": _trace_gcd,
    "count_bits": _trace_count_bits,
}


def totals_of(trace: str) -> list[int]:
    """The running totals in a chain_sum trace."""
    return [int(step.rpartition("=")[2]) for step in trace.split()]


# ----------------------------------------------------------------------------------------------------------- drawing


def normalised(text: str) -> str:
    """The text by which problems count as the same: case and white space do not matter."""
    return " ".join(text.casefold().split())


def open_task(name: str, config: GeneratedSet, seed: int) -> Iterator[dict[str, Any]]:
    """The draws of a problem set, an entry of the task each. Raises UserError for an unknown task or setting."""
    import reasoning_gym

    if config.task not in TRACES:
        raise UserError(f"problems.{name}.task: no traces for task {config.task}; there is {', '.join(TRACES)}")
    if config.totals and config.task != "chain_sum":
        raise UserError(f"problems.{name}.totals: only chain_sum has running totals, {config.task} has none")
    size = config.count * DRAWS
    # reasoning-gym seeds item i by seed + i, so neighbouring seeds would give the same problems.
    start = seed * 10**9 + config.seed_offset
    try:
        dataset = reasoning_gym.create_dataset(config.task, size=size, seed=start, **config.settings)
        first = dataset[0]
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"problems.{name}.settings: task {config.task} refuses them: {error}") from None
    return itertools.chain([first], (dataset[i] for i in range(1, size)))


def draw_problems(name: str, config: GeneratedSet, seed: int, excluded: Iterable[str] = ()) -> list[dict[str, Any]]:
    """`config.count` different problems, none whose normalised prompt is in `excluded`.

    Raises UserError for an unknown task or setting, or where the task has fewer problems than wanted.
    """
    trace = TRACES.get(config.task, str)
    found: list[dict[str, Any]] = []
    seen = set(excluded)
    for entry in open_task(name, config, seed):
        prompt = entry["question"] + "\n"
        text = normalised(prompt)
        if text in seen:
            continue
        working = trace(entry)
        if config.totals and not all(config.totals[0] <= t <= config.totals[1] for t in totals_of(working)):
            continue
        seen.add(text)
        answer = str(entry["answer"])
        row = {"id": f"{name}-{len(found)}", "task": config.task, "prompt": prompt, "answer": answer, "trace": working}
        found.append({**row, "entry": json.loads(json.dumps(entry, default=str))})
        if len(found) == config.count:
            return found
    raise UserError(
        f"problems.{name}.count: {config.count} wanted, but {DRAWS * config.count} draws of {config.task} gave only "
        f"{len(found)} different ones; ask for fewer or widen `settings` and `totals`"
    )


def problem_text(problem: Problem, terse: bool = False) -> str:
    """A problem as training text: question, trace, answer; a terse trace states the answer without working."""
    working = f"={problem['answer']}" if terse else problem["trace"]
    return f"{problem['prompt']}{OPEN}{working}{CLOSE}{problem['answer']}"


def read_problems(path: Path) -> list[dict[str, Any]]:
    """The problems of a SET.jsonl. Raises UserError naming every line that is none."""
    try:
        text = decode(read_bytes(path, MOST_ROWS), str(path))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    problems: list[dict[str, Any]] = []
    wrong: list[str] = []
    for place, row in rows(text, str(path), wrong):
        try:
            problems.append(_problem(row))
        except ValueError as error:
            wrong.append(f"{place}: not a problem: {error}")
    if wrong or not problems:
        raise UserError(bounded(wrong, str(path)) or f"{path}: holds no problem")
    return problems


def _problem(row: object) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError("expected a JSON object")
    missing = [key for key in ("id", "task", "prompt", "answer", "trace", "entry") if key not in row]
    if missing:
        raise ValueError(f"without {', '.join(missing)}")
    wrong = [key for key in ("id", "task", "prompt", "answer", "trace") if not isinstance(row[key], str)]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} must be text")
    if not row["prompt"].strip():
        raise ValueError("its prompt is blank")
    return row


# ----------------------------------------------------------------------------------------------------------- judging


@lru_cache
def _scorer(task: str) -> Callable[..., float]:
    import reasoning_gym  # late: it takes two seconds, and who only reads problems does not need it

    scorer: Callable[..., float] = reasoning_gym.get_score_answer_fn(task)
    return scorer


def reward(completion: str, problem: Problem, ended: bool) -> float:
    """1 for exactly one non-empty <think> block, then an answer that the task rates 1.0, then the end token; else 0.

    `ended` says whether the end token came; text after it is not part of `completion`.
    """
    match = _WELL_FORMED.fullmatch(completion)
    if not ended or match is None or not match[1].strip():
        return 0.0
    return 1.0 if _scorer(problem["task"])(match[2].strip(), problem["entry"]) == 1.0 else 0.0


def trace_kind(completion: str) -> str | None:
    """`terse` for a trace that states the answer alone, `worked` for any other, None where there is no trace."""
    match = _WELL_FORMED.fullmatch(completion)
    if match is None:
        return None
    return "terse" if match[1].startswith("=") else "worked"
