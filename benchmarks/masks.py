"""Masks before fine-tuning: FisherMask beside five others (paper 001, ``methods`` 5).

``python -m benchmarks.masks --data-dir DIR``. A class is removed; what is left of it and of the
others is measured right after masking and after every epoch of fine-tuning. Finished seeds are
kept, so that a run that was interrupted goes on where it was.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import figures, seeds, squares
from benchmarks.engines import ROOT, one_line_errors
from benchmarks.seeds import mean, told
from client.central.methods import METHODS
from client.central.run import Target, forgotten, prepared
from client.central.settings import Training, Tuning
from client.task.protocol import TaskOptions, load_task
from unlearning.masking import volatility_abs, volatility_net
from unlearning.parameters import trained_names

FORGET_CLASS = 3
EXAMPLES = 6_000
TRAINING = {"epochs": 8, "batch-size": 64, "learning-rate": 0.02, "momentum": 0.9,
            "learning-rate-milestones": "4,6"}  # fmt: skip
CELLS = {
    "MNIST, ConvNet": ("benchmarks.small_models:mnist", ""),
    "Fashion-MNIST, ConvNet": ("benchmarks.small_models:fashion_mnist", ""),
    "MNIST, LeNet": ("mnist", "lenet"),
    "Fashion-MNIST, LeNet": ("fashion-mnist", "lenet"),
}
"""Data and model -> task and model."""
PAPER: dict[str, tuple[float, float]] = {
    "finetune": (74.18, 85.28),
    "random-mask": (65.75, 83.80),
    "tfidf": (42.23, 38.83),
    "fisher-noise": (36.62, 0.26),
    "activation-mask": (63.10, 4.40),
    "grad-mask": (57.08, 7.56),
    "fisher-mask": (65.05, 1.42),
}
"""Paper 001, Table 1: accuracy on remaining and on forgotten data, in per cent, right after
masking; means over 16 models. The row of fine-tuning is the model as it was."""
BY_LAYER = "fisher-mask, by layer"
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in PAPER},
    BY_LAYER: ("fisher-mask", {"scope": "layer"}),
}
"""Row of a table -> method and its settings."""
MASKS = ("fisher-mask", "activation-mask", "grad-mask", "random-mask")
NAME = "masks"
console = Console(stderr=True)


# ---------------------------------------------------------------- one seed
def one(cell: str, seed: int, data_dir: str, examples: int) -> dict[str, Any]:
    """Remove a class by every method from one trained model."""
    task, model = CELLS[cell]
    options = TaskOptions(
        task=task, model=model, data_dir=data_dir, examples=examples, seed=seed, device="cpu"
    )
    training = Training.model_validate({**TRAINING, "seed": seed})
    case, grade = prepared(options, training, Target(FORGET_CLASS))
    found: dict[str, Any] = {"rows": case.all_rows, "forgotten": len(case.rows), "methods": {}}
    first = trained_names(case.model)[0]
    for row, (name, settings) in ROWS.items():
        method = METHODS[name]
        outcome = forgotten(case, grade, method, method.settings(**settings), Tuning())
        zero = outcome.made.models[0][first] == 0
        course = [outcome.unlearned, *outcome.tuned]
        found["before"] = outcome.before
        found["methods"][row] = {
            "retained": [point["retained"] for point in course],
            "forget": [point["forget_test"] for point in course],
            "forget_train": [point["forget_train"] for point in course],
            "worst": [point["worst"] for point in course],
            "seconds": outcome.seconds,
            "zeroed_in_first_layer": float(zero.float().mean()),
            "settings": method.settings(**settings).model_dump(by_alias=True),
        }
    return found


# ---------------------------------------------------------------- verdicts
def judged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what ``methods`` 5 expects of a single small model, each with its numbers."""

    def of(name: str, key: str) -> float:
        return mean([run["methods"][name][key][0] for run in runs])

    before = mean([run["before"]["retained"] for run in runs])
    known = mean([run["before"]["forget_test"] for run in runs])
    forget = {name: of(name, "forget") for name in PAPER}
    remain = {name: of(name, "retained") for name in PAPER}
    others = {name: forget[name] for name in MASKS[1:]}
    lead = remain["fisher-mask"] - remain["fisher-noise"]
    unsteady = {
        name: mean([volatility_abs(run["methods"][name]["forget"]) or 0.0 for run in runs])
        for name in MASKS
    }
    share = remain["fisher-mask"] / before
    moved = abs(forget["random-mask"] - known)
    return {
        "FisherMask forgets": _verdict(
            forget["fisher-mask"] <= 0.05, forget["fisher-mask"] <= 0.10,
            f"{_pc(forget['fisher-mask'])} of the class, expected 5 or less, 10 on a small model",
        ),
        "FisherMask keeps the others": _verdict(
            share >= 0.8, share >= 0.7,
            f"{_pc(share)} of the accuracy before, expected 80 or more, 70 on a small model",
        ),
        "FisherMask forgets more than other masks": _verdict(
            all(forget["fisher-mask"] < value for value in others.values()),
            forget["fisher-mask"] <= min(others.values()),
            f"{_pc(forget['fisher-mask'])} against "
            + ", ".join(f"{name} {_pc(value)}" for name, value in others.items()),
        ),
        "FisherMask keeps more than FisherNoise": _verdict(
            lead >= 0.15, lead > 0, f"{100 * lead:+.1f} points, expected 15 or more"
        ),
        "RandomMask forgets nothing": _verdict(
            moved <= 0.10, moved <= 0.20, f"{100 * moved:.1f} points moved, expected 10 or fewer"
        ),
        "FisherMask is the steadiest mask on the class": _verdict(
            unsteady["fisher-mask"] < min(unsteady[name] for name in MASKS[1:]),
            unsteady["fisher-mask"] <= sorted(unsteady.values())[1],
            ", ".join(f"{name} {_pc(value)}" for name, value in unsteady.items()),
        ),
    }  # fmt: skip


