"""Figures of the report by matplotlib, as SVG that stands in a page: `python -m launcher.report.draw < report.json`.

Prints {"figures": [{"name", "section", "caption", "svg"}]}; exit code 3 where matplotlib is absent. Text stays text and
takes the page's colour, so that it can be read in light and dark. The same numbers give the same bytes.
"""

from __future__ import annotations

import io
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

try:
    import matplotlib
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    if error.name != "matplotlib":
        raise
    sys.exit(3)

from launcher.report.numbers import Data, Row, interval, lineage, pairs, results_by_temperature, unique

#: Okabe and Ito's colours that are told apart by colour-blind readers; markers and dashes say the same again.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
#: No dots: each would be a path of its own.
HATCHES = ("", "///", "xx", "\\\\\\", "++", "--")
#: Stand-ins that become the page's own colours.
INK, LINE = "#010203", "#040506"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "prism-launch",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "hatch.linewidth": 0.6,
    "text.parse_math": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


class Drawing(NamedTuple):
    """A figure, the section that it belongs to, and what is said under it."""

    name: str
    section: str
    caption: str
    figure: Figure


def main() -> int:
    """Read the report's JSON, print the figures."""
    data = json.load(sys.stdin)
    with matplotlib.rc_context(STYLE):
        figures = [
            {"name": d.name, "section": d.section, "caption": d.caption, "svg": to_svg(d.figure, d.name)}
            for d in drawings(data)
        ]
    json.dump({"figures": figures}, sys.stdout)
    return 0


def drawings(data: Data) -> Iterator[Drawing]:
    """Every figure for which there are numbers."""
    for part in (_accuracy, _kinds, _training, _rl, _thresholds, _modules, _cka, _mix):
        yield from part(data)


