"""Every method of ``secateur local`` beside retraining: a class, and single rows.

``python -m benchmarks.clients --data-dir DIR``. What is left of the rows and of the others, an
attack that asks who was trained on, and time. Finished seeds are kept, so that a run that was
interrupted goes on where it was.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch.nn import functional

from benchmarks import figures, seeds
from benchmarks.engines import ROOT, one_line_errors
from benchmarks.membership import attack_auc
from benchmarks.seeds import mean, told
from client.central.case import Case, Graded, Models
from client.central.methods import METHODS
from client.central.run import Outcome, Target, forgotten, prepared
from client.central.settings import Training, Tuning
from client.task.protocol import TaskOptions, load_task, size_of
from unlearning.errors import SecateurError
from unlearning.randomness import generator

FORGET_CLASS = 3
SHARE = 0.05
"""Of the rows, where single ones are forgotten."""
EXAMPLES = 3_000
TRAINING = {"epochs": 8, "batch-size": 64, "learning-rate": 0.02, "momentum": 0.9,
            "concentration": 0.3}  # fmt: skip
DATA = {"MNIST": "mnist", "Fashion-MNIST": "fashion-mnist"}
CLASS, ROWS = f"class {FORGET_CLASS}", f"{100 * SHARE:.0f} % of the rows"
KINDS = {CLASS: "class", ROWS: "rows"}
"""Request -> its name in files."""
MLP, LENET = "mlp-32", "lenet"
CHANNELS = ("activation-mask", "grad-mask", "tfidf")
"""Methods that need convolutions."""
SETTINGS: dict[str, dict[str, Any]] = {"pcmu": {"uncertified": True}}
"""Method -> settings other than its defaults: without, PCMU would be refused."""
NEAR, WORSE = 0.05, 0.02
"""Distances from retraining's accuracies that are called near."""
BASELINE, BEFORE = "retrain", "before"
NAME = "clients"
console = Console(stderr=True)


# ---------------------------------------------------------------- one seed
def one(data: str, request: str, seed: int, data_dir: str, examples: int) -> dict[str, Any]:
    """Serve a request by every method, each on the smallest network that it can do with."""
    found: dict[str, Any] = {"methods": {}}
    for model in (MLP, LENET):
        options = TaskOptions(
            task=DATA[data], model=model, data_dir=data_dir, examples=examples, seed=seed,
            device="cpu",
        )  # fmt: skip
        training = Training.model_validate({**TRAINING, "seed": seed})
        case, grade = prepared(options, training, _target(request, options), logs=model == MLP)
        found |= {"rows": case.all_rows, "forgotten": len(case.rows)}
        names = [BASELINE, *METHODS] if model == MLP else [BASELINE, *CHANNELS]
        base: dict[str, Any] = {}
        for name in dict.fromkeys(names):
            if model == MLP and name in CHANNELS:
                continue
            made = _served(name, case, grade, base.get("seconds"))
            base = base or made
            found["methods"][name if model == MLP or name in CHANNELS else f"{name}, LeNet"] = made
            console.print(f"{data}, {request}, seed {seed}: {name}", highlight=False)
        found["methods"][BEFORE if model == MLP else f"{BEFORE}, LeNet"] = _measures(
            case, grade, (case.model,), grade((case.model,))
        )
    return found


def _target(request: str, options: TaskOptions) -> Target:
    if request == CLASS:
        return Target(FORGET_CLASS)
    count = size_of(load_task(options).client_data(0, 1).train)
    draw = generator(options.seed, "rows to forget")
    chosen = torch.randperm(count, generator=draw)[: round(SHARE * count)]
    return Target(rows=tuple(sorted(chosen.tolist())))