def _verdict(reproduced: bool, direction: bool, numbers: str) -> dict[str, str]:
    verdict = "reproduced" if reproduced else "direction" if direction else "not reproduced"
    return {"verdict": verdict, "numbers": numbers}


def _pc(share: float) -> str:
    return f"{100 * share:.1f}"


# ---------------------------------------------------------------- the page
def page(cells: Mapping[str, list[dict[str, Any]]], timed: Mapping[str, Any]) -> str:
    """Return the tables."""
    training = ", ".join(f"{key} {value}" for key, value in TRAINING.items() if value != "")
    parts = [
        "# Masks before fine-tuning",
        f"`python -m benchmarks.masks --data-dir DIR` makes this page. Class {FORGET_CLASS} is "
        "removed from a trained model, in all data that it was trained on. Accuracies on test "
        "data in per cent, mean and standard deviation over seeds: of the classes that stay "
        "(remain) and of the removed one (forget), right after masking and after one and five "
        "epochs of fine-tuning on the rest, with the training's learning rates replayed. "
        "Volatility over these six points, in points per epoch: net is the formula that the paper "
        "prints, which is the net change; abs is the mean of the changes' sizes.",
        f"Scale: {EXAMPLES:,} training images, {training}. The paper's own numbers are means over "
        "16 larger models on four data sets; of a single small model less is expected, see the "
        "verdicts. In `masks.json` every printed number has a verdict of its own: relative to the "
        "accuracy before, within 0.15 of the paper's is reproduced, on the same side of a half is "
        "direction. Settings are the commands' defaults, the same for all; channel methods mask "
        "whole channels, of which these networks have 22 (LeNet) and 112 (ConvNet: three times "
        "convolution, normalisation and rectifier).",
        f"![Accuracy on the removed class and on the others]({NAME}.svg)",
    ]
    for cell, runs in cells.items():
        before = runs[0]["rows"], runs[0]["forgotten"]
        untouched = (
            f"Before: remain {told([run['before']['retained'] for run in runs])}, forget "
            f"{told([run['before']['forget_test'] for run in runs])}. {before[1]:,} of "
            f"{before[0]:,} training rows are removed; {len(runs)} seeds."
        )
        head = ("method", "remain", "forget", "paper", "remain after 1, 5", "forget after 1, 5",
                "volatility of forget, net / abs", "s")  # fmt: skip
        parts += [f"## {cell}", untouched]
        parts.append(seeds.table(head, [_row(name, runs) for name in ROWS]))
        parts.append(_where(runs))
        verdicts = [(what, v["verdict"], v["numbers"]) for what, v in judged(runs).items()]
        parts.append(seeds.table(("expected", "verdict", "numbers"), verdicts))
    parts += [
        "## Time of the statistics",
        f"Expected: at most {squares.LIMIT:.0f} training epochs on the same rows, in batches of "
        f"{TRAINING['batch-size']}. One thread; statistics and epochs in turn, and the quickest of "
        f"{squares.REPETITIONS} each, so that other work on the machine slows both or neither. "
        "All models that are built in, and the ConvNet above.",
        squares.table(timed),
    ]
    return "\n\n".join(parts) + "\n"