def to_svg(figure: Figure, name: str) -> str:
    """The figure as one <svg> element: no prologue, no namespaces, ids of its own, the page's colours."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = out.getvalue()[out.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'^<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    return svg.replace(INK, "currentColor").replace(LINE, "var(--line)").strip()


def _axes(width: float = 4.6, height: float = 3.1, **labels: Any) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set(**labels)
    return figure, axes


def _slug(text: str) -> str:
    return re.sub(r"[^a-zA-Z0-9]+", "-", text).strip("-").lower()


def _pick(choices: Sequence[Any], number: int) -> Any:
    return choices[number % len(choices)]


def _legend(axes: Any) -> None:
    """Above the axes, where it hides nothing; in columns where the labels are short."""
    labels = axes.get_legend_handles_labels()[1]
    columns = max(1, min(len(labels), 66 // (8 + max(map(len, labels)))))
    axes.legend(ncols=columns, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, columnspacing=1.2)


def _percent_axis(axis: Any) -> None:
    axis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")


# ------------------------------------------------------------------------------------------------------------ results


def _accuracy(data: Data) -> Iterator[Drawing]:
    """Points with error bars: checkpoints one below the other, one marker a temperature."""
    for number, benchmark in enumerate(unique(r["benchmark"] for r in data["results"])):
        rows = [r for r in data["results"] if r["benchmark"] == benchmark]
        names, temperatures = unique(r["checkpoint"] for r in rows), unique(r["temperature"] for r in rows)
        figure, axes = _axes(height=1.0 + 0.16 * len(names) * (len(temperatures) + 1), xlabel="accuracy")
        for i, t in enumerate(temperatures):
            shift = (i - (len(temperatures) - 1) / 2) / (len(temperatures) + 1)
            found = [results_by_temperature(data, benchmark, name).get(t) for name in names]
            points = [(y + shift, r) for y, r in enumerate(found) if r is not None]
            axes.errorbar(
                [r["accuracy"] for _, r in points],
                [y for y, _ in points],
                xerr=list(zip(*(interval(r) for _, r in points), strict=True)),
                fmt=_pick(MARKERS, i),
                color=_pick(COLOURS, i),
                capsize=4,
                markersize=4.5,
                label=f"T = {t:g}",
            )
        axes.set_yticks(range(len(names)), names)
        axes.set(xlim=(-0.03, 1.03), ylim=(len(names) - 0.5, -0.5))
        axes.grid(axis="y", visible=False)
        _legend(axes)
        _percent_axis(axes.xaxis)
        counts = ", ".join(str(n) for n in unique(r["n"] for r in rows))
        caption = (
            f"Accuracy on {benchmark}, n = {counts} problems a point. Bars: one standard error; where none or all are "
            "right, the 95 % bound by the rule of three."
        )
        yield Drawing(f"accuracy-{number}", "results", caption, figure)


def _kinds(data: Data) -> Iterator[Drawing]:
    """Stacked bars: which part of the completions is worked, terse, or not of the form asked for."""
    parts = ("worked", "terse", "not well formed")
    for number, benchmark in enumerate(unique(r["benchmark"] for r in data["results"])):
        rows = [r for r in data["results"] if r["benchmark"] == benchmark and r.get("worked_share") is not None]
        if not any(r["formed"] for r in rows):
            continue
        shares = [(r["worked_share"], r["terse_share"], 1 - r["worked_share"] - r["terse_share"]) for r in rows]
        figure, axes = _axes(4.6, 0.9 + 0.24 * len(rows), xlabel="share of completions", xlim=(0, 1))
        for i, part in enumerate(parts):
            axes.barh(
                range(len(rows)),
                [s[i] for s in shares],
                left=[sum(s[:i]) for s in shares],
                color=(COLOURS[0], COLOURS[1], "#999999")[i],
                hatch=HATCHES[i],
                edgecolor="white",
                linewidth=0.5,
                label=part,
            )
        axes.set_yticks(range(len(rows)), [f"{r['checkpoint']}, T {r['temperature']:g}" for r in rows])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        _legend(axes)
        _percent_axis(axes.xaxis)
        yield Drawing(f"kinds-{number}", "kinds", f"Kinds of completion on {benchmark}, right or wrong.", figure)


# ------------------------------------------------------------------------------------------------------------- curves


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """Mean over the last `width` values, fewer at the beginning."""
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def _by_stage(rows: Sequence[Row]) -> dict[str, list[Row]]:
    return {name: [r for r in rows if r["stage"] == name] for name in unique(r["stage"] for r in rows)}


def _tokens_before(data: Data, stage: str) -> int:
    """Tokens that the stages took which this one was trained from."""
    before = lineage(data, stage)[1:]
    return int(sum(s["tokens"] or 0 for s in data["stages"] if s["stage"] in before and s["kind"] == "train"))


def _training(data: Data) -> Iterator[Drawing]:
    stages = _by_stage([r for r in data["training"] if r.get("loss") is not None])
    if not stages:
        return
    xlabel = "tokens, counted on from the stage before"
    figure, axes = _axes(ylabel="loss, nats a token", xlabel=xlabel)
    rates, rate_axes = _axes(ylabel="learning rate", xlabel=xlabel)
    for i, (name, rows) in enumerate(stages.items()):
        tokens = [_tokens_before(data, name) + r["tokens"] for r in rows]
        losses = [r["loss"] for r in rows]
        colour, dash = _pick(COLOURS, i), _pick(DASHES, i)
        axes.plot(tokens, losses, color=colour, alpha=0.3, linewidth=0.6)
        axes.plot(tokens, smoothed(losses, max(1, len(losses) // 40)), ls=dash, color=colour, label=name)
        rate_axes.plot(tokens, [r.get("lr") for r in rows], ls=dash, color=colour, label=name)
    for drawn in (axes, rate_axes):
        _legend(drawn)
        drawn.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=" "))
    rate_axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    caption = (
        "Training loss: each step (pale) and its running mean over a fortieth of the stage. The stages read different "
        "text, so their losses cannot be compared with one another."
    )
    yield Drawing("loss", "training", caption, figure)
    yield Drawing("rate", "training", "Learning rate.", rates)


#: Column of the RL metrics, label of the axis, caption.
RL_CURVES = (
    (
        "reward",
        "mean reward",
        "Mean reward of a step; band: one binomial standard error over its samples, taken as independent.",
    ),
    ("zero_reward_share", "share of rewards that are 0", "Share of rewards that are 0."),
    ("entropy", "entropy, nats a token", "Entropy of the policy on its own samples."),
    ("mean_length", "tokens", "Mean length of the completions."),
)


def _rl(data: Data) -> Iterator[Drawing]:
    for column, label, caption in RL_CURVES:
        stages = _by_stage([r for r in data["rl"] if r.get(column) is not None])
        if not stages:
            continue
        figure, axes = _axes(ylabel=label, xlabel="step")
        for i, (name, rows) in enumerate(stages.items()):
            x, values = [r["step"] for r in rows], [r[column] for r in rows]
            axes.plot(x, values, ls=_pick(DASHES, i), color=_pick(COLOURS, i), label=name)
            if column == "reward" and all(r["samples"] for r in rows):
                errors = [math.sqrt(max(0, v * (1 - v)) / r["samples"]) for v, r in zip(values, rows, strict=True)]
                low, high = ([v + sign * e for v, e in zip(values, errors, strict=True)] for sign in (-1, 1))
                axes.fill_between(x, low, high, color=_pick(COLOURS, i), alpha=0.25, linewidth=0)
        if column in ("reward", "zero_reward_share"):
            axes.set_ylim(-0.03, 1.03)
        else:
            axes.set_ylim(bottom=0)
        _legend(axes)
        yield Drawing(f"rl-{_slug(column)}", "rl", caption, figure)


# ----------------------------------------------------------------------------------------------------------- analyses


def _thresholds(data: Data) -> Iterator[Drawing]:
    if not data["weights"]:
        return
    figure, axes = _axes(xlabel="changed by more than", ylabel="share of the weights", xscale="log", ylim=(-0.03, 1.03))
    for i, (start, end) in enumerate(pairs(data["weights"])):
        rows = [r for r in data["weights"] if (r["from"], r["to"]) == (start, end)]
        x, y = [r["threshold"] for r in rows], [r["changed_fraction"] for r in rows]
        style = {"linestyle": _pick(DASHES, i), "marker": _pick(MARKERS, i), "color": _pick(COLOURS, i)}
        axes.plot(x, y, label=f"{start} → {end}", **style)
    marks = unique(r["threshold"] for r in data["weights"])
    axes.set_xticks(marks, [f"{100 * t:g} %" for t in marks])
    axes.minorticks_off()
    _percent_axis(axes.yaxis)
    _legend(axes)
    yield Drawing("thresholds", "weights", "Share of all weights that changed, by threshold.", figure)


def _modules(data: Data) -> Iterator[Drawing]:
    """A heat map a pair, each cell with its number."""
    for number, (start, end) in enumerate(pairs(data["weights_by_module"])):
        rows = [r for r in data["weights_by_module"] if (r["from"], r["to"]) == (start, end)]
        modules, layers = unique(r["module"] for r in rows), unique(r["layer"] for r in rows)
        found = {(r["layer"], r["module"]): r["changed_fraction"] for r in rows}
        grid = [[found.get((layer, module), math.nan) for module in modules] for layer in layers]
        figure, axes = _axes(4.6, 1.1 + 0.26 * len(layers))
        axes.imshow(grid, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for (layer, module), value in found.items():
            x, y = modules.index(module), layers.index(layer)
            colour = "white" if value < 0.55 else "black"
            axes.text(x, y, f"{100 * value:.1f}", ha="center", va="center", fontsize=8, color=colour)
        axes.set_xticks(range(len(modules)), modules)
        axes.set_yticks(range(len(layers)), ["no layer" if layer is None else f"layer {layer}" for layer in layers])
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        threshold = unique(r["threshold"] for r in rows)
        caption = f"{start} → {end}: weights changed by more than {100 * threshold[0]:g} %, in % of a module's weights."
        yield Drawing(f"modules-{number}", "weights", caption, figure)


def _cka(data: Data) -> Iterator[Drawing]:
    """One figure a kind of text, one line a pair."""
    for number, texts in enumerate(unique(r.get("texts", "texts") for r in data["cka"])):
        rows = [r for r in data["cka"] if r.get("texts", "texts") == texts and r["value"] is not None]
        if not rows:
            continue
        figure, axes = _axes(xlabel="layer; 0 is the embedding", ylabel="linear CKA", ylim=(0, 1.03))
        for i, (start, end) in enumerate(pairs(rows)):
            mine = [r for r in rows if (r["from"], r["to"]) == (start, end)]
            style = {"linestyle": _pick(DASHES, i), "marker": _pick(MARKERS, i), "color": _pick(COLOURS, i)}
            x, y = [r["layer"] for r in mine], [r["value"] for r in mine]
            axes.plot(x, y, label=f"{start} → {end}, lowest {min(y):.4f}", **style)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        _legend(axes)
        counts = ", ".join(str(n) for n in unique(r.get("n") for r in rows) if n)
        caption = f"Similarity of representations on {texts}{f', {counts} texts' if counts else ''}."
        yield Drawing(f"cka-{number}", "cka", caption, figure)


def _mix(data: Data) -> Iterator[Drawing]:
    rows = data["data_mix"]
    if not rows:
        return
    stages, sources = unique(r["stage"] for r in rows), unique(r["source"] for r in rows)
    figure, axes = _axes(4.6, 1.1 + 0.45 * len(stages), xlabel="tokens")
    left = dict.fromkeys(stages, 0)
    for i, source in enumerate(sources):
        mine: Mapping[str, int] = {r["stage"]: r["tokens"] for r in rows if r["source"] == source}
        axes.barh(
            list(mine),
            list(mine.values()),
            left=[left[s] for s in mine],
            height=0.6,
            color=_pick(COLOURS, i),
            hatch=_pick(HATCHES, i),
            edgecolor="white",
            linewidth=0.5,
            label=source,
        )
        left.update({s: left[s] + count for s, count in mine.items()})
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=" "))
    _legend(axes)
    yield Drawing("mix", "data", "Tokens that each training stage drew from each source.", figure)


if __name__ == "__main__":
    sys.exit(main())
