"""What a run does and does not show: statements, each with a condition on the data that it needs to be true.

The paper's figures are PRISM's, arXiv 2603.17074: changed elements from Table 22 (Granite-3.3, 1 %), norms and CKA
from section 10 and appendix I, sizes from section 7.
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
    lineage,
    listed,
    percent,
    stage_row,
    unique,
)
from launcher.report.words import lowest_cka, selection, taught_both
from launcher.units import format_count

PAPER = "arXiv 2603.17074"
PAPER_CHANGED = {"train": 0.965, "rl": 0.05}
PAPER_RL_L2 = (0.0003, 0.0007)
PAPER_RL_CKA = 0.998
PAPER_PARAMETERS = 3e9


class Statement(NamedTuple):
    """A heading and what stands under it."""

    heading: str
    text: str


def limits(data: Data) -> list[Statement]:
    """What is design and what is found, what of the paper does not come out, and how far the numbers reach."""
    parts = (_selects, _held_out, _not_held_out, _no_signal, _sparsity, _cka_of_rl, _size, _backend, _cpu, _seeds)
    return [statement for part in parts for statement in part(data)]


def _selects(data: Data) -> Iterator[Statement]:
    found = {s["name"]: s for r in data["stages"] if r["kind"] == "rl" for s in taught_both(data, r["start"])}
    if not selection(data):
        return
    for name, source in found.items():
        text = (
            f"The training text {name} holds two kinds of right trace: {percent(source['terse_share'], 0)} state the "
            "answer alone, the rest work it out. That is design. RL can raise accuracy by choosing the better of two "
            "taught kinds without learning anything new; how far it did so is computed above, under How the answers "
            "are reached."
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
    sets = [(held["name"], other["name"]) for held, other, excluded in _benchmark_sets(data) if excluded]
    for name in unique(held for held, _ in sets):
        others = listed(other for held, other in sets if held == name)
        text = (
            f"No problem of {name} stands, by its text, in {others}. But all are drawn by one rule with the same "
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
        start = row["start"]
        text = f"All {row['samples']} rewards of {row['stage']} were 0, so it had nothing to learn from."
        if untaught := _never_taught(data, start):
            text += (
                f" {start} was trained on {listed(untaught)} alone, text without written traces: this too is design."
            )
        changes = [r for r in data["weights"] if (r["from"], r["to"]) == (start, row["stage"])]
        if changes and all(r.get("bits_changed_fraction") == 0 for r in changes):
            text += " Its weights are those of its start, to the bit; that it changed nothing says nothing about RL."
        yield Statement(f"RL from {start} had no signal", text)


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
        text = (
            f"The paper ({PAPER}, Table 22) finds {percent(PAPER_CHANGED['rl'], 0)} of the weights changed by more "
            f"than {percent(0.01, 0)} in RL and {percent(PAPER_CHANGED['train'])} in mid-training (Granite-3.3). Here, "
            f"{row['from']} → {row['to']} changed {percent(row['changed_fraction'])} by more than "
            f"{percent(row['threshold'], 0)}, with a relative L2 of {figure(row['relative_l2'])} (the paper: "
            f"{PAPER_RL_L2[0]:g} to {PAPER_RL_L2[1]:g}, by module)."
        )
        for other in at_threshold(data["weights"]):
            if stage_row(data, other["to"]).get("kind") == "train":
                text += f" {other['from']} → {other['to']}, trained on text: {percent(other['changed_fraction'])}."
        yield Statement(_sparsity_verdict(data, row["changed_fraction"]), text)


def _sparsity_verdict(data: Data, measured: float) -> str:
    """Within a factor of two of the paper's figure counts as the same."""
    ratio = measured / PAPER_CHANGED["rl"]
    if ratio > 2:
        return f"Does not reproduce {'at this size' if _is_small(data) else 'here'}: RL's sparsity"
    return "RL's sparsity is about the paper's" if ratio >= 0.5 else "RL changed fewer weights than in the paper"


def _cka_of_rl(data: Data) -> Iterator[Statement]:
    for row in _rl_changes(data):
        lowest = lowest_cka(data, row["from"], row["to"])
        if not lowest:
            continue
        verdict = "as in the paper" if min(lowest.values()) > PAPER_RL_CKA else "further apart than in the paper"
        numbers = listed(f"{cka_text(value)} on {texts}" for texts, value in lowest.items())
        text = (
            f"The paper's CKA before and after RL is above {PAPER_RL_CKA} at every layer. Here the lowest of "
            f"{row['from']} → {row['to']} is {numbers}."
        )
        yield Statement(f"Representations before and after RL: {verdict}", text)


def _is_small(data: Data) -> bool:
    count = (data["model"] or {}).get("parameters")
    return count is not None and count < PAPER_PARAMETERS / 10


def _size(data: Data) -> Iterator[Statement]:
    if _is_small(data):
        count = data["model"]["parameters"]
        text = (
            f"The model has {format_count(count)} parameters, the paper's have 3 to 24 billion. What happens here need "
            "not happen there, and the sizes of effects do not carry over."
        )
        yield Statement("A small model", text)


def _backend(data: Data) -> Iterator[Statement]:
    found = [s["stage"] for s in data["stages"] if s["backend"] == "trl" and s["state"] == "done"]
    if found:
        text = f"{listed(found)} ran on TRL's GRPOTrainer with a rule for reward, not on the paper's RL code."
        yield Statement("RL engine: trl", text)


def _cpu(data: Data) -> Iterator[Statement]:
    found = [s["stage"] for s in data["stages"] if s["kind"] == "train" and s["cpu_mode"]]
    if found:
        ran = f"{listed(found)} ran as megatron-core on a CPU with reference kernels."
        yield Statement("On a CPU", f"{ran} Times and speeds say nothing about GPUs.")


def _seeds(data: Data) -> Iterator[Statement]:
    if data["results"]:
        text = (
            "Error bars are binomial: they stand for the choice of problems and for sampling, not for training again "
            "with another seed, which may move results by more. All checkpoints answer the same problems; comparisons "
            "take their errors as independent. Every temperature that was tried is shown."
        )
        yield Statement("One run, one seed", text)
