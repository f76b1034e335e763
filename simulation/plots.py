"""Figures of a report, as SVG text. The same report gives the same bytes.

Each figure comes in two widths, so that its letters stay readable on a telephone.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from client.drawing import (
    BLUE,
    FAINT,
    INK,
    NARROW_WIDTH,
    PURPLE,
    SOFT,
    VERMILLION,
    WARM,
    WIDTH,
    Handle,
    as_svg,
    legend_above,
    style_of,
)

Report = Mapping[str, Any]
"""What ``simulation.report.report_of`` returns."""

ATTACKS = {"backdoor_success": "Backdoor success", "flip_success": "Label-flip success"}
"""Measure of an attack -> its name in figures and tables."""

RECOVERY = "#dff1e6"
NO_SCORE: dict[str, Any] = {
    "facecolor": "white",
    "edgecolor": "#d5d9e0",
    "hatch": "/////",
    "linewidth": 0,
}
MOST_ROWS = 40
"""Clients in the heat map, at most."""


def figures(report: Report, *, narrow: bool = False) -> dict[str, str]:
    """Return name -> SVG of every figure that has something to show."""
    found = {}
    if any(attack_measure(report, record) for record in federation(report)) or any(
        record["test_accuracy"] is not None for record in federation(report)
    ):
        found["curves"] = curves(report, narrow=narrow)
    if any(record["scores"] for record in federation(report)):
        found["detection"] = detection(report, narrow=narrow)
    if any(unlearning["zeroed_by_layer"] for unlearning in report["unlearnings"]):
        found["pruning"] = pruning(report, narrow=narrow)
    return found


# ---------------------------------------------------------------- reading a report
def federation(report: Report) -> list[Mapping[str, Any]]:
    """Return the federation's own rounds, without those of the retraining baseline."""
    return [record for record in report["rounds"] if record["phase"] != "retrain"]


def attack_measure(report: Report, *records: Mapping[str, Any]) -> str | None:
    """Return the measure of the attack that was taken, in ``records`` or at all."""
    for measure in ATTACKS:
        if any(record[measure] is not None for record in records or report["rounds"]):
            return measure
    return None


def clients_of(report: Report) -> list[str]:
    """Return every client that the report names, sorted."""
    clients = report["clients"]
    found = {*clients["malicious"], *clients["forgotten"], *clients["roster"]}
    for record in report["rounds"]:
        for group in ("participants", "rejected", "quarantined", "capped", "scores", "flagged"):
            found.update(record[group])
    return sorted(found)


def decision(report: Report) -> tuple[str, float | None]:
    """Return the number that the detector decides by, and its threshold where it is known."""
    for source in (*report["rounds"], *report["detections"]):
        if source.get("decided_by"):
            return source["decided_by"], source["threshold"]
    threshold = report["settings"].get("detector-threshold") or None
    for record in report["rounds"]:
        for name in ("cohesion_gap", "score_ratio"):
            if name in record["evidence"]:
                return name, threshold
    return "", threshold