def _served(name: str, case: Case, grade: Graded, retraining: float | None) -> dict[str, Any]:
    """Return what a method achieves, or why it refuses."""
    method = METHODS[name]
    try:
        outcome: Outcome = forgotten(
            case, grade, method, method.settings(**SETTINGS.get(name, {})), Tuning()
        )
    except SecateurError as error:
        return {"refused": str(error)}
    seconds = outcome.seconds + outcome.tuning_seconds
    return _measures(case, grade, outcome.models, outcome.after) | {
        "right_after": outcome.unlearned["forget_train"],
        "seconds": seconds,
        "speed": (seconds if retraining is None else retraining) / max(seconds, 1e-9),
        "guarantee": outcome.made.guarantee,
        "warnings": list(outcome.made.warnings),
    }


def _measures(
    case: Case, grade: Graded, models: Models, measured: Mapping[str, Any]
) -> dict[str, Any]:
    inputs, targets = grade.test
    if case.forget_class is not None:  # members and others are told apart within the class
        alike = targets == case.forget_class
        inputs, targets = inputs[alike], targets[alike]
    gone, unseen = (
        functional.cross_entropy(grade.predicted(models, rows[0]), rows[1], reduction="none")
        for rows in (case.holding.forget, (inputs, targets))
    )
    keys = ("retained", "forget_train", "forget_test")
    return {key: measured[key] for key in keys} | {"attack_auc": attack_auc(gone, unseen)}


# ---------------------------------------------------------------- the page
Cells = Mapping[str, list[dict[str, Any]]]
"""Data and request, in words -> what was found with every seed."""


def page(cells: Cells) -> str:
    """Return the tables."""
    training = ", ".join(f"{key} {value}" for key, value in TRAINING.items())
    parts = [
        "# Every method of one machine beside retraining",
        "`python -m benchmarks.clients --data-dir DIR` makes this page: `secateur local` forgets "
        f"class {FORGET_CLASS}, or {100 * SHARE:.0f} % of the training rows drawn at random. Per "
        "cent, mean and standard deviation over seeds, of the model at the end, so after the "
        "epochs of fine-tuning that belong to a method: accuracy on test rows of the "
        "classes that stay (retained), on the training rows that were to be "
        "forgotten (forgotten), right after the method and at the end, and on test rows of "
        "their class. The attack takes rows with a "
        "small loss for members: forgotten training rows against test rows, of the same class "
        "where a class is forgotten; 50 is a guess. What counts is the distance from retraining: "
        "a model need not fail on rows that it never saw. Speed is the seconds of retraining over "
        "those of forgetting and fine-tuning; what a method needs beforehand (logs, shards) is "
        "not in it.",
        f"Scale: {EXAMPLES:,} training images, {training}; an MLP with 32 hidden units, LeNet for "
        "methods that need convolutions, which are compared with retraining LeNet. Concentration "
        "keeps the rows to forget in that share of the batches: otherwise they are in nearly all, "
        "and amnesiac unlearning returns the initial model. Settings are the commands' defaults, "
        "the same for all data, but `pcmu` has `uncertified=true`: without, it is refused, as "
        "its model stays as it is and nothing shows that no step could have changed. One "
        "thread; other work on the machine slows both sides of a ratio. "
        "Projected gradient ascent and other methods that only make sense in a federation are not "
        "here.",
        f"![What is left, by method]({NAME}.svg)",
    ]
    head = ("method", "retained", "forgotten, right after", "forgotten", "its test rows", "attack",
            "s", "speed", "guarantee")  # fmt: skip
    for cell, runs in cells.items():
        names = [name for block in blocks() for name in block]
        close = ", ".join(f"`{name}` ({speed:.1f})" for name, speed in near(runs).items())
        parts += [
            f"## {cell}",
            f"{runs[0]['forgotten']:,} of {runs[0]['rows']:,} training rows are forgotten; "
            f"{len(runs)} seed{'s' if len(runs) > 1 else ''}.",
            seeds.table(head, [_row(name, runs) for name in names if _known(name, runs)]),
            f"Near retraining (speed), that is within {100 * NEAR:.0f} points of it on the "
            "forgotten rows, at most half as far as the model before, and at most "
            f"{100 * WORSE:.0f} below it on the others: {close or 'none'}.",
        ]
        for name in names:
            told_of = runs[0]["methods"][name]
            if "refused" in told_of:
                parts.append(f"`{name}` is refused: {told_of['refused']}.")
            elif told_of.get("guarantee", "none") not in ("none", "exact"):
                parts.append(f"`{name}`, first seed: {told_of['guarantee']}.")
    return "\n\n".join(parts) + "\n"


