"""The page: one HTML file that needs no network and no script. Pure: numbers and figures in, text out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.report.costs import costs
from launcher.report.limits import limits
from launcher.report.markup import bullets, figures, folded, paragraph, table, text
from launcher.report.numbers import (
    Data,
    Row,
    accuracy_text,
    at_threshold,
    cka_text,
    figure,
    listed,
    pairs,
    percent,
    results_by_temperature,
    unique,
)
from launcher.report.words import findings, introduction, lowest_cka, selection
from launcher.units import format_bytes, format_count, format_duration

Figures = Sequence[Mapping[str, str]]


def render_page(data: Data, drawn: Figures, trouble: str | None = None) -> str:
    """The whole page; `trouble` says why there are no figures."""
    sections = [
        ("results", "Results", _results(data, drawn)),
        ("kinds", "How the answers are reached", _kinds(data, drawn)),
        ("training", "Training", _training(data, drawn)),
        ("rl", "Reinforcement learning", _rl(data, drawn)),
        ("weights", "Weight change", _weights(data, drawn)),
        ("cka", "Similarity of representations", _cka(data, drawn)),
        ("data", "Data", _data(data, drawn)),
        ("run", "How it ran", _run(data)),
        ("cost", "What it cost", costs(data)),
        ("limits", "What this does and does not show", _limits(data)),
    ]
    shown = [(name, title, body) for name, title, body in sections if body]
    links = "".join(f'<a href="#{name}">{text(title)}</a>' for name, title, _ in shown)
    body = "".join(f'<section id="{n}"><h2>{text(title)}</h2>{inner}</section>' for n, title, inner in shown)
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(data['run'])}: prism-launch report</title><style>{_style()}</style></head>"
        f"<body><header>{_head(data, trouble)}</header><nav>{links}</nav><main>{body}</main></body></html>\n"
    )


def _style() -> str:
    return Path(__file__).with_name("page.css").read_text(encoding="utf-8")


def _of(drawn: Figures, section: str) -> Figures:
    return [f for f in drawn if f["section"] == section]


def _head(data: Data, trouble: str | None) -> str:
    started = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(data["created"]))
    changes = f", with {' '.join(data['overrides'])}" if data["overrides"] else ""
    notices = [f"<p>Missing: {text(line)}.</p>" for line in data["missing"]]
    if trouble:
        notices.append(paragraph(f"No figures: {trouble}."))
    return (
        f"<h1>Run {text(data['run'])}</h1>"
        + paragraph(f"Recipe {data['recipe']}{changes}, on {data['cluster']}, planned {started}.", "soft")
        + (f'<div class="notice">{"".join(notices)}</div>' if notices else "")
        + paragraph(introduction(data))
        + bullets(findings(data))
    )


# ------------------------------------------------------------------------------------------------------------ results


def _results(data: Data, drawn: Figures) -> str:
    tables = [_result_table(data, name) for name in unique(r["benchmark"] for r in data["results"])]
    return "".join(tables) + figures(_of(drawn, "results"))


def _result_table(data: Data, benchmark: str) -> str:
    rows = [r for r in data["results"] if r["benchmark"] == benchmark]
    temperatures = unique(r["temperature"] for r in rows)
    body = []
    for checkpoint in unique(r["checkpoint"] for r in rows):
        found = results_by_temperature(data, benchmark, checkpoint)
        cells = [accuracy_text(found[t]) if t in found else "–" for t in temperatures]
        body.append([checkpoint, *cells, listed(unique(r["n"] for r in found.values()))])
    caption = (
        f"Accuracy on {benchmark}, ± one binomial standard error; in brackets the 95 % bound by the rule of three, "
        "where none or all are right"
    )
    return table(caption, ["checkpoint", *(f"T = {t:g}" for t in temperatures), "problems"], body)


def _kinds(data: Data, drawn: Figures) -> str:
    rows = [r for r in data["results"] if r.get("formed")]
    if not rows:
        return ""
    body = [
        [
            r["checkpoint"],
            r["benchmark"],
            f"{r['temperature']:g}",
            percent(r["formed"]),
            percent(r["worked_share"]),
            percent(r["worked_accuracy"]),
            percent(r["terse_share"]),
            percent(r["terse_accuracy"]),
            figure(r.get("mean_length")),
        ]
        for r in rows
    ]
    columns = [
        "checkpoint",
        "benchmark",
        "T",
        "well formed",
        "worked",
        "right of these",
        "terse",
        "right of these",
        "tokens",
    ]
    caption = (
        "Completions by kind of trace: worked, or terse (the answer alone); checkpoints without a trace are left out"
    )
    intro = bullets(selection(data))
    return intro + table(caption, columns, body, words=(0, 1)) + figures(_of(drawn, "kinds"))


# ----------------------------------------------------------------------------------------------------------- training


def _last(rows: Sequence[Row], column: str) -> float | None:
    return next((r[column] for r in reversed(rows) if r.get(column) is not None), None)


def _training(data: Data, drawn: Figures) -> str:
    body = []
    for name in unique(r["stage"] for r in data["training"]):
        rows = [r for r in data["training"] if r["stage"] == name]
        speeds = sorted(r["tokens_per_s"] for r in rows if r.get("tokens_per_s"))
        cells = (figure(_last(rows, "loss"), 4), figure(_last(rows, "grad_norm")))
        speed = format_count(speeds[len(speeds) // 2]) if speeds else "–"
        body.append([name, len(rows), format_count(_last(rows, "tokens") or 0), *cells, speed])
    columns = ["stage", "steps logged", "tokens", "last loss", "last gradient norm", "tokens/s, median"]
    return figures(_of(drawn, "training")) + table("Training stages", columns, body)


def _rl(data: Data, drawn: Figures) -> str:
    body = [
        [
            r["stage"],
            r["start"],
            r["backend"],
            r["step"],
            r["samples"],
            f"{r['zeros']} ({percent(r['zeros'] / r['samples'])})" if r["samples"] else "–",
            figure(r["mean"]),
            r["silent_steps"],
        ]
        for r in data["rewards"]
    ]
    columns = ["stage", "from", "backend", "steps", "rewards", "of these 0", "mean", "steps without any"]
    return table("Rewards over the whole of RL", columns, body, words=(0, 1, 2)) + figures(_of(drawn, "rl"))


# ----------------------------------------------------------------------------------------------------------- analyses


def _weights(data: Data, drawn: Figures) -> str:
    thresholds = unique(r["threshold"] for r in data["weights"])
    body = []
    for pair in pairs(data["weights"]):
        rows = {r["threshold"]: r for r in data["weights"] if (r["from"], r["to"]) == pair}
        first = next(iter(rows.values()))
        bits = percent(first.get("bits_changed_fraction"))
        shares = [percent(rows[t]["changed_fraction"]) if t in rows else "–" for t in thresholds]
        body.append([" → ".join(pair), figure(first["relative_l2"]), bits, *shares])
    columns = ["pair", "relative L2", "any bit", *(f"> {100 * t:g} %" for t in thresholds)]
    caption = "Share of the whole model's weights that changed: |w' − w| > threshold × |w|"
    kinds = "; ".join(f"{name} {listed(types)}" for name, types in data["dtypes"].items())
    note = (
        paragraph(f"Types on disk: {kinds}. A change below a type's own step cannot be seen.", "soft") if kinds else ""
    )
    return table(caption, columns, body) + note + figures(_of(drawn, "weights")) + _module_table(data)


def _module_table(data: Data) -> str:
    rows = at_threshold(data["weights_by_module"])
    body = [
        [
            f"{r['from']} → {r['to']}",
            "–" if r["layer"] is None else r["layer"],
            r["module"],
            percent(r["changed_fraction"]),
            figure(r["relative_l2"]),
        ]
        for r in rows
    ]
    if not rows:
        return ""
    inner = table(
        "By layer and module",
        ["pair", "layer", "module", f"> {100 * rows[0]['threshold']:g} %", "relative L2"],
        body,
        (0, 2),
    )
    return folded("Every layer and module as a table", inner)


def _cka(data: Data, drawn: Figures) -> str:
    texts = unique(r.get("texts", "texts") for r in data["cka"])
    body = []
    for pair in pairs(data["cka"]):
        lowest = lowest_cka(data, *pair)
        body.append([" → ".join(pair), *(cka_text(lowest.get(t)) for t in texts)])
    note = (
        "Linear CKA of hidden states averaged over tokens, layer by layer: 1 is the same up to rotation and scale. The "
        "source text is the control. CKA may miss a change that a few large activations hide: read it with the weight "
        "change."
    )
    inner = table("Lowest CKA of any layer", ["pair", *texts], body) + figures(_of(drawn, "cka"))
    return paragraph(note, "soft") + inner + _cka_table(data) if inner else ""


def _cka_table(data: Data) -> str:
    columns = ["pair", "texts", "layer", "CKA", "debiased"]
    body = [
        [f"{r['from']} → {r['to']}", r.get("texts", "–"), r["layer"], cka_text(r["value"]), cka_text(r.get("debiased"))]
        for r in data["cka"]
    ]
    return folded("Every layer as a table", table("CKA by layer", columns, body, (0, 1)))


# ------------------------------------------------------------------------------------------------------- data, running


def _data(data: Data, drawn: Figures) -> str:
    mix = [
        [r["stage"], r["source"], figure(r["weight"]), format_count(r["tokens"]), figure(r["epochs"])]
        for r in data["data_mix"]
    ]
    sources = [
        [
            f"{r['stage']}/{r['name']}",
            r["kind"] + (f", {percent(r['terse_share'], 0)} terse" if r["terse_share"] is not None else ""),
            r["documents"],
            format_count(r["tokens"]),
            format_bytes(r["bytes"]),
            _origin(r["origin"]),
            r["sha256"][:16],
        ]
        for r in data["sources"]
    ]
    sets = [
        [f"{r['stage']}/{r['name']}", r["task"], ", ".join(r["exclude"] or ()) or "–", r["count"]]
        for r in data["problem_sets"]
    ]
    columns = ["source", "kind", "documents", "tokens", "text", "origin", "SHA-256 of the tokens"]
    return (
        table("What each training stage drew", ["stage", "source", "weight", "tokens", "epochs"], mix, (0, 1))
        + figures(_of(drawn, "data"))
        + table("Sources", columns, sources, (0, 1, 5, 6))
        + table("Problem sets", ["set", "task", "leaves out the texts of", "problems"], sets, (0, 1, 2))
    )


def _origin(origin: Row) -> str:
    """Where a source's text is from: an interpreter's library with its hash, a path, a problem set."""
    digest = f"SHA-256 {origin['sha256'][:16]}" if "sha256" in origin else None
    places = [origin.get(key) for key in ("interpreter", "path", "problems")]
    return ", ".join(str(part) for part in (*places, digest) if part) or "–"


def _run(data: Data) -> str:
    stages = [_stage_cells(data, r) for r in data["stages"]]
    columns = ["stage", "kind", "state", "by", "time", "CPU time", "peak memory", "attempts", "on"]
    versions = [[s["stage"], _plain(s["versions"])] for s in data["stages"] if s["versions"]]
    checks = [_verification_cells(s) for s in data["stages"] if s["verification"]]
    login = _plain({**data["versions"], **({"git": data["git"]} if data["git"] else {})})
    return (
        table("Stages in the order of the plan", columns, stages, (0, 1, 2, 3, 8))
        + table("Versions", ["stage", "versions"], [["planned with", login], *versions], (0, 1))
        + table("Verification of conversions and merges", ["stage", "read back", "details"], checks, (0, 1, 2))
    )


def _stage_cells(data: Data, row: Row) -> list[object]:
    state = row["state"]
    if row["made_by_run"] not in (None, data["run"]):
        state += f", made by run {row['made_by_run']}"
    seconds = [format_duration(row[k]) if row[k] is not None else "–" for k in ("seconds", "cpu_seconds")]
    memory = format_bytes(row["peak_memory_bytes"]) if row["peak_memory_bytes"] else "–"
    kind = row["kind"] + (" (by the plan)" if row["inserted"] else "")
    return [row["stage"], kind, state, row["engine"], *seconds, memory, row["attempts"] or "–", row["made_on"] or "–"]


def _verification_cells(row: Row) -> list[object]:
    found = dict(row["verification"])
    exact = found.pop("round_trip", None) or found.pop("read_back", "–")
    return [row["stage"], exact, _plain(found)]


def _plain(value: object) -> str:
    """Nested facts as one line of words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{str(key).replace('_', ' ')} {_plain(v)}" for key, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(v) for v in value)
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _limits(data: Data) -> str:
    return "".join(f"<h3>{text(s.heading)}</h3>{paragraph(s.text)}" for s in limits(data))