def spans(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Return runs of consecutive numbers as (first, last)."""
    runs = groupby(enumerate(sorted(set(numbers))), lambda pair: pair[1] - pair[0])
    found = [[number for _, number in run] for _, run in runs]
    return [(run[0], run[-1]) for run in found]


# ---------------------------------------------------------------- figures
def curves(report: Report, *, narrow: bool = False) -> str:
    """Draw accuracy and attack success, round by round."""
    name = "curves-narrow" if narrow else "curves"
    with mpl.rc_context(style_of(name)):
        figure = Figure((NARROW_WIDTH, 3.9) if narrow else (WIDTH, 4.1), layout="constrained")
        axes = figure.subplots()
        records = federation(report)
        handles = [
            *_measure_lines(axes, report, records),
            *_shade(axes, report, records),
            *_events(axes, report, records),
        ]
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.0f} %"))
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        _round_axis(axes, records)
        legend_above(figure, handles, columns=2 if narrow else 5)
        return as_svg(figure, name, "Accuracy and attack success in every round")


def detection(report: Report, *, narrow: bool = False) -> str:
    """Draw every client's score in every round, and what the detector decided by."""
    name = "detection-narrow" if narrow else "detection"
    records = [record for record in federation(report) if record["round"] > 0]
    rows, left_out = _rows(report)
    statistic, threshold = decision(report)
    map_height, below = 0.5 + 0.24 * len(rows), 1.55 if statistic else 0
    size = (NARROW_WIDTH if narrow else WIDTH, map_height + below + 0.9)
    with mpl.rc_context(style_of(name)):
        figure = Figure(size, layout="constrained")
        axes = figure.subplots(
            2 if statistic else 1,
            sharex=True,
            squeeze=False,
            height_ratios=[map_height, below] if statistic else None,
        )[:, 0]
        _heat_map(figure, axes[0], report, records, rows, narrow)
        if left_out:
            axes[0].set_title(f"{left_out} more clients, never suspected, are not drawn")
        if statistic:
            _statistic(axes[1], report, records, statistic, threshold)
        _round_axis(axes[-1], records)
        return as_svg(figure, name, "Score of every client in every round")


def pruning(report: Report, *, narrow: bool = False) -> str:
    """Draw which share of each layer's weights every unlearning set to zero."""
    name = "pruning-narrow" if narrow else "pruning"
    shown = [unlearning for unlearning in report["unlearnings"] if unlearning["zeroed_by_layer"]]
    heights = [0.5 + 0.27 * len(unlearning["zeroed_by_layer"]) for unlearning in shown]
    size = (NARROW_WIDTH if narrow else WIDTH, sum(heights) + 0.35)
    with mpl.rc_context(style_of(name)):
        figure = Figure(size, layout="constrained")
        grid = figure.subplots(len(shown), squeeze=False, height_ratios=heights, sharex=True)
        axes: list[Axes] = list(grid[:, 0])
        largest = max(_share(of) for u in shown for of in u["zeroed_by_layer"].values())
        for panel, unlearning in zip(axes, shown, strict=True):
            layers = unlearning["zeroed_by_layer"]
            shares = [_share(layer) for layer in layers.values()]
            panel.barh(range(len(layers)), shares, height=0.62, color=BLUE)
            panel.set_yticks(range(len(layers)), [one_line(layer, 20) for layer in layers])
            panel.invert_yaxis()
            panel.tick_params(axis="y", length=0)
            for row, (share, layer) in enumerate(zip(shares, layers.values(), strict=True)):
                text = f"{100 * share:.1f} %"
                if not narrow:
                    text += f" ({layer['zeroed']:,} of {layer['of']:,})"
                panel.annotate(text, (share, row), (4, 0), textcoords="offset points", va="center")
            whom = _listed(unlearning["clients"], 1 if narrow else 4)
            panel.set_title(f"Round {unlearning['round']}: {whom}")
        axes[-1].set_xlim(0, max(largest, 0.01) * (1.3 if narrow else 1.25))
        axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
        axes[-1].xaxis.set_major_locator(MaxNLocator(4 if narrow else 8))
        axes[-1].set_xlabel("Share of the layer's weights set to zero")
        return as_svg(figure, name, "Share of weights set to zero in every layer")


# ---------------------------------------------------------------- parts of the curves
def _measure_lines(
    axes: Axes, report: Report, records: Sequence[Mapping[str, Any]]
) -> list[Handle]:
    handles: list[Handle] = []

    def line(points: Iterable[tuple[int, float | None]], label: str, **style: Any) -> None:
        known = [(number, share) for number, share in points if share is not None]
        if known:
            numbers, shares = zip(*known, strict=True)
            handles.extend(axes.plot(numbers, shares, label=label, **style))

    def of_every_round(measure: str) -> list[tuple[int, float | None]]:
        return [(record["round"], record[measure]) for record in records]

    size = 3 if len(records) <= 40 else 0
    solid: dict[str, Any] = {"linewidth": 2.0, "markersize": size, "zorder": 3}
    line(of_every_round("test_accuracy"), "Test accuracy", color=BLUE, marker="o", **solid)
    attack = attack_measure(report)
    if attack is not None:
        line(of_every_round(attack), ATTACKS[attack], color=VERMILLION, marker="s", **solid)
        before, natural = report["before"], report["natural_rounds"]
        start = [(before["round"], before[attack])] if before and natural else []
        line(
            [*start, *((record["round"], record[attack]) for record in natural)],
            "\u2026 if only left out",
            color=VERMILLION,
            linewidth=1.6,
            linestyle=":",
        )
        retrained = report["retrained"]
        if retrained and retrained[attack] is not None:
            style: dict[str, Any] = {"linewidth": 1.0, "linestyle": (0, (8, 2, 1, 2))}
            label = "\u2026 if retrained"
            handles.append(axes.axhline(retrained[attack], color=VERMILLION, label=label, **style))
    line(
        of_every_round("forget_accuracy"),
        "Forget accuracy",
        color=PURPLE,
        linewidth=1.0,
        linestyle=(0, (4, 2)),
    )
    return handles


def _shade(axes: Axes, report: Report, records: Sequence[Mapping[str, Any]]) -> list[Handle]:
    handles: list[Handle] = []
    last = records[-1]["round"] if records else 0
    if _warm_up(report):
        axes.axvspan(0.5, min(_warm_up(report), last) + 0.5, color=WARM, linewidth=0, zorder=0)
        handles.append(Patch(color=WARM, label="Warm-up"))
    recovery = spans(record["round"] for record in records if record["phase"] == "recover")
    for first, final in recovery:
        axes.axvspan(first - 0.5, final + 0.5, color=RECOVERY, linewidth=0, zorder=0)
    if recovery:
        handles.append(Patch(color=RECOVERY, label="Recovery"))
    return handles


def _events(axes: Axes, report: Report, records: Sequence[Mapping[str, Any]]) -> list[Handle]:
    handles: list[Handle] = []
    for refused, style, label in ((False, "-", "Unlearning"), (True, ":", "Unlearning refused")):
        numbers = [u["round"] for u in report["unlearnings"] if bool(u["refused"]) is refused]
        lines = [axes.axvline(n, color=INK, linewidth=1.1, linestyle=style) for n in numbers]
        for found in lines[:1]:
            found.set_label(label)
            handles.append(found)
    numbers = [record["round"] for record in records if record["quarantined"]]
    if numbers:
        handles.extend(
            axes.plot(
                numbers,
                [1.03] * len(numbers),
                linestyle="",
                marker="v",
                markersize=7,
                color=INK,
                clip_on=False,
                label="Quarantine",
                zorder=5,
            )
        )
    return handles


# ---------------------------------------------------------------- parts of the detection
def _rows(report: Report) -> tuple[list[str], int]:
    """Return the clients to draw, and how many are left out."""
    clients = clients_of(report)
    if len(clients) <= MOST_ROWS:
        return clients, 0
    suspects = {*report["clients"]["malicious"], *report["ever_flagged"]}
    chosen = sorted(clients, key=lambda client: (client not in suspects, client))[:MOST_ROWS]
    return sorted(chosen), len(clients) - MOST_ROWS


def _heat_map(
    figure: Figure,
    axes: Axes,
    report: Report,
    records: Sequence[Mapping[str, Any]],
    rows: Sequence[str],
    narrow: bool,
) -> None:
    row_of = {client: row for row, client in enumerate(rows)}
    first, last = records[0]["round"], records[-1]["round"]
    scores = [[math.nan] * (last - first + 1) for _ in rows]
    flags, quarantines = [], []
    for record in records:
        number = record["round"]
        for client, score in record["scores"].items():
            if client in row_of:
                scores[row_of[client]][number - first] = score
        flags += [(number, row_of[c]) for c in record["flagged"] if c in row_of]
        quarantines += [(number, row_of[c]) for c in record["quarantined"] if c in row_of]
    known = [abs(score) for row in scores for score in row if not math.isnan(score)]
    limit = max(known, default=0.0) or 1.0
    mesh = axes.pcolormesh(
        [number - 0.5 for number in range(first, last + 2)],
        [row - 0.5 for row in range(len(rows) + 1)],
        scores,
        cmap="PuOr_r",
        vmin=-limit,
        vmax=limit,
        edgecolors="white",
        linewidth=0.6,
        rasterized=len(rows) * len(records) > 3000,
    )
    axes.patch.set(**NO_SCORE)
    width = (1.9 if narrow else 7.6) * 72 / len(records)
    size = min(4.5, max(1.5, 0.42 * width))
    handles: list[Handle] = []
    dot: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": size, "color": INK}
    edge = {"markeredgecolor": "white", "markeredgewidth": 0.7}
    cross = dot | edge | {"marker": "X", "markersize": 2 * size}
    for points, label, style in ((flags, "Flagged", dot), (quarantines, "Quarantined", cross)):
        if points:
            numbers, places = zip(*points, strict=True)
            handles.extend(axes.plot(numbers, places, label=label, **style))
    most = 14 if narrow else 24
    marks = [" *" if c in report["clients"]["malicious"] else "" for c in rows]
    names = [one_line(client, most) + mark for client, mark in zip(rows, marks, strict=True)]
    axes.set_yticks(range(len(rows)), names)
    for mark, text in zip(marks, axes.get_yticklabels(), strict=True):
        if mark:
            text.set(color=VERMILLION, weight="bold")
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if report["clients"]["malicious"]:
        handles.append(Line2D([], [], linestyle="", label="* attacker"))
    handles.append(Patch(**NO_SCORE, label="No score"))
    if _warm_up(report):
        handles.append(Patch(color=WARM, label="Warm-up"))
    legend_above(figure, handles, columns=2 if narrow else 5)
    bar = figure.colorbar(mesh, ax=axes, pad=0.01, aspect=max(10, 3 * len(rows)), shrink=0.9)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=7)
    bar.locator = MaxNLocator(4)
    bar.set_label("" if narrow else "Score: higher is more suspicious", size=8)


