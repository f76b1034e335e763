"""Partial updates beside whole ones: three ways to forget a class (paper 002, ``methods`` 6).

``python -m benchmarks.partial --data-dir DIR``. Amnesiac unlearning, label flipping and gradient
ascent, each touching all of a layer or a part that depends on its depth. Finished seeds are kept,
so that a run that was interrupted goes on where it was.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import figures, seeds
from benchmarks.engines import ROOT, one_line_errors
from benchmarks.seeds import mean, told
from client.central.methods import METHODS
from client.central.run import Target, forgotten, prepared
from client.central.settings import Training, Tuning
from client.task.protocol import TaskOptions, load_task

FORGET_CLASS = 3
EXAMPLES = 12_000
CONCENTRATION = 0.3
"""Share of an epoch's batches that hold the class; the paper's figure 4 goes from 0.1 to 1."""
TRAINING = {"epochs": 8, "batch-size": 128, "optimizer": "adam", "learning-rate": 1e-3,
            "concentration": CONCENTRATION}  # fmt: skip
EPOCHS = 25
"""Of flipping and ascent, at most: as many steps as five epochs on all 60,000 images."""
DATA = {"MNIST": "mnist", "Fashion-MNIST": "fashion-mnist"}
MODELS = {"MLP": "mlp-500", "LeNet": "lenet"}
NAME = "partial"
console = Console(stderr=True)


@dataclass(frozen=True)
class Pair:
    """A method and its partial twin.

    Attributes
    ----------
    limit
        Largest accuracy on the class that counts as forgotten.
    paper
        Model -> forgotten and retained accuracy of the naive and the partial method on MNIST, in
        per cent.
    """

    table: str
    naive: tuple[str, dict[str, Any]]
    partial: tuple[str, dict[str, Any]]
    limit: float
    paper: Mapping[str, tuple[tuple[float, float], tuple[float, float]]]


STEPS = {"epochs": EPOCHS}
PAIRS = {
    "amnesiac": Pair(
        "partial_table1",
        ("amnesiac", {"stop": "target"}),
        ("partial-amnesiac", {"stop": "target"}),
        0.02,
        {"MLP": ((0, 51.93), (0, 94.47)), "LeNet": ((0, 65.9), (0, 96.86))},
    ),
    "label flip": Pair(
        "partial_table3",
        ("label-flip", {**STEPS, "partial": False}),
        ("label-flip", {**STEPS, "partial": True}),
        0.03,
        {"MLP": ((0, 90.75), (0.89, 95.65)), "LeNet": ((1.78, 86.61), (2.67, 90.62))},
    ),
    "ascent": Pair(
        "partial_table5",
        ("ascent", {**STEPS, "partial": False}),
        ("ascent", {**STEPS, "partial": True}),
        0.02,
        {"MLP": ((0, 85.12), (0.39, 91.36)), "LeNet": ((0.29, 89.21), (0.89, 93.11))},
    ),
}


# ---------------------------------------------------------------- one seed
def one(data: str, model: str, seed: int, data_dir: str, examples: int) -> dict[str, Any]:
    """Forget a class six times from one trained model."""
    options = TaskOptions(
        task=DATA[data], model=MODELS[model], data_dir=data_dir, examples=examples, seed=seed,
        device="cpu",
    )  # fmt: skip
    training = Training.model_validate({**TRAINING, "seed": seed})
    case, grade = prepared(options, training, Target(FORGET_CLASS), logs=True)
    found: dict[str, Any] = {"rows": case.all_rows, "forgotten": len(case.rows), "pairs": {}}
    for title, pair in PAIRS.items():
        for which, (name, settings) in (("naive", pair.naive), ("partial", pair.partial)):
            method = METHODS[name]
            outcome = forgotten(case, grade, method, method.settings(**settings), Tuning(epochs=0))
            found["before"] = outcome.before
            found["pairs"].setdefault(title, {})[which] = {
                **outcome.unlearned,
                "seconds": outcome.seconds,
                "notes": outcome.made.notes,
            }
    return found


# ---------------------------------------------------------------- verdicts
def judged(title: str, data: str, model: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what ``methods`` 6 expects of a pair, check by check, and what that comes to."""
    pair = PAIRS[title]

    def of(which: str, key: str) -> float:
        return mean([run["pairs"][title][which][key] for run in runs])

    before = mean([run["before"]["retained"] for run in runs])
    gain = of("partial", "retained") - of("naive", "retained")
    checks = {
        f"forgets to {100 * pair.limit:.0f} or less": of("partial", "forget_test") <= pair.limit,
        "retains 2 points more than the naive": gain >= 0.02,
        "within 5 points of before": of("partial", "retained") >= before - 0.05,
        "worst class better than the naive's": of("partial", "worst") > of("naive", "worst"),
    }
    if data == "MNIST":
        printed = pair.paper[model][1][1] / 100
        checks["within 4 points of the paper"] = abs(of("partial", "retained") - printed) <= 0.04
    forgets, better = next(iter(checks.values())), gain > 0
    verdict = "direction" if forgets and better else "not reproduced"
    return {"verdict": "reproduced" if all(checks.values()) else verdict, "checks": checks}


# ---------------------------------------------------------------- the page
Cells = Mapping[tuple[str, str], list[dict[str, Any]]]


