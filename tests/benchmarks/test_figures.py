"""Figures of the pages of results: drawn from what is kept, without training."""

import json
import re
import shutil
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import clients, ffmu, figures, masks, partial

RESULTS = Path(__file__).resolve().parents[2] / "docs/results"
BENCHMARKS = {"masks": masks, "partial": partial, "ffmu": ffmu, "clients": clients}


def texts(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_figure_is_drawn_again_from_the_numbers_alone(name, tmp_path):
    shutil.copy(RESULTS / f"{name}.json", tmp_path)
    app = typer.Typer()
    app.command()(BENCHMARKS[name].main)
    where = ["--output", str(tmp_path), "--work", str(tmp_path / "work")]
    for made in ("first", "second"):
        result = CliRunner().invoke(app, ["--redraw", *where], catch_exceptions=False)
        assert result.exit_code == 0
        (tmp_path / f"{name}.svg").rename(tmp_path / made)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"first", "second", f"{name}.json"}
    page = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
    assert page.count(f"]({name}.svg)") == 1
    assert (RESULTS / f"{name}.svg").exists()


def test_every_cell_and_method_has_its_place():
    numbers = json.loads((RESULTS / "masks.json").read_text(encoding="utf-8"))
    found = texts(masks.drawn(numbers))
    assert {*masks.PAPER, "before", "after fine-tuning"} <= set(found)
    for cell, runs in numbers["runs"].items():
        assert f"{cell}; {len(runs)} seeds" in found


def test_a_fetched_font_or_style_sheet_is_in_no_figure():
    for name in BENCHMARKS:
        svg = (RESULTS / f"{name}.svg").read_text(encoding="utf-8")
        addresses = set(re.findall(r"https?://[^\"']+", svg))
        assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_points_are_means_of_the_seeds(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        figures, "_arrow", lambda axes, begin, end, look: drawn.append([begin, end])
    )

    def point(forget, retained):
        return {"forget_test": forget, "retained": retained}

    def run(naive, partial):
        twins = {"naive": point(*naive), "partial": point(*partial)}
        return {"pairs": {"a": twins}, "before": point(1, 1)}

    runs = [run((0.1, 0.5), (0.3, 0.7)), run((0.3, 0.9), (0.5, 0.9))]
    figures.partial({"cell": runs}, ["a"])
    # (0.1 + 0.3) / 2, (0.5 + 0.9) / 2; (0.3 + 0.5) / 2, (0.7 + 0.9) / 2
    assert drawn == [[pytest.approx((0.2, 0.7)), pytest.approx((0.4, 0.8))]]


def test_marks_tell_methods_apart_without_colours():
    assert len({mark for _, mark in figures.LOOKS}) == len(figures.LOOKS)
