"""Write the results: numbers as JSON, tables into the page, and a plot."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks.workloads import WORKLOADS
from client.drawing import BLUE, FAINT, GREEN, INK, PURPLE, SOFT, STYLE, VERMILLION

NUMBERS, PAGE, PLOT = "performance.json", "performance.md", "performance.svg"
BEGIN, END = "<!-- results: written by make bench -->", "<!-- end of results -->"
FAMILIES = {"clients": "number of clients", "size": "parameters of the model"}
LOOKS = {
    "bare": (INK, "o"),
    "bare-2": (SOFT, "o"),
    "sequential": (BLUE, "s"),
    "batched": (VERMILLION, "D"),
    "batched-screened": (VERMILLION, "x"),
    "ray": (PURPLE, "^"),
    "pfl": (GREEN, "v"),
}
"""Contender -> colour and mark."""

Results = dict[str, Any]
"""Workload -> what ``benchmarks.engines.measure`` yields."""


def load(folder: Path) -> Results:
    """Return the results so far, in the order of the table of workloads."""
    path = folder / NUMBERS
    found: Results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {name: found[name] for name in WORKLOADS if name in found}


def save(folder: Path, name: str, found: Mapping[str, Any]) -> None:
    """Replace one workload's results."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**load(folder), name: found}, indent=1)
    (folder / NUMBERS).write_text(text + "\n", encoding="utf-8")


def write(folder: Path) -> None:
    """Write the tables between the page's two markers, and the plot beside it."""
    results = load(folder)
    if not results:
        return
    path = folder / PAGE
    text = path.read_text(encoding="utf-8") if path.exists() else f"{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    tables = "\n\n".join([*_tables(results), f"![Seconds per round]({PLOT})"])
    path.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}", encoding="utf-8")
    plot(results, folder / PLOT)


# ---------------------------------------------------------------- tables
def baseline(contenders: Mapping[str, Any]) -> str:
    """Return the faster of the plain loops, or nothing where none was run."""
    bare = [name for name in ("bare", "bare-2") if name in contenders]
    return min(bare, key=lambda name: contenders[name]["seconds_per_round"], default="")


def _tables(results: Results) -> Iterator[str]:
    for name, result in results.items():
        if not result["family"]:
            yield _table(name, result)
    for family, axis in FAMILIES.items():
        members = [result for result in results.values() if result["family"] == family]
        if members:
            yield _curve_table(axis, members)


def _table(name: str, result: Mapping[str, Any]) -> str:
    contenders = result["contenders"]
    base = baseline(contenders)
    lines = [
        f"## {name}",
        f"{result['summary']}. {_where(result)}",
        "| contender | seconds per round [quartiles] | x plain | first round after, s | peak MB | "
        "test accuracy | rounds, of them warm-up |\n|---|---|---|---|---|---|---|",
    ]
    for key, found in contenders.items():
        low, high = found["quartiles"]
        seconds = found["seconds_per_round"]
        ratio = f"{seconds / contenders[base]['seconds_per_round']:.2f}" if base else ""
        cells = [
            f"**{found['title']}**" if key == base else found["title"],
            f"{_short(seconds)} [{_short(low)}, {_short(high)}]",
            ratio,
            f"{found['first_round_s']:.1f}",
            f"{found['peak_mb']:.0f}",
            f"{100 * found['accuracy']:.1f} %",
            f"{found['repetitions']} x {found['rounds']}, {found['dropped']}",
        ]
        lines[-1] += f"\n| {' | '.join(cells)} |"
    return "\n\n".join(lines)


def _curve_table(axis: str, members: list[Any]) -> str:
    keys = [key for key in LOOKS if any(key in member["contenders"] for member in members)]
    titles = [
        next(m["contenders"][k]["title"] for m in members if k in m["contenders"]) for k in keys
    ]
    head = "".join(f" {title}, s per round | MB |" for title in titles)
    lines = [f"| {axis} |{head}", "|---|" + "---|---|" * len(keys)]
    for member in sorted(members, key=lambda found: found["at"]):
        cells = [f"{member['at']:,}"]
        for key in keys:
            found = member["contenders"].get(key)
            cells += (
                [_short(found["seconds_per_round"]), f"{found['peak_mb']:.0f}"]
                if found
                else ["", ""]
            )
        lines.append(f"| {' | '.join(cells)} |")
    table = "\n".join(lines)
    return f"## Cost against the {axis}\n\n{_where(members[0])}\n\n{table}"


def _where(result: Mapping[str, Any]) -> str:
    versions: dict[str, str] = {}
    for found in result["contenders"].values():
        versions = {**found["versions"], **versions}
    named = ", ".join(f"{package} {version}" for package, version in versions.items())
    machine = result["machine"]
    return f"{result['date']}, {machine['cpu']}, {machine['cores']} cores, {named}."


def _short(seconds: float) -> str:
    return f"{seconds:.4f}" if seconds < 1 else f"{seconds:.2f}"


# ---------------------------------------------------------------- plot
def plot(results: Results, path: Path) -> None:
    """Draw seconds per round: of every workload, and against each axis of scale."""
    single = {name: result for name, result in results.items() if not result["family"]}
    families = {
        family: members
        for family in FAMILIES
        if (members := [found for found in results.values() if found["family"] == family])
    }
    panels = bool(single) + len(families)
    style: Any = {**STYLE, "svg.hashsalt": "performance"}  # the same numbers give the same bytes
    with mpl.rc_context(style):
        figure = Figure((9.6, 0.9 + 2.5 * panels), layout="constrained")
        axes = list(figure.subplots(panels, squeeze=False)[:, 0])
        if single:
            _dots(axes.pop(0), single)
        for family, members in families.items():
            _curve(axes.pop(0), FAMILIES[family], members)
        handles: dict[str, Any] = {}
        for panel in figure.axes:
            panel.xaxis.set_major_formatter(FuncFormatter(_plain))
            if panel.get_yscale() == "log":
                panel.yaxis.set_major_formatter(FuncFormatter(_plain))
            found, labels = panel.get_legend_handles_labels()
            handles = {**dict(zip(labels, found, strict=True)), **handles}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
        canvas = FigureCanvasSVG(figure)
        canvas.print_svg(path, metadata={"Date": None})  # type: ignore[no-untyped-call]


def _plain(value: float, _: int | None) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def _dots(axes: Axes, single: Results) -> None:
    for key, (colour, mark) in LOOKS.items():
        found = {name: r["contenders"][key] for name, r in single.items() if key in r["contenders"]}
        rows = [list(single).index(name) for name in found]
        seconds = [result["seconds_per_round"] for result in found.values()]
        title = next((result["title"] for result in found.values()), "")
        if found:
            axes.plot(seconds, rows, mark, color=colour, label=title, markersize=6, alpha=0.9)
    axes.set_yticks(range(len(single)), list(single))
    axes.set_ylim(len(single) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.set_xlabel("seconds per round")
    axes.grid(color=FAINT, linewidth=0.6)


def _curve(axes: Axes, axis: str, members: list[Any]) -> None:
    for key, (colour, mark) in LOOKS.items():
        points = sorted(
            (member["at"], member["contenders"][key]["seconds_per_round"])
            for member in members
            if key in member["contenders"]
        )
        title = next((m["contenders"][key]["title"] for m in members if key in m["contenders"]), "")
        if points:
            axes.plot(
                *zip(*points, strict=True), f"{mark}-", color=colour, label=title, linewidth=1
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(axis)
    axes.set_ylabel("seconds per round")
    axes.grid(color=FAINT, linewidth=0.6)
