"""Figures of a comparison, as SVG text. The same document gives the same bytes, times aside.

A dozen lines in one frame cannot be told apart, so every method has a panel or a row of its own,
labelled where it stands. Colours mean what they mean in the other figures, and marks say the same.
"""

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator, NullLocator

from client.drawing import (
    BLUE,
    FAINT,
    INK,
    LEVEL,
    NARROW_WIDTH,
    PURPLE,
    SOFT,
    VERMILLION,
    WIDTH,
    Handle,
    as_svg,
    legend_above,
    style_of,
)
from server.federation import TEST
from simulation.compare_report import (
    NAMES,
    Document,
    accuracy_in,
    baseline_of,
    forgetting_of,
)
from simulation.comparison import NATURAL, RETRAINED
from simulation.probes import FORGET, RETAINED

Trials = Sequence[Mapping[str, Any]]

ACROSS, ACROSS_NARROW = 4, 2
"""Panels in a row."""
ROW = 0.27
"""Inches of a method's row."""


def figures(document: Document, *, narrow: bool = False) -> dict[str, str]:
    """Return name -> SVG of every figure that has something to show."""
    served = {name: trials for name, trials in _served(document) if name != RETRAINED}
    if not served:
        return {}
    found = {}
    if _curves_of(document):
        found["curves"] = curves(document, served, narrow=narrow)
    if forgetting_of(document):
        found["forgetting"] = forgetting(document, served, narrow=narrow)
    return found | {"bytes": traffic(document, narrow=narrow)}


