"""What figures have in common, as SVG text. The same numbers give the same bytes.

Colours are Okabe and Ito's, which colour-blind people can tell apart; line styles and marks say the
same.
"""

import re
from collections.abc import Sequence
from io import StringIO
from typing import Any

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

Handle = Line2D | Patch
"""An entry of a legend."""

BLUE, VERMILLION, PURPLE, GREEN = "#0072b2", "#d55e00", "#aa4499", "#117733"
INK, SOFT, FAINT, WARM = "#24292f", "#6b7280", "#e5e7eb", "#eceff3"
WIDTH, NARROW_WIDTH = 9.6, 3.5
"""Inches; letters have the same size in both."""
LEVEL: dict[str, Any] = {"linewidth": 1.0, "linestyle": (0, (8, 2, 1, 2)), "zorder": 1}
"""The line of what has to be reached, as by retraining."""
STYLE: dict[str, Any] = {
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.labelsize": 8.5,
    "figure.facecolor": "white",
    "font.family": "sans-serif",
    "font.size": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": SOFT,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.color": SOFT,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 8,
}


def style_of(name: str) -> Any:
    """Return Matplotlib's settings for a figure of this name."""
    return STYLE | {"svg.hashsalt": name}


def legend_above(figure: Figure, handles: Sequence[Handle], *, columns: int) -> None:
    """Draw one legend for the whole figure, if there is anything in it."""
    if handles:
        figure.legend(handles=list(handles), loc="outside upper left", ncols=columns)


def as_svg(figure: Figure, name: str, title: str) -> str:
    """Return the figure as one ``<svg>`` element whose ids no other figure has."""
    FigureCanvasSVG(figure)
    buffer = StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Matplotlib's own rule would hold for every figure of a page: it is inherited instead.
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", text, count=1, flags=re.DOTALL)
    joints = 'stroke-linejoin="round" stroke-linecap="butt"'
    text = text.replace("<svg", f'<svg role="img" aria-label="{title}" {joints}', 1)
    # Text is escaped, so that whatever stands between < and > is a tag.
    return re.sub(r"<[^>]*>", lambda tag: _own_ids(tag[0], name), text)


def _own_ids(tag: str, name: str) -> str:
    tag = re.sub(r'\bid="', f'id="{name}-', tag)
    return re.sub(r'(href="|url\()#', rf"\1#{name}-", tag)
