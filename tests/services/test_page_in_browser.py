"""The pages as a browser shows them. Needs Chromium."""

import html
import shutil
import subprocess
from dataclasses import replace

import pytest

from server.settings import parse_overrides
from simulation import compare_page
from simulation.compare_report import describe, document
from simulation.comparison import Comparison
from simulation.engines.inprocess import InProcessGrid
from simulation.experiment import Experiment, client_app
from simulation.page import render
from simulation.report import report_of
from simulation.scenario import load_scenario
from unlearning.catalogue import SERVER

pytestmark = [
    pytest.mark.services,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="Chromium is not installed"),
]

SMALL = ["rounds=8", "warm-up=3", "local-epochs=2", "batch-size=16", "model=mlp", "optimizer=adam",
         "learning-rate=0.003", "weight-decay=0.0", "momentum=0.0", "pruning-rate=0.1",
         "attack.share=0.8"]  # fmt: skip

MEASURE = """
<iframe id=page style="width:{width}px;height:600px;border:0" srcdoc="{page}"></iframe>
<script>onload = () => {{
  const root = document.getElementById("page").contentDocument.documentElement;
  document.title = "scroll " + root.scrollWidth + " client " + root.clientWidth
    + " figures " + root.querySelectorAll("svg").length;
}}</script>
"""


def report():
    scenario = load_scenario("demo", parse_overrides(SMALL))
    experiment = Experiment(scenario)
    experiment.play(InProcessGrid(client_app(scenario), scenario.clients.total))
    return render(report_of(experiment.outcome, "inprocess"))


def comparison():
    """All methods, so that there is as much in the tables as there can be, one of them refused."""
    scenario = load_scenario("demo", parse_overrides(SMALL))
    made, second = (Comparison(scenario, list(SERVER), seed=seed, rounds=3) for seed in (0, 1))
    trials = made.play(InProcessGrid(client_app(made.scenario), scenario.clients.total))
    trials[0].refused = "too few honest clients are left, and the reason is a long one " * 3
    again = [replace(trial, seed=1) for trial in trials]
    described = describe(made)
    return compare_page.render(document(described, [made, second], [*trials, *again]))


@pytest.fixture(scope="module", params=[report, comparison], ids=lambda make: make.__name__)
def page(request):
    return request.param()


def chromium(folder, *arguments):
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", f"--user-data-dir={folder / 'profile'}", *arguments],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout


@pytest.mark.parametrize("width", [390, 800, 1200])
def test_nothing_sticks_out_sideways(page, width, tmp_path):
    outer = tmp_path / "outer.html"
    outer.write_text(MEASURE.format(width=width, page=html.escape(page)), encoding="utf-8")
    dom = chromium(tmp_path, "--dump-dom", outer.as_uri())
    title = dom.partition("<title>")[2].partition("</title>")[0].split()
    assert title[0] == "scroll", dom[:300]
    assert int(title[1]) <= int(title[3]) <= width
    assert int(title[5]) >= 3


def test_the_page_paints(page, tmp_path):
    path, picture = tmp_path / "page.html", tmp_path / "page.png"
    path.write_text(page, encoding="utf-8")
    chromium(tmp_path, f"--screenshot={picture}", "--window-size=1200,3000", path.as_uri())
    assert picture.stat().st_size > 50_000  # a blank page of this size takes about 10 kB
