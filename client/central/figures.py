"""Figures of a report of one machine, as SVG text."""

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from client.drawing import (
    BLUE,
    FAINT,
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

MOST_CLASSES = 40
"""More cannot be told apart."""
RETRAINED: dict[str, Any] = {**LEVEL, "color": INK}
CURVES = {
    "retained": ("Classes that stay", BLUE, "o"),
    "worst": ("Worst of them", PURPLE, "^"),
    "forget_test": ("Forgotten, test rows", VERMILLION, "s"),
    "forget_train": ("Forgotten, training rows", SOFT, "x"),
}
"""Measure -> label, colour and mark."""


def figures(report: Mapping[str, Any]) -> dict[str, str]:
    """Return name -> SVG of every figure that has something to show."""
    found = {}
    shares = report["before"]["classes"]
    if shares and len(shares) <= MOST_CLASSES:
        found["classes"] = classes(report)
    if report["tuned"] and any(report["before"][key] is not None for key in CURVES):
        found["curves"] = curves(report)
    return found


def classes(report: Mapping[str, Any]) -> str:
    """Draw the test accuracy of every class: before, at the end, and of a retrained model."""
    with mpl.rc_context(style_of("classes")):
        figure = Figure((WIDTH, 2.9), layout="constrained")
        axes = figure.subplots()
        handles: list[Handle] = []
        end = "Fine-tuned" if report["tuned"] else "Unlearned"
        for label, shift, colour, point in (
            ("Before", -0.2, SOFT, "before"),
            (end, 0.2, BLUE, "after"),
        ):
            places, shares = _known(report[point])
            bars = axes.bar([p + shift for p in places], shares, 0.36, color=colour, label=label)
            handles.append(bars.patches[0])
            bars.patches[0].set_label(label)
        if report["retrained"] is not None:
            places, shares = _known(report["retrained"])
            style: dict[str, Any] = {"marker": "_", "markersize": 16, "markeredgewidth": 2}
            handles += axes.plot(places, shares, "", color=INK, label="Retrained", **style)
            handles[-1].set_linestyle("")
        gone = report["forgotten"]["class"]
        count = len(report["before"]["classes"])
        axes.set_xticks(range(count), [f"{n} *" if n == gone else str(n) for n in range(count)])
        axes.set_xlabel("Class" if gone is None else "Class; * is forgotten")
        axes.set_ylabel("Accuracy on test rows")
        _per_cent(axes)
        legend_above(figure, handles, columns=3)
        return as_svg(figure, "classes", "Test accuracy of every class before and after forgetting")


def curves(report: Mapping[str, Any]) -> str:
    """Draw accuracies before, right after forgetting, and after each epoch of fine-tuning."""
    course = [report["before"], report["unlearned"], *report["tuned"]]
    numbers = range(-1, len(course) - 1)
    with mpl.rc_context(style_of("curves")):
        figure = Figure((WIDTH, 3.4), layout="constrained")
        axes = figure.subplots()
        handles: list[Handle] = []
        for key, (label, colour, mark) in CURVES.items():
            shares = [point[key] for point in course]
            if None in shares:
                continue
            handles += axes.plot(numbers, shares, f"{mark}-", color=colour, label=label)
            retrained = report["retrained"]
            if retrained is not None and key in ("retained", "forget_train"):
                axes.axhline(retrained[key], **RETRAINED | {"color": colour})
        if report["retrained"] is not None:
            handles += axes.plot([], [], label="\u2026 if retrained", **RETRAINED)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        names = {-1: "before", 0: "unlearned"}
        axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: names.get(int(n), f"{n:.0f}")))
        axes.set_xlabel("Epochs of fine-tuning")
        axes.set_ylabel("Accuracy")
        _per_cent(axes)
        legend_above(figure, handles, columns=5)
        return as_svg(figure, "curves", "Accuracies before, after forgetting and over fine-tuning")


def _known(point: Mapping[str, Any]) -> tuple[list[int], list[float]]:
    """Return the classes that test rows tell about, and their accuracies."""
    known = [(n, share) for n, share in enumerate(point["classes"]) if share is not None]
    return [n for n, _ in known], [share for _, share in known]


def _per_cent(axes: Any) -> None:
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.0f} %"))
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
