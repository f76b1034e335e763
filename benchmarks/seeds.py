"""Finished seeds on disk, so that a run that was interrupted goes on where it was; and tables."""

import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.engines import machine

REDRAW = "Only draw the figure again, from the numbers that are kept; nothing is trained."


def finished(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a file holds; if it is not there, make it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {**make(), "machine": machine()}
        _replace(path, json.dumps(found, indent=1) + "\n")
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return read


def mean(values: Sequence[float]) -> float:
    """Return the mean."""
    return statistics.fmean(values)


def deviation(values: Sequence[float]) -> float:
    """Return the standard deviation over seeds; 0 for one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def told(values: Sequence[float | None]) -> str:
    """Return mean and deviation in per cent; a dash where one was not measured."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "-"
    return f"{100 * mean(known):.1f} ± {100 * deviation(known):.1f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def line(
    where: str,
    what: str,
    metric: str,
    paper: float | None,
    ours: Sequence[float],
    scale: str,
    verdict: str,
) -> dict[str, Any]:
    """Return one line of a reproduction; ``paper`` in per cent, ``ours`` one share a seed."""
    return {
        "table": where,
        "row": what,
        "metric": metric,
        "paper": paper,
        "ours": round(100 * mean(ours), 2),
        "std": round(100 * deviation(ours), 2),
        "n_seeds": len(ours),
        "scale_note": scale,
        "verdict": verdict,
    }  # fmt: skip


def write(folder: Path, name: str, numbers: Mapping[str, Any], page: str, figure: str) -> None:
    """Write numbers, page and figure, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = json.dumps(numbers, indent=1) + "\n"
    for suffix, text in ((".json", kept), (".md", page), (".svg", figure)):
        _replace(folder / f"{name}{suffix}", text)


def redraw(folder: Path, name: str, draw: Callable[[Any], str]) -> None:
    """Draw the figure again, from the numbers that were written."""
    numbers = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    _replace(folder / f"{name}.svg", draw(numbers))


def _replace(path: Path, text: str) -> None:
    staged = path.with_name(f".{path.name}.part")
    staged.write_text(text, encoding="utf-8")
    os.replace(staged, path)