def blocks() -> tuple[list[str], list[str]]:
    """Return the names of rows, by network: the model before, retraining, then the methods."""
    others = [name for name in METHODS if name not in (BASELINE, *CHANNELS)]
    lenet = [f"{name}, LeNet" for name in (BEFORE, BASELINE)]
    return [BEFORE, BASELINE, *others], [*lenet, *CHANNELS]


def near(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Return the methods that come near retraining, and their speed.

    Near is, on the forgotten rows, within ``NEAR`` of it and at most half as far from it as the
    model before; and no more than ``WORSE`` below it on the others.
    """
    found = {}
    for before, base, *names in blocks():
        aim, kept = (_mean(base, key, runs) for key in ("forget_train", "retained"))
        limit = min(NEAR, abs(_mean(before, "forget_train", runs) - aim) / 2)
        for name in names:
            if name in SETTINGS or not _known(name, runs):
                continue
            apart = abs(_mean(name, "forget_train", runs) - aim)
            if apart <= limit and _mean(name, "retained", runs) >= kept - WORSE:
                found[name] = _mean(name, "speed", runs)
    return found


def _mean(name: str, key: str, runs: list[dict[str, Any]]) -> float:
    return mean([one[key] for one in _known(name, runs)])


def _known(name: str, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [run["methods"][name] for run in runs if "refused" not in run["methods"][name]]


def _row(name: str, runs: list[dict[str, Any]]) -> tuple[str, ...]:
    found = _known(name, runs)

    def of(key: str) -> str:
        return told([one.get(key) for one in found])

    # A model that stays as it is takes no time: that is no speed.
    timed = "seconds" in found[0] and name not in SETTINGS
    guarantee = found[0].get("guarantee", "-")
    shown = f"{name}, LeNet" if name in CHANNELS else name
    if len(found) < len(runs):
        shown += f" ({len(found)} of {len(runs)} seeds)"
    return (
        shown, of("retained"), of("right_after"), of("forget_train"), of("forget_test"),
        of("attack_auc"),
        f"{mean([one['seconds'] for one in found]):.2f}" if timed else "-",
        f"{mean([one['speed'] for one in found]):.1f}" if timed else "-",
        guarantee if guarantee in ("-", "none", "exact") else "bound, below",
    )  # fmt: skip


def drawn(numbers: Mapping[str, Any]) -> str:
    """Return the figure."""
    return figures.clients(numbers["runs"], blocks())


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
    """Run every method and write a page."""
    with one_line_errors():
        if redraw:
            return seeds.redraw(output, NAME, drawn)
        torch.set_num_threads(1)
        order = [(data, request) for data in DATA for request in KINDS]
        cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for seed in range(repetitions):
            for data, request in order:
                if only and data not in only:
                    continue
                path = work / f"{data}-{KINDS[request]}-{examples}-seed{seed}.json".lower()

                def make(
                    data: str = data, request: str = request, seed: int = seed
                ) -> dict[str, Any]:
                    return one(data, request, seed, data_dir, examples)

                load_task.cache_clear()  # data of earlier seeds
                started = time.perf_counter()
                cells.setdefault((data, request), []).append(seeds.finished(path, make))
                console.print(
                    f"{data}, {request}, seed {seed}: {time.perf_counter() - started:.0f} s",
                    highlight=False,
                )
                runs = {", ".join(cell): cells[cell] for cell in order if cell in cells}
                numbers = {"runs": runs}
                seeds.write(output, NAME, numbers, page(runs), drawn(numbers))


if __name__ == "__main__":
    typer.run(main)