def _statistic(
    axes: Axes,
    report: Report,
    records: Sequence[Mapping[str, Any]],
    statistic: str,
    threshold: float | None,
) -> None:
    known = [r for r in records if statistic in r["evidence"]]
    numbers = [record["round"] for record in known]
    values = [record["evidence"][statistic] for record in known]
    axes.plot(numbers, values, color=SOFT, linewidth=1.0)
    for flagged, face in ((True, INK), (False, "white")):
        points = [
            (n, v)
            for r, n, v in zip(known, numbers, values, strict=True)
            if bool(r["flagged"]) is flagged
        ]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                linestyle="",
                marker="o",
                markersize=4.5,
                markerfacecolor=face,
                markeredgecolor=INK,
                markeredgewidth=0.8,
            )
    title = one_line(statistic.replace("_", " ").capitalize(), 30)
    if threshold is not None:
        axes.axhline(threshold, color=VERMILLION, linewidth=1.2, linestyle="--")
        title += f" against its threshold {threshold:g}"
    if _warm_up(report):
        last = min(_warm_up(report), records[-1]["round"])
        axes.axvspan(0.5, last + 0.5, color=WARM, linewidth=0, zorder=0)
    axes.set_title(title)
    axes.yaxis.set_major_locator(MaxNLocator(4))


# ---------------------------------------------------------------- shared
def _warm_up(report: Report) -> int:
    """Return the rounds in which flags do not count; 0 where nobody looks."""
    settings = report["settings"]
    return int(settings.get("warm-up", 0)) if settings.get("detector", "none") != "none" else 0


def _share(layer: Mapping[str, int]) -> float:
    return layer["zeroed"] / layer["of"] if layer["of"] else 0.0


def _round_axis(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    numbers = [record["round"] for record in records] or [0]
    axes.set_xlim(numbers[0] - 0.5, numbers[-1] + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    axes.set_xlabel("Round")


def one_line(text: str, most: int) -> str:
    """Return text from outside on one printable line of bounded length."""
    line = "".join(character if character.isprintable() else " " for character in text)
    return line if len(line) <= most else f"{line[: most - 1]}\u2026"


def _listed(names: Sequence[str], most: int) -> str:
    shown = ", ".join(one_line(name, 18) for name in names[:most])
    more = len(names) - most
    return f"{shown} and {more} more" if more > 0 else shown
