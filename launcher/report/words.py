"""What the numbers say, in words. Every sentence is computed, and stands only where the data of the run bear it out."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.report.numbers import (
    NBSP,
    Data,
    Row,
    at_threshold,
    cka_text,
    figure,
    gap,
    lineage,
    listed,
    pairs,
    percent,
    results_by_temperature,
    unique,
)
from launcher.units import format_count, format_duration

#: A difference counts from this many standard errors on.
CLEAR = 3.0


# ------------------------------------------------------------------------------------------------------------ summary


def introduction(data: Data) -> str:
    """What ran, in a few sentences."""
    done = [s for s in data["stages"] if s["state"] == "done"]
    seconds = sum(s["cpu_seconds"] or 0 for s in done)
    text = f"{len(done)} of {len(data['stages'])} stages are done, at a cost of {format_duration(seconds)} of CPU time."
    if (model := data["model"]) is not None:
        size = f" with {format_count(model['parameters'])} parameters" if model["parameters"] else ""
        text += f" The model is {model['name']} (family {model['family']}){size}."
    trained = [f"{s['stage']} on {format_count(s['tokens'])} tokens" for s in done if s["tokens"]]
    text += f" Trained: {listed(trained)}." if trained else ""
    merged = [f"{s['stage']} = {s['engine']}" for s in done if s["kind"] == "merge"]
    text += f" Merged: {listed(merged)}." if merged else ""
    tuned = [f"{s['stage']} from {s['start']} by {s['backend']}" for s in done if s["kind"] == "rl"]
    text += f" Reinforcement learning: {listed(tuned)}." if tuned else ""
    return text + (f" Seed {data['seed']}." if data["seed"] is not None else "")


def findings(data: Data) -> list[str]:
    """One sentence for each comparison that the run makes."""
    return [*_comparisons(data), *_changes(data), *_distances(data), *_rewards(data)]


def steps(data: Data) -> list[tuple[str, str]]:
    """Pairs of checkpoints to compare: each with what it was trained from, and RL with training from the same start."""
    rows = [s for s in data["stages"] if s["start"]]
    direct = [(s["start"], s["stage"]) for s in rows]
    sideways = [
        (r["stage"], t["stage"])
        for r in rows
        for t in rows
        if r["kind"] == "rl" and t["kind"] == "train" and r["start"] == t["start"]
    ]
    return [*direct, *sideways]


def _comparisons(data: Data) -> Iterator[str]:
    for benchmark in unique(r["benchmark"] for r in data["results"]):
        for low, high in steps(data):
            first, second = (results_by_temperature(data, benchmark, name) for name in (low, high))
            both = [t for t in first if t in second]
            if both:
                yield _compare(benchmark, low, high, [(t, first[t], second[t]) for t in both])


def _compare(benchmark: str, low: str, high: str, rows: list[tuple[float, Row, Row]]) -> str:
    """Says `above` or `below` only where the numbers show it by CLEAR standard errors."""
    gaps = {t: gap(a, b) for t, a, b in rows}
    sides = {"above": [t for t in gaps if gaps[t] >= CLEAR], "below": [t for t in gaps if gaps[t] <= -CLEAR]}
    head = f"On {benchmark}, {high} is"
    for word, hits in sides.items():
        if len(hits) == len(gaps):
            least = min(abs(g) for g in gaps.values())
            return (
                f"{head} {word} {low} at every temperature tried, by {least:.1f} standard errors or more {_tail(rows)}."
            )
    parts = [f"{word} it at T = {listed(f'{t:g}' for t in hits)}" for word, hits in sides.items() if hits]
    if parts:
        end = f"by {CLEAR:g} standard errors or more, not elsewhere {_tail(rows)}."
        return f"{head} not on one side of {low} throughout: {' and '.join(parts)} {end}"
    end = f"every difference is below {CLEAR:g} standard errors {_tail(rows)}."
    return f"{head} not clearly different from {low}: {end}"


def _tail(rows: list[tuple[float, Row, Row]]) -> str:
    """`(54.4 / 57.6 % against 0.0 / 0.0 % at T = 0 / 1, n = 500)`."""
    temperatures = " / ".join(f"{t:g}" for t, _, _ in rows)
    first = " / ".join(f"{100 * a['accuracy']:.1f}" for _, a, _ in rows)
    second = " / ".join(f"{100 * b['accuracy']:.1f}" for _, _, b in rows)
    counts = listed(unique(row["n"] for _, a, b in rows for row in (a, b)))
    return f"({second}{NBSP}% against {first}{NBSP}% at T = {temperatures}, n = {counts})"


def _changes(data: Data) -> Iterator[str]:
    """Of each pair: weights changed, and representations."""
    rows = {(r["from"], r["to"]): r for r in at_threshold(data["weights"])}
    for pair in unique([*rows, *pairs(data["cka"])]):
        parts = []
        if (row := rows.get(pair)) is not None:
            share = (
                f"{percent(row['changed_fraction'])} of the weights changed by more than {percent(row['threshold'], 0)}"
            )
            parts += [share, f"relative L2 {figure(row['relative_l2'])}"]
        lowest = [f"{cka_text(value)} on {texts}" for texts, value in lowest_cka(data, *pair).items()]
        parts += [f"lowest CKA of any layer {listed(lowest)}"] if lowest else []
        yield f"{pair[0]} → {pair[1]}: {'; '.join(parts) or 'no figure'}."


def _distances(data: Data) -> Iterator[str]:
    """How much further the weights moved into a checkpoint than on from it."""
    moved = {(r["from"], r["to"]): r["relative_l2"] for r in at_threshold(data["weights"])}
    for (a, b), before in moved.items():
        for (start, end), after in moved.items():
            if b == start and before and after:
                ratio = before / after
                times = f"{ratio:,.0f}" if ratio >= 10 else figure(ratio, 2)
                yield f"In relative L2, {a} → {b} moved the weights {times} times as far as {start} → {end}."


def lowest_cka(data: Data, start: str, end: str) -> dict[str, float]:
    """The lowest CKA of any layer of a pair, by kind of text."""
    rows = [r for r in data["cka"] if (r["from"], r["to"]) == (start, end) and r["value"] is not None]
    texts = unique(r.get("texts", "texts") for r in rows)
    return {t: min(r["value"] for r in rows if r.get("texts", "texts") == t) for t in texts}


def _rewards(data: Data) -> Iterator[str]:
    for row in data["rewards"]:
        if row["samples"]:
            zeros = f"{row['zeros']} of {row['samples']} rewards were 0 ({percent(row['zeros'] / row['samples'])})"
            yield f"{row['stage']}: {zeros}; {row['silent_steps']} of {row['step']} steps had no reward at all."


# ---------------------------------------------------------------------------------------- selection among taught traces


def taught_both(data: Data, checkpoint: str) -> list[Row]:
    """Sources with worked and terse traces that a checkpoint was trained on, itself or where it comes from."""
    trained = lineage(data, checkpoint)
    read = {r["source"] for r in data["data_mix"] if r["stage"] in trained}
    mixed = [s for s in data["sources"] if s["terse_share"] and s["terse_share"] < 1]
    return [s for s in mixed if f"{s['stage']}/{s['name']}" in read]


def selection(data: Data) -> list[str]:
    """For each RL stage that could choose between kinds of trace: how much of its lift the choice alone explains."""
    return [
        _explain(row, first[t], second[t])
        for row in data["stages"]
        if row["kind"] == "rl" and taught_both(data, row["start"])
        for benchmark in unique(r["benchmark"] for r in data["results"])
        for first in [results_by_temperature(data, benchmark, row["start"])]
        for second in [results_by_temperature(data, benchmark, row["stage"])]
        for t in first
        if t in second and first[t].get("formed")
    ]


def expected_by_selection(before: Row, after: Row) -> float:
    """Accuracy with the kinds of trace as they are after RL, each as often right as it was before."""
    kinds = ("worked", "terse")
    return float(sum(after[f"{kind}_share"] * (before[f"{kind}_accuracy"] or 0) for kind in kinds))


def _explain(stage: Row, before: Row, after: Row) -> str:
    start, expected = stage["start"], expected_by_selection(before, after)
    text = (
        f"{before['benchmark']}, T = {before['temperature']:g}: from {start} to {stage['stage']} the share of worked "
        f"traces went from {percent(before['worked_share'])} to {percent(after['worked_share'])}. {start} was right in "
        f"{percent(before['worked_accuracy'])} of its worked and {percent(before['terse_accuracy'])} of its terse "
        f"traces; the new shares at these accuracies would give {percent(expected)}, measured are "
        f"{percent(after['accuracy'])}"
    )
    if gap(before, after) < CLEAR:
        return f"{text}. There is no clear lift to explain."
    lift = after["accuracy"] - before["accuracy"]
    share = percent((expected - before["accuracy"]) / lift, 0)
    return f"{text}: choosing accounts for {share} of the lift of {100 * lift:.1f} points."