def _where(runs: list[dict[str, Any]]) -> str:
    """Say what the share over the whole model does to a small first layer."""

    def of(row: str, key: str) -> str:
        return _pc(mean([run["methods"][row][key] for run in runs]))

    worst, layered = (
        _pc(mean([run["methods"][row]["worst"][0] for run in runs]))
        for row in ("fisher-mask", BY_LAYER)
    )
    zeroed = "zeroed_in_first_layer"
    return (
        "FisherMask's share is of all parameters together, as specified; it zeroes "
        f"{of('fisher-mask', zeroed)} % of the few weights of the first convolution, and the worst "
        f"of the classes that stay is left with {worst} %. With the same share of each layer, "
        f"weight and bias together (`scope=layer`), it zeroes {of(BY_LAYER, zeroed)} % there and "
        f"leaves {layered} %."
    )


def _row(name: str, runs: list[dict[str, Any]]) -> tuple[str, ...]:
    found = [run["methods"][name] for run in runs]
    printed = " / ".join(map(str, PAPER[name])) if name in PAPER else "-"
    net = mean([volatility_net(one["forget"]) or 0.0 for one in found])
    size = mean([volatility_abs(one["forget"]) or 0.0 for one in found])

    def after(key: str, epoch: int) -> str:
        return told([one[key][epoch] for one in found])

    return (
        name,
        after("retained", 0),
        after("forget", 0),
        printed,
        f"{after('retained', 1)}, {after('retained', -1)}",
        f"{after('forget', 1)}, {after('forget', -1)}",
        f"{100 * net:+.1f} / {100 * size:.1f}",
        f"{mean([one['seconds'] for one in found]):.1f}",
    )


def rows(cells: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the reproduction, line by line."""
    found = []
    for cell, runs in cells.items():
        scale = f"{cell}, {EXAMPLES} images; the paper's mean is over 16 models"
        for name, printed in PAPER.items():
            for metric, paper, before in zip(
                ("retained", "forget"), printed, PAPER["finetune"], strict=True
            ):
                ours = [run["methods"][name][metric][0] for run in runs]
                known = "forget_test" if metric == "forget" else metric
                share = mean(ours) / mean([run["before"][known] for run in runs])
                verdict = compared(share, paper / before)
                found.append(seeds.line("fisher_table1", name, metric, paper, ours, scale, verdict))
    return found


def compared(ours: float, paper: float) -> str:
    """Judge an accuracy, in units of that before: within 0.15, or on the same side of a half."""
    if abs(ours - paper) <= 0.15:
        return "reproduced"
    return "direction" if (ours < 0.5) == (paper < 0.5) else "not reproduced"


def drawn(numbers: Mapping[str, Any]) -> str:
    """Return the figure."""
    return figures.masks(numbers["runs"], tuple(PAPER))


def main(
    *,
    data_dir: Annotated[str, typer.Option(help="Folder of MNIST and Fashion-MNIST.")] = "",
    only: Annotated[list[str] | None, typer.Option(help="Such as 'MNIST, LeNet'.")] = None,
    repetitions: Annotated[int, typer.Option("--seeds", min=1)] = 3,
    examples: Annotated[int, typer.Option(min=100, hidden=True)] = EXAMPLES,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = ROOT / "docs/results",
    work: Annotated[
        Path, typer.Option(help="Folder of finished seeds; they are not run again.")
    ] = ROOT / "runs" / NAME,
    redraw: Annotated[bool, typer.Option("--redraw", help=seeds.REDRAW)] = False,
) -> None:
    """Compare masks and write a page."""
    with one_line_errors():
        if redraw:
            return seeds.redraw(output, NAME, drawn)
        torch.set_num_threads(1)
        times = seeds.finished(
            work / "statistics.json", lambda: squares.measured(Training.model_validate(TRAINING))
        )
        timed = {name: times[name] for name in squares.MODELS}
        cells: dict[str, list[dict[str, Any]]] = {}
        for seed in range(repetitions):
            for cell in CELLS:
                if only and cell not in only:
                    continue
                path = work / f"{cell.replace(', ', '-').lower()}-{examples}-seed{seed}.json"

                def make(cell: str = cell, seed: int = seed) -> dict[str, Any]:
                    return one(cell, seed, data_dir, examples)

                load_task.cache_clear()  # data of earlier seeds
                started = time.perf_counter()
                cells.setdefault(cell, []).append(seeds.finished(path, make))
                console.print(
                    f"{cell}, seed {seed}: {time.perf_counter() - started:.0f} s", highlight=False
                )
                ordered = {name: cells[name] for name in CELLS if name in cells}
                verdicts = {name: judged(runs) for name, runs in ordered.items()}
                numbers = {
                    "rows": rows(ordered), "verdicts": verdicts, "statistics": timed,
                    "runs": ordered,
                }  # fmt: skip
                seeds.write(output, NAME, numbers, page(ordered, timed), drawn(numbers))


if __name__ == "__main__":
    typer.run(main)