# ---------------------------------------------------------------- figures
def curves(document: Document, served: Mapping[str, Trials], *, narrow: bool = False) -> str:
    """Draw accuracy and attack success over the rounds since the request, a panel per method."""
    name = "curves-narrow" if narrow else "curves"
    across = min(ACROSS_NARROW if narrow else ACROSS, len(served))
    down = -(-len(served) // across)
    size = (NARROW_WIDTH if narrow else WIDTH, 1.2 + 1.35 * down)
    with mpl.rc_context(style_of(name)):
        figure = Figure(size, layout="constrained")
        grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
        panels: list[Axes] = list(grid.flat)
        for panel, (method, trials) in zip(panels, served.items(), strict=False):
            _panel(panel, document, trials, served.get(NATURAL, ()))
            panel.set_title(_title(method, trials, document))
        for panel in panels[len(served) :]:
            panel.set_axis_off()
        # Where the last row is not full, the panels above its gaps carry the axis.
        for panel in panels[max(0, len(served) - across) : len(served)]:
            panel.tick_params(labelbottom=True)
        panels[0].set_xlim(0, document["rounds_followed"])
        panels[0].set_ylim(-0.03, 1.03)
        panels[0].xaxis.set_major_locator(MaxNLocator(5, integer=True))
        panels[0].yaxis.set_major_locator(MultipleLocator(0.5))
        panels[0].yaxis.set_major_formatter(FuncFormatter(_percent))
        figure.supxlabel("Rounds since the request", size=8.5)
        handles = list(_curve_legend(document, served))
        legend_above(figure, handles, columns=1 if narrow else 3)
        return as_svg(figure, name, "Accuracy and attack success of every method")


def forgetting(document: Document, served: Mapping[str, Trials], *, narrow: bool = False) -> str:
    """Draw what is left after recovery against how long it took, a row per method."""
    name = "forgetting-narrow" if narrow else "forgetting"
    measure = forgetting_of(document)
    assert measure is not None  # noqa: S101  asked before
    height = 0.9 + ROW * len(served)
    size = (NARROW_WIDTH, 2 * height + 0.5) if narrow else (WIDTH, height + 0.4)
    with mpl.rc_context(style_of(name)):
        figure = Figure(size, layout="constrained")
        left, right = figure.subplots(*((2, 1) if narrow else (1, 2)), sharey=True)
        level = baseline_of(document)[f"after_{measure}"]
        if level is not None:
            left.axvline(level, color=VERMILLION, **LEVEL)
        for row, trials in enumerate(served.values()):
            _dots(left, row, [t["after"].get(measure) for t in trials], color=VERMILLION)
            _dots(right, row, [t["recovery_rounds"] for t in trials], color=BLUE)
            own = [t["rounds_asked"] or None for t in trials]
            _dots(right, row, own, color=PURPLE, marker="s", markerfacecolor="white")
        left.set_xlim(left=-0.01)
        left.xaxis.set_major_formatter(FuncFormatter(_percent))
        left.set_title(f"{NAMES[measure]} after recovery")
        right.set_xlim(left=0)
        right.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        right.set_title("Rounds")
        for axes in (left, right):
            _rows(axes, [_title(m, t, document) for m, t in served.items()])
        if not narrow:
            right.tick_params(labelleft=False)
        legend_above(figure, list(_dot_legend(level)), columns=1 if narrow else 4)
        return as_svg(figure, name, "What is left after recovery, and how long it took")


def traffic(document: Document, *, narrow: bool = False) -> str:
    """Draw bytes stored and sent, a row per method."""
    name = "bytes-narrow" if narrow else "bytes"
    rows = [row for row in document["table"] if row["served"]]
    size = (NARROW_WIDTH if narrow else WIDTH, 1.2 + ROW * len(rows))
    with mpl.rc_context(style_of(name)):
        figure = Figure(size, layout="constrained")
        axes = figure.subplots()
        marks = {"memory_bytes": (BLUE, "s"), "bytes_sent": (VERMILLION, "o")}
        sizes = [row[key] for row in rows for key in marks if row[key]]
        edge = min(sizes, default=1.0) / 3
        level = baseline_of(document)["bytes_sent"]
        if level:
            axes.axvline(level, color=VERMILLION, **LEVEL)
        for number, row in enumerate(rows):
            for key, (color, marker) in marks.items():
                axes.plot(
                    row[key] or edge,
                    number,
                    linestyle="",
                    marker=marker,
                    markersize=5.5,
                    color=color,
                    markerfacecolor=color if row[key] else "white",
                    clip_on=False,
                )
        axes.set_xscale("log")
        axes.set_xlim(edge, 2 * max([*sizes, 3 * edge]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size / 1e6:g} MB"))
        axes.xaxis.set_minor_locator(NullLocator())
        _rows(axes, [row["method"] for row in rows])
        legend_above(figure, list(_byte_legend(bool(level))), columns=1 if narrow else 4)
        return as_svg(figure, name, "Bytes stored and sent by every method")


# ---------------------------------------------------------------- parts
def _panel(axes: Axes, document: Document, trials: Trials, natural: Trials) -> None:
    for measure, color in _curves_of(document).items():
        level = baseline_of(document)[f"after_{measure}"]
        if level is not None:
            axes.axhline(level, color=color, **LEVEL)
        means, lows, highs = _over_rounds(document, trials, measure)
        numbers = range(len(means))
        if len(trials) > 1:
            axes.fill_between(numbers, lows, highs, color=color, alpha=0.18, linewidth=0)
        axes.plot(numbers, means, color=color, linewidth=1.7, zorder=3)
        if measure not in (TEST, RETAINED) and natural and trials is not natural:
            left, _, _ = _over_rounds(document, natural, measure)
            axes.plot(range(len(left)), left, color=color, linewidth=1.2, linestyle=":")
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def _over_rounds(
    document: Document, trials: Trials, measure: str
) -> tuple[list[float], list[float], list[float]]:
    """Return mean, lowest and highest over the seeds, before the request and in every round."""
    moments = [
        [points[number][measure] for points in map(_points, trials)]
        for number in range(document["rounds_followed"] + 1)
    ]
    known = [[value for value in values if value is not None] for values in moments]
    return [fmean(v) for v in known], [min(v) for v in known], [max(v) for v in known]


def _points(trial: Mapping[str, Any]) -> list[Mapping[str, float | None]]:
    return [trial["before"], *trial["curve"]]


def _dots(
    axes: Axes, row: int, values: Sequence[float | None], *, marker: str = "o", **style: Any
) -> None:
    """Draw one dot per seed, one below the other, so that equal ones stay apart."""
    for seed, value in enumerate(values):
        if value is not None:
            lower = 0.5 * (seed - (len(values) - 1) / 2) / max(3, len(values))
            axes.plot(
                value,
                row + lower,
                linestyle="",
                marker=marker,
                markersize=4,
                clip_on=False,
                zorder=3,
                **style,
            )


def _rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_axisbelow(True)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    for row in range(0, len(names), 2):
        axes.axhspan(row - 0.5, row + 0.5, color="#f6f7f9", linewidth=0, zorder=0)


# ---------------------------------------------------------------- legends
def _curve_legend(document: Document, served: Mapping[str, Trials]) -> Iterator[Handle]:
    for measure, color in _curves_of(document).items():
        yield Line2D([], [], color=color, linewidth=1.7, label=NAMES[measure])
    forgetting = forgetting_of(document)
    if forgetting and NATURAL in served:
        color = _curves_of(document)[forgetting]
        label = "\u2026 if they are only left out (natural)"
        yield Line2D([], [], color=color, linewidth=1.2, linestyle=":", label=label)
    yield Line2D([], [], color=SOFT, label="\u2026 of the retrained model", **LEVEL)
    if len(document["seeds"]) > 1:
        label = f"band: lowest to highest of {len(document['seeds'])} seeds"
        yield Line2D([], [], color=SOFT, alpha=0.25, linewidth=6, label=label)


def _dot_legend(level: float | None) -> Iterator[Handle]:
    dot: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 4}
    yield Line2D([], [], color=VERMILLION, label="one seed", **dot)
    if level is not None:
        yield Line2D([], [], color=VERMILLION, label="retrained model", **LEVEL)
    yield Line2D([], [], color=BLUE, label="rounds of recovery", **dot)
    square = dot | {"marker": "s", "markerfacecolor": "white"}
    yield Line2D([], [], color=PURPLE, label="rounds of the method itself", **square)


def _byte_legend(level: bool) -> Iterator[Handle]:
    dot: dict[str, Any] = {"linestyle": "", "markersize": 5.5}
    yield Line2D([], [], color=BLUE, marker="s", label="stored by the server", **dot)
    yield Line2D([], [], color=VERMILLION, marker="o", label="sent, both ways", **dot)
    hollow = dot | {"markerfacecolor": "white"}
    yield Line2D([], [], color=INK, marker="o", label="hollow, at the edge: nothing", **hollow)
    if level:
        yield Line2D([], [], color=VERMILLION, label="sent by retraining", **LEVEL)


# ---------------------------------------------------------------- shared
def _served(document: Document) -> Iterator[tuple[str, Trials]]:
    """Yield every method with its trials that were not refused, if there are any."""
    for row in document["table"]:
        trials = [
            trial
            for trial in document["trials"]
            if trial["method"] == row["method"] and trial["refused"] is None
        ]
        if trials:
            yield row["method"], trials


def _curves_of(document: Document) -> dict[str, str]:
    """Return the measures to follow over the rounds, and their colours."""
    found = {}
    accuracy = accuracy_in(document)
    if any(trial["before"].get(accuracy) is not None for trial in document["trials"]):
        found[accuracy] = BLUE
    measure = forgetting_of(document)
    if measure is not None:
        found[measure] = PURPLE if measure == FORGET else VERMILLION
    return found


def _title(method: str, trials: Trials, document: Document) -> str:
    seeds = len(document["seeds"])
    return method if len(trials) == seeds else f"{method} ({len(trials)} of {seeds} seeds)"


def _percent(share: float, position: object) -> str:
    del position
    return f"{100 * share:.3g} %"
