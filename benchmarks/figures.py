"""Figures of the pages of results, as SVG text. The same numbers give the same bytes.

Every method has a colour and a mark of its own, as in the other figures; means are over seeds.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MultipleLocator

from benchmarks.seeds import mean
from client.drawing import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    LEVEL,
    PURPLE,
    SOFT,
    VERMILLION,
    WIDTH,
    Handle,
    as_svg,
    legend_above,
    style_of,
)

Runs = Sequence[Mapping[str, Any]]
"""What was found with every seed."""
Cells = Mapping[str, Runs]
Point = tuple[float, float]
"""Accuracy on what is forgotten and on what stays, in [0, 1]."""

LOOKS = (
    (BLUE, "o"), (VERMILLION, "s"), (PURPLE, "^"), (GREEN, "D"), (INK, "v"), (SOFT, "P"),
    (VERMILLION, "X"), (BLUE, "<"), (GREEN, ">"), (PURPLE, "p"),
)  # fmt: skip
"""Colour and mark of the first, second ... method; all differ."""
BEFORE: dict[str, Any] = {"color": INK, "marker": "+", "linestyle": "", "markersize": 9}
SIZE = 6
PANEL = 2.75
"""Inches of a row of panels."""


# ---------------------------------------------------------------- figures
def masks(cells: Cells, methods: Sequence[str]) -> str:
    """Draw accuracies right after masking, and whereto fine-tuning takes them."""

    def panel(axes: Axes, runs: Runs) -> None:
        for method, look in zip(methods, LOOKS, strict=False):
            found = [run["methods"][method] for run in runs]
            masked, tuned = (_means(found, "forget", "retained", epoch) for epoch in (0, -1))
            _arrow(axes, masked, tuned, look)
        _before(axes, runs)

    handles = [
        *(_mark(name, look) for name, look in zip(methods, LOOKS, strict=False)),
        _mark("after fine-tuning", (INK, "o"), hollow=True),
        Line2D([], [], label="before", **BEFORE),
    ]
    title = "Accuracy on the removed class and on the others, after masking and after fine-tuning"
    return _panels("masks", title, cells, panel, handles, columns=5)


def partial(cells: Cells, pairs: Sequence[str]) -> str:
    """Draw every method beside its partial twin."""

    def panel(axes: Axes, runs: Runs) -> None:
        for pair, look in zip(pairs, LOOKS, strict=False):
            whole, part = (
                _means([run["pairs"][pair][which] for run in runs], "forget_test", "retained")
                for which in ("naive", "partial")
            )
            _arrow(axes, whole, part, look)
        _before(axes, runs)

    handles = [
        *(_mark(f"{name}, whole", look) for name, look in zip(pairs, LOOKS, strict=False)),
        _mark("partial", (INK, "o"), hollow=True),
        Line2D([], [], label="before", **BEFORE),
    ]
    title = "Accuracy on the forgotten class and on the others, of whole and of partial updates"
    return _panels("partial", title, cells, panel, handles, columns=5)


def ffmu(told: Mapping[str, Any], certifiable: str) -> str:
    """Draw the share of steps that is certified, and the error on what is removed.

    Parameters
    ----------
    told
        What ``benchmarks.ffmu`` keeps.
    certifiable
        Name of the training that is checked.
    """
    checks = [seed["checks"][certifiable] for seed in told["seeds"]]
    asked = [name for name in checks[0] if name != "closeness"]
    methods = ("Retrain", "FedAvg", "FFMU", "FFMU-N")
    ratios = list(told["means"]["Retrain"])
    with mpl.rc_context(style_of("ffmu")):
        figure = Figure((WIDTH, 3.3), layout="constrained")
        left, right = figure.subplots(1, 2)
        for place, name in enumerate(asked):
            shares = [check[name]["share"] for check in checks]
            left.plot([place] * len(shares), shares, "_", color=BLUE, markersize=12)
        left.plot(
            [mean([check[name]["share"] for check in checks]) for name in asked],
            "o:", color=BLUE, markersize=SIZE - 1,
        )  # fmt: skip
        left.axhline(1, color=INK, **LEVEL)
        left.annotate("certified only here", (len(asked) - 1, 1), (0, 3), ha="right",
                      textcoords="offset points")  # fmt: skip
        left.set_xticks(range(len(asked)), asked)
        left.set_ylim(-0.03, 1.12)
        left.yaxis.set_major_formatter(FuncFormatter(_per_cent))
        left.set_title("Certified steps; a bar is one seed")
        left.set_xlabel("Removed")
        for number, (method, look) in enumerate(zip(methods, LOOKS, strict=False)):
            for place, ratio in enumerate(ratios):
                x = place + 0.16 * (number - 1.5)
                every = [seed["rows"][method][ratio]["error_f"] / 100 for seed in told["seeds"]]
                right.plot([x] * len(every), every, "_", color=look[0], markersize=8)
                right.plot([x], [mean(every)], look[1], color=look[0], markersize=SIZE)
        right.set_xticks(range(len(ratios)), ratios)
        right.set_ylim(bottom=0)
        right.yaxis.set_major_formatter(FuncFormatter(_per_cent))
        right.set_title("Error on removed samples (error_f)")
        right.set_xlabel("Removed")
        for axes in (left, right):
            _grid(axes)
        handles = [_mark(name, look) for name, look in zip(methods, LOOKS, strict=False)]
        legend_above(figure, handles, columns=4)
        return as_svg(figure, "ffmu", "Certified steps, and the error on what was removed")


MEASURES = {
    "retained": ("Accuracy on the classes that stay", (BLUE, "o")),
    "forget_train": ("on the forgotten rows", (VERMILLION, "s")),
    "attack_auc": ("Attack: who was trained on (AUC)", (PURPLE, "^")),
}


def clients(cells: Cells, blocks: Sequence[Sequence[str]]) -> str:
    """Draw what is left by every method, a row each, and a column for every cell.

    Parameters
    ----------
    blocks
        Methods of one network each, from top to bottom; the second of a block is retraining, whose
        lines go through it.
    """
    methods = [name for block in blocks for name in block]
    with mpl.rc_context(style_of("clients")):
        figure = Figure((WIDTH, 1.0 + 0.24 * len(methods)), layout="constrained")
        panels: list[Axes] = list(figure.subplots(1, len(cells), sharey=True, squeeze=False).flat)
        for axes, (cell, runs) in zip(panels, cells.items(), strict=True):
            first = 0
            for block in blocks:
                _block(axes, runs, block, first)
                first += len(block)
                axes.axhline(first - 0.5, color=SOFT, linewidth=0.7)
            axes.set_title("\n".join(cell.split(", ")))
            axes.set_xlim(-0.04, 1.04)
            axes.xaxis.set_major_locator(MultipleLocator(0.5))
            axes.xaxis.set_major_formatter(FuncFormatter(_per_cent))
            axes.tick_params(axis="y", length=0)
            _grid(axes)
        panels[0].set_yticks(range(len(methods)), methods)
        panels[0].set_ylim(len(methods) - 0.5, -0.5)
        handles: list[Handle] = [_mark(label, look) for label, look in MEASURES.values()]
        handles.append(Line2D([], [], color=INK, label="of retraining the same network", **LEVEL))
        legend_above(figure, handles, columns=4)
        return as_svg(figure, "clients", "What is left of what was forgotten, by method")


# ---------------------------------------------------------------- parts
def _panels(
    name: str,
    title: str,
    cells: Cells,
    draw: Callable[[Axes, Runs], None],
    handles: Sequence[Handle],
    *,
    columns: int,
) -> str:
    """Draw a panel per cell: accuracy on what is forgotten to the right, on what stays upwards."""
    across = 2
    down = -(-len(cells) // across)
    with mpl.rc_context(style_of(name)):
        figure = Figure((WIDTH, 0.9 + PANEL * down), layout="constrained")
        panels: list[Axes] = list(figure.subplots(down, across, squeeze=False).flat)
        for axes, (cell, runs) in zip(panels, cells.items(), strict=False):
            draw(axes, runs)
            axes.set_title(f"{cell}; {len(runs)} seeds" if len(runs) > 1 else f"{cell}; one seed")
            axes.set_xlim(-0.04, 1.04)
            axes.margins(y=0.08)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(FuncFormatter(_per_cent))
            _grid(axes)
        for axes in panels[len(cells) :]:
            axes.set_axis_off()
        figure.supxlabel("Accuracy on the forgotten class: less is better", size=8.5)
        figure.supylabel("Accuracy on the classes that stay", size=8.5)
        legend_above(figure, handles, columns=columns)
        return as_svg(figure, name, title)


def _block(axes: Axes, runs: Runs, block: Sequence[str], first: int) -> None:
    """Draw methods of one network in rows from ``first`` on."""
    ends = [first - 0.5, first + len(block) - 0.5]
    for key, (_, (colour, mark)) in MEASURES.items():
        for place, name in enumerate(block):
            found = [run["methods"].get(name, {}) for run in runs]
            values = [one[key] for one in found if one.get(key) is not None]
            if not values:
                continue
            row = first + place
            axes.plot([min(values), max(values)], [row, row], color=colour, alpha=0.5)
            axes.plot([mean(values)], [row], mark, color=colour, markersize=5)
            if place == 1:
                axes.plot([mean(values)] * 2, ends, color=colour, **LEVEL)


def _means(found: Iterable[Mapping[str, Any]], gone: str, kept: str, *at: int) -> Point:
    def of(one: Mapping[str, Any], key: str) -> float:
        value: Any = one[key]
        for place in at:
            value = value[place]
        return float(value)

    every = list(found)
    return mean([of(one, gone) for one in every]), mean([of(one, kept) for one in every])


def _arrow(axes: Axes, begin: Point, end: Point, look: tuple[str, str]) -> None:
    """Join two points of one method; the second is hollow."""
    colour, mark = look
    axes.plot(*zip(begin, end, strict=True), "-", color=colour, linewidth=0.9, alpha=0.6, zorder=2)
    style: dict[str, Any] = {"markersize": SIZE, "clip_on": False, "zorder": 3}
    axes.plot(*begin, mark, color=colour, **style)
    axes.plot(*end, mark, color=colour, markerfacecolor="white", **style)


def _before(axes: Axes, runs: Runs) -> None:
    known, kept = _means([run["before"] for run in runs], "forget_test", "retained")
    axes.plot([known], [kept], **BEFORE)


def _mark(label: str, look: tuple[str, str], *, hollow: bool = False) -> Line2D:
    colour, mark = look
    inside = "white" if hollow else colour
    return Line2D([], [], color=colour, marker=mark, markerfacecolor=inside, linestyle="",
                  markersize=SIZE, label=label)  # fmt: skip


def _grid(axes: Axes) -> None:
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def _per_cent(share: float, _: object) -> str:
    return f"{100 * share:.3g} %"