def page(cells: Cells) -> str:
    """Return the tables."""
    parts = [
        "# Partial updates beside whole ones",
        f"`python -m benchmarks.partial --data-dir DIR` makes this page. Class {FORGET_CLASS} is "
        "forgotten by a trained model, without any fine-tuning. Accuracies on test data in per "
        "cent, mean and standard deviation over seeds: of the class (forget), of the others "
        "(retain), and of the worst of these in each seed.",
        f"Scale: {EXAMPLES:,} training images, 8 epochs of Adam at 0.001 in batches of 128, in "
        f"{100 * CONCENTRATION:.0f} % of which the class is kept together. Amnesiac methods take "
        "back batches, the latest epoch first, until at most 1 % of the class's training rows is "
        "recognised or nothing is left to take back; if the class were in every batch, the whole "
        "method would return the initial model. Flipping and ascent stop at the same 1 %, after "
        f"{EPOCHS} epochs at the latest, as many steps as five on all 60,000 images. Partial "
        "methods keep, or touch, 20 % of the entries at one end of the network and 80 % at the "
        "other. All settings are the defaults, the same for every data set and network. The "
        "paper's numbers are for MNIST.",
        f"![Accuracy on the forgotten class and on the others]({NAME}.svg)",
    ]
    for (data, model), runs in cells.items():
        parts += [
            f"## {data}, {model}",
            f"Before: retain {told([run['before']['retained'] for run in runs])}, worst "
            f"{told([run['before']['worst'] for run in runs])}, forget "
            f"{told([run['before']['forget_test'] for run in runs])}. {runs[0]['forgotten']:,} of "
            f"{runs[0]['rows']:,} rows are forgotten; {len(runs)} seeds.",
            seeds.table(
                ("method", "forget", "retain", "worst", "paper: forget / retain", "s", "verdict"),
                [line for title in PAIRS for line in _lines(title, data, model, runs)],
            ),
        ]
        failed = {
            title: [what for what, holds in found["checks"].items() if not holds]
            for title in PAIRS
            for found in [judged(title, data, model, runs)]
        }
        parts += [
            f"{title}: does not hold: {', '.join(what)}." for title, what in failed.items() if what
        ]
    return "\n\n".join(parts) + "\n"


def _lines(title: str, data: str, model: str, runs: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for place, which in enumerate(("naive", "partial")):
        made = [run["pairs"][title][which] for run in runs]
        printed = PAIRS[title].paper[model][place] if data == "MNIST" else None
        found.append(
            (
                f"{title}, {which}",
                told([one["forget_test"] for one in made]),
                told([one["retained"] for one in made]),
                told([one["worst"] for one in made]),
                "-" if printed is None else f"{printed[0]} / {printed[1]}",
                f"{mean([one['seconds'] for one in made]):.1f}",
                judged(title, data, model, runs)["verdict"] if place else "",
            )
        )
    return found


def rows(cells: Cells) -> list[dict[str, Any]]:
    """Return the reproduction, line by line."""
    found = []
    for (data, model), runs in cells.items():
        scale = f"{data}, {EXAMPLES} images"
        for title, pair in PAIRS.items():
            verdict = judged(title, data, model, runs)["verdict"]
            for place, which in enumerate(("naive", "partial")):
                for number, (metric, key) in enumerate(
                    (("forget", "forget_test"), ("retain", "retained"))
                ):
                    paper = pair.paper[model][place][number] if data == "MNIST" else None
                    ours = [run["pairs"][title][which][key] for run in runs]
                    name = f"{model}, {which}"
                    found.append(seeds.line(pair.table, name, metric, paper, ours, scale, verdict))
    return found


def drawn(numbers: Mapping[str, Any]) -> str:
    """Return the figure."""
    return figures.partial(numbers["runs"], tuple(PAIRS))


def main(
    *,
    data_dir: Annotated[str, typer.Option(help="Folder of MNIST and Fashion-MNIST.")] = "",
    only: Annotated[list[str] | None, typer.Option(help="MNIST or Fashion-MNIST.")] = None,
    repetitions: Annotated[int, typer.Option("--seeds", min=1)] = 3,
    examples: Annotated[int, typer.Option(min=100, hidden=True)] = EXAMPLES,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = ROOT / "docs/results",
    work: Annotated[
        Path, typer.Option(help="Folder of finished seeds; they are not run again.")
    ] = ROOT / "runs" / NAME,
    redraw: Annotated[bool, typer.Option("--redraw", help=seeds.REDRAW)] = False,
) -> None:
    """Compare partial with whole updates and write a page."""
    with one_line_errors():
        if redraw:
            return seeds.redraw(output, NAME, drawn)
        torch.set_num_threads(1)
        cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
        order = [(data, model) for data in DATA for model in MODELS]
        for seed in range(repetitions):
            for data, model in order:
                if only and data not in only:
                    continue
                path = work / f"{data}-{model}-{examples}-seed{seed}.json".lower()

                def make(data: str = data, model: str = model, seed: int = seed) -> dict[str, Any]:
                    return one(data, model, seed, data_dir, examples)

                load_task.cache_clear()  # data of earlier seeds
                started = time.perf_counter()
                cells.setdefault((data, model), []).append(seeds.finished(path, make))
                console.print(
                    f"{data}, {model}, seed {seed}: {time.perf_counter() - started:.0f} s",
                    highlight=False,
                )
                found = {cell: cells[cell] for cell in order if cell in cells}
                verdicts = {
                    f"{title}, {', '.join(cell)}": judged(title, *cell, runs)
                    for cell, runs in found.items()
                    for title in PAIRS
                }
                runs = {", ".join(cell): made for cell, made in found.items()}
                numbers = {"rows": rows(found), "verdicts": verdicts, "runs": runs}
                seeds.write(output, NAME, numbers, page(found), drawn(numbers))


if __name__ == "__main__":
    typer.run(main)
