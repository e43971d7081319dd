"""What the numbers say, in words. Every sentence is computed: it stands only where the data of the run bear it out.

The paper's figures are PRISM's, arXiv 2603.17074: changed elements from Table 22 (Granite-3.3, 1 %), norms and CKA
from section 10 and appendix I.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from launcher.report.numbers import (
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
    stage_row,
    unique,
)
from launcher.units import format_count, format_duration

#: A difference counts from this many standard errors on.
CLEAR = 3.0
PAPER = "arXiv 2603.17074"
PAPER_CHANGED = {"train": 0.965, "rl": 0.05}
PAPER_RL_L2 = (0.0003, 0.0007)
PAPER_RL_CKA = 0.998
PAPER_PARAMETERS = 3e9


class Statement(NamedTuple):
    """A heading and what stands under it."""

    heading: str
    text: str


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
    tuned = [f"{s['stage']} from {s['start']} by {s['backend']}" for s in done if s["kind"] == "rl"]
    text += f" Reinforcement learning: {listed(tuned)}." if tuned else ""
    return text + (f" Seed {data['seed']}." if data["seed"] is not None else "")


def findings(data: Data) -> list[str]:
    """One sentence for each comparison that the run makes."""
    return [*_comparisons(data), *_weights(data), *_representations(data), *_rewards(data)]


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
    above, below = [t for t in gaps if gaps[t] >= CLEAR], [t for t in gaps if gaps[t] <= -CLEAR]
    numbers = "; ".join(f"T = {t:g}: {percent(b['accuracy'])} against {percent(a['accuracy'])}" for t, a, b in rows)
    head, tail = f"On {benchmark}, {high} is", f"({low}; {numbers}; n = {listed(unique(b['n'] for _, _, b in rows))})."
    tail = f"({numbers}; n = {listed(unique(b['n'] for _, _, b in rows))})."
    for hits, word in ((above, "above"), (below, "below")):
        if len(hits) == len(gaps):
            least = min(abs(g) for g in gaps.values())
            return f"{head} {word} {low} at every temperature tried, by at least {least:.1f} standard errors {tail}"
    parts = [
        f"{word} at T = {listed(f'{t:g}' for t in hits)}" for hits, word in ((above, "above"), (below, "below")) if hits
    ]
    if parts:
        return f"{head} not above or below {low} throughout: {' and '.join(parts)} by {CLEAR:g} standard errors or more, elsewhere not {tail}"
    return f"{head} not clearly different from {low}: every difference is below {CLEAR:g} standard errors {tail}"


def _weights(data: Data) -> Iterator[str]:
    rows = {(r["from"], r["to"]): r for r in at_threshold(data["weights"])}
    for (a, b), row in rows.items():
        yield (
            f"From {a} to {b}, {percent(row['changed_fraction'])} of the weights changed by more than "
            f"{percent(row['threshold'], 0)}; relative L2 {figure(row['relative_l2'])}."
        )
    for (a, b), row in rows.items():
        for (start, end), later in rows.items():
            if b == start and later["relative_l2"] and row["relative_l2"]:
                ratio = row["relative_l2"] / later["relative_l2"]
                yield f"In relative L2, {a} to {b} moved the weights {figure(ratio, 2)} times as far as {start} to {end}."


def _representations(data: Data) -> Iterator[str]:
    for a, b in pairs(data["cka"]):
        lowest = [f"{cka_text(value)} on {texts}" for texts, value in lowest_cka(data, a, b).items()]
        if lowest:
            yield f"Representations of {a} and {b}: lowest CKA of any layer {listed(lowest)}."


def lowest_cka(data: Data, start: str, end: str) -> dict[str, float]:
    """The lowest CKA of any layer of a pair, by kind of text."""
    rows = [r for r in data["cka"] if (r["from"], r["to"]) == (start, end) and r["value"] is not None]
    texts = unique(r.get("texts", "texts") for r in rows)
    return {t: min(r["value"] for r in rows if r.get("texts", "texts") == t) for t in texts}


def _rewards(data: Data) -> Iterator[str]:
    for row in data["rewards"]:
        if row["samples"]:
            yield (
                f"{row['stage']}: {row['zeros']} of {row['samples']} rewards were 0 ({percent(row['zeros'] / row['samples'])}); "
                f"{row['silent_steps']} of {row['step']} steps had no reward at all."
            )


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
    expected, lift = expected_by_selection(before, after), after["accuracy"] - before["accuracy"]
    text = (
        f"{before['benchmark']}, T = {before['temperature']:g}: from {stage['start']} to {stage['stage']} the share of worked "
        f"traces went from {percent(before['worked_share'])} to {percent(after['worked_share'])}. {stage['start']} was right "
        f"in {percent(before['worked_accuracy'])} of its worked and {percent(before['terse_accuracy'])} of its terse traces; "
        f"the new shares at these accuracies would give {percent(expected)}, measured are {percent(after['accuracy'])}"
    )
    if gap(before, after) < CLEAR:
        return f"{text}. There is no clear lift to explain."
    share = (expected - before["accuracy"]) / lift
    return f"{text}: choosing accounts for {percent(share, 0)} of the lift of {100 * lift:.1f} points."


# --------------------------------------------------------------------------------------- what this does and does not show


def limits(data: Data) -> list[Statement]:
    """What is design and what is found, what of the paper does not come out, and how far the numbers reach."""
    parts = (_selects, _held_out, _not_held_out, _no_signal, _sparsity, _cka_of_rl, _size, _backend, _cpu, _seeds)
    return [statement for part in parts for statement in part(data)]


def _selects(data: Data) -> Iterator[Statement]:
    found = {s["name"]: s for r in data["stages"] if r["kind"] == "rl" for s in taught_both(data, r["start"])}
    explained = selection(data)
    for name, source in found.items():
        if explained:
            text = (
                f"The training text {name} holds two kinds of right trace: {percent(source['terse_share'], 0)} state the answer "
                "alone, the rest work it out. That is design. RL can raise accuracy by choosing the better of two taught "
                "kinds without learning anything new; how far it did so is computed under the results."
            )
            yield Statement("Design, not discovery: RL selects among taught traces", text)


def _benchmark_sets(data: Data) -> Iterator[tuple[Row, Row, bool]]:
    """(held-out set, other set of the same task and settings, whether the other leaves the first one's texts out)."""
    names = {r["benchmark"] for r in data["results"]}
    same = ("stage", "task", "settings", "totals")
    for held in data["problem_sets"]:
        for other in data["problem_sets"]:
            if held["name"] in names and other["name"] not in names and all(held[k] == other[k] for k in same):
                yield held, other, held["name"] in (other["exclude"] or ())


def _held_out(data: Data) -> Iterator[Statement]:
    for name in unique(held["name"] for held, _, excluded in _benchmark_sets(data) if excluded):
        others = [o["name"] for held, o, excluded in _benchmark_sets(data) if excluded and held["name"] == name]
        text = (
            f"No problem of {name} stands, by its text, in {listed(others)}. But all are drawn by one rule with the same "
            "settings, from the same closed space: the problems are new, their single steps are not."
        )
        yield Statement("Held out by text, not by kind", text)


def _not_held_out(data: Data) -> Iterator[Statement]:
    for held, other, excluded in _benchmark_sets(data):
        if not excluded:
            text = f"{other['name']} was drawn without leaving out the problems of {held['name']}: the two may overlap."
            yield Statement("Not held out", text)


def _no_signal(data: Data) -> Iterator[Statement]:
    for row in data["rewards"]:
        if not row["all_zero"]:
            continue
        text = f"All {row['samples']} rewards of {row['stage']} were 0, so it had nothing to learn from."
        if untaught := _never_taught(data, row["start"]):
            text += f" {row['start']} was trained on {listed(untaught)} alone, which hold no written traces: this is design too."
        changes = [r for r in data["weights"] if (r["from"], r["to"]) == (row["start"], row["stage"])]
        if changes and all(r.get("bits_changed_fraction") == 0 for r in changes):
            text += (
                " Its weights are those of its start, to the bit; that it does not change them says nothing about RL."
            )
        yield Statement(f"RL from {row['start']} had no signal", text)


def _never_taught(data: Data, checkpoint: str) -> list[str]:
    """The sources of a checkpoint made here from random weights, if all are library code; else none can be named."""
    trained = lineage(data, checkpoint)
    if stage_row(data, trained[-1]).get("kind") != "train":
        return []
    read = unique(r["source"] for r in data["data_mix"] if r["stage"] in trained)
    kinds = {f"{s['stage']}/{s['name']}": s["kind"] for s in data["sources"]}
    return read if read and all(kinds.get(name) == "python-stdlib" for name in read) else []


def _rl_changes(data: Data) -> Iterator[Row]:
    """The change at 1 % from an RL stage's start to the stage, where there was a reward to learn from."""
    silent = {r["stage"] for r in data["rewards"] if r["all_zero"]}
    for row in at_threshold(data["weights"]):
        stage = stage_row(data, row["to"])
        if stage.get("kind") == "rl" and stage["start"] == row["from"] and row["to"] not in silent:
            yield row


def _sparsity(data: Data) -> Iterator[Statement]:
    for row in _rl_changes(data):
        measured, paper = row["changed_fraction"], PAPER_CHANGED["rl"]
        near = measured <= 2 * paper
        text = (
            f"The paper ({PAPER}, Table 22) finds about {percent(paper, 0)} of the weights changed by more than 1 % in RL and "
            f"{percent(PAPER_CHANGED['train'])} in mid-training (Granite-3.3). Here, {row['from']} to {row['to']} changed "
            f"{percent(measured)} by more than {percent(row['threshold'], 0)}, with a relative L2 of {figure(row['relative_l2'])} "
            f"(the paper: {PAPER_RL_L2[0]:g} to {PAPER_RL_L2[1]:g} by module)."
        )
        head = "RL's sparsity is of the paper's order" if near else "Does not reproduce at this size: RL's sparsity"
        yield Statement(head, text)


def _cka_of_rl(data: Data) -> Iterator[Statement]:
    for row in _rl_changes(data):
        lowest = lowest_cka(data, row["from"], row["to"])
        low = {t: v for t, v in lowest.items() if v <= PAPER_RL_CKA}
        if not lowest:
            continue
        head = (
            "Representations before and after RL: nearly the paper's"
            if low
            else "Representations before and after RL: as in the paper"
        )
        if low and min(low.values()) < 0.95:
            head = "Does not reproduce: representations before and after RL"
        numbers = listed(f"{cka_text(value)} on {texts}" for texts, value in lowest.items())
        text = f"The paper's CKA before and after RL is above {PAPER_RL_CKA} at every layer. Here the lowest of {row['from']} and {row['to']} is {numbers}."
        yield Statement(head, text)


def _size(data: Data) -> Iterator[Statement]:
    count = (data["model"] or {}).get("parameters")
    if count and count < PAPER_PARAMETERS / 10:
        text = f"The model has {format_count(count)} parameters, the paper's have 3 to 24 billion. What happens here need not happen there; the sizes of effects do not carry over."
        yield Statement("A small model", text)


def _backend(data: Data) -> Iterator[Statement]:
    names = unique(s["backend"] for s in data["stages"] if s["kind"] == "rl" and s["backend"] == "trl")
    if names:
        yield Statement(
            "RL engine: trl", "RL ran on TRL's GRPOTrainer with a rule for reward, not on the paper's RL code."
        )


def _cpu(data: Data) -> Iterator[Statement]:
    found = [s["stage"] for s in data["stages"] if s["kind"] == "train" and s["cpu_mode"]]
    if found:
        text = f"{listed(found)} ran as megatron-core on a CPU with reference kernels. Times and speeds say nothing about GPUs."
        yield Statement("On a CPU", text)


def _seeds(data: Data) -> Iterator[Statement]:
    if data["results"]:
        text = (
            "Error bars are binomial: they stand for the choice of problems and for sampling, not for training again with another "
            "seed, which may move results by more. All checkpoints answer the same problems; comparisons treat them as "
            "independent. Every temperature that was tried is shown."
        )
        yield Statement("One run, one seed", text)
