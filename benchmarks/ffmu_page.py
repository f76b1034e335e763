"""What ``benchmarks.ffmu`` found, over its seeds, and the page that tells it."""

import math
import statistics
from typing import Any

TASKS = {"fashion-mnist": "Fashion-MNIST", "mnist": "MNIST"}
PRINTED = {"fashion-mnist": 84.55}
"""Test accuracy of FFMU in the paper, in per cent, at every ratio (Tables 1, 2, 5), by task."""

Row = dict[str, float]


def means(seeds: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return name -> ratio -> measure -> mean over the seeds."""
    first = seeds[0]["rows"]
    return {
        name: {
            ratio: {
                measure: statistics.fmean(seed["rows"][name][ratio][measure] for seed in seeds)
                for measure in row
            }
            for ratio, row in ratios.items()
        }
        for name, ratios in first.items()
    }


def verdicts(
    found: dict[str, dict[str, dict[str, float]]], printed: float | None
) -> list[dict[str, Any]]:
    """Return what is expected, what was found, and the verdict.

    All removal ratios as expected: reproduced; some: direction; none: not reproduced. ``printed``
    is the paper's accuracy, if it has one.
    """
    ratios = list(found["Retrain"])

    def apart(name: str, measure: str) -> list[float]:
        return [found[name][r][measure] - found["Retrain"][r][measure] for r in ratios]

    accuracy, plain = apart("FFMU", "accuracy"), apart("FFMU-N", "accuracy")
    same = {found["FFMU"][r]["accuracy"] for r in ratios}
    forgotten, retained = apart("FFMU", "error_f"), apart("FFMU", "error_r")
    claims: list[tuple[str, list[float], list[bool]]] = [
        ("test accuracy within 1.5 points of Retrain", accuracy, [abs(x) <= 1.5 for x in accuracy]),
        ("the same test accuracy for every ratio", sorted(same), [len(same) == 1]),
        ("error_f within 2 points of Retrain", forgotten, [abs(x) <= 2 for x in forgotten]),
        ("error_r within 2 points of Retrain", retained, [abs(x) <= 2 for x in retained]),
        (
            "FFMU-N farther from Retrain in test accuracy than FFMU",
            [abs(n) - abs(f) for n, f in zip(plain, accuracy, strict=True)],
            [abs(n) > abs(f) for n, f in zip(plain, accuracy, strict=True)],
        ),
    ]
    if printed is not None:
        away = [found["FFMU"][ratio]["accuracy"] - printed for ratio in ratios]
        text = "test accuracy within 4 points of print"
        claims.insert(1, (text, away, [abs(x) <= 4 for x in away]))
    return [
        {
            "expected": text,
            "found": values,
            "verdict": "reproduced" if all(held) else "direction" if any(held) else
            "not reproduced",
        }
        for text, values, held in claims
    ]  # fmt: skip


def speedups(seeds: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return ``speedup_vs_retrain``: plain training and retraining over training with FFMU.

    With one request, and the number of requests from which on FFMU has taken less time. It would
    only count for requests that are certified: all others have to be served all the same.
    """
    spent = {
        name: statistics.fmean(seed["seconds"][name] for seed in seeds)
        for name in seeds[0]["seconds"]
    }
    return {
        ratio: {
            "one_request": (spent["FedAvg"] + spent[f"Retrain {ratio}"]) / spent["FFMU"],
            "requests_to_break_even": max(
                0, math.ceil((spent["FFMU"] - spent["FedAvg"]) / spent[f"Retrain {ratio}"])
            ),
        }
        for ratio in seeds[0]["rows"]["Retrain"]
    }


INTRODUCTION = """\
# FFMU beside FFMU-N and retraining

{data}, an MLP with 64 hidden units, {clients} clients, {rounds} rounds of 2 local epochs
with batches of 50, {examples} training examples in all, the whole test set, means over {seeds}
seeds; `python -m benchmarks.ffmu --task {task}` makes this page. The paper has a CNN, 100
clients, 200 rounds and 60,000 examples: the scale here is smaller. FedAvg is trained on
everything, Retrain is FedAvg without the removed samples, with the same budget and learning rates.
In per cent, but for the AUC of an attack that takes samples with a small loss for members (removed
samples against test data; 0.5 is a guess, and Retrain's is what a model has that never saw them).

![Certified steps, and the error on what was removed]({figure})

| removed | method | test accuracy | error_f | error_r | attack AUC |
|---|---|---|---|---|---|
"""
EXPECTED = """
Reproduced: at every ratio; direction: at some; not reproduced: at none. Found are differences in
points, and the accuracy itself where it is to be the same.

| expected | found, by ratio | verdict |
|---|---|---|
"""
CHECKED = """
## What is certified

`Our exact one-round check` of a training of {checked_rounds} rounds with `local-gradient = full`
and `gradient-clip = 0.001`: the share of (coordinate, round) pairs whose step is shown to be the
same without the samples. Only 100 % certifies a deletion, and more rounds have more pairs. Of the
other trainings nothing is shown: their gradients are not those of one model.

"""
SPEED = """
{closeness} (FFMU, seed {seed}).

## Time

`speedup_vs_retrain`: CPU seconds of plain training and one retraining, over those of training with
FFMU; and the number of requests from which on FFMU has taken less. Both would count only for
requests that are certified: the others have to be served by a method that forgets.

| removed | one request | requests to break even |
|---|---|---|
"""


def page(told: dict[str, Any], figure: str) -> str:
    """Return the page in Markdown."""
    seeds = told["seeds"]
    task = told["settings"]["task"]
    text = INTRODUCTION.format(**told["scale"], data=TASKS[task], task=task, figure=figure)
    for ratio in told["means"]["Retrain"]:
        for name in ("Retrain", "FedAvg", "FFMU", "FFMU-N"):
            row = told["means"][name][ratio]
            text += (
                f"| {ratio} | {name} | {row['accuracy']:.2f} | {row['error_f']:.2f} | "
                f"{row['error_r']:.2f} | {row['attack_auc']:.3f} |\n"
            )
    text += EXPECTED
    for claim in told["verdicts"]:
        values = ", ".join(f"{value:.2f}" for value in claim["found"])
        text += f"| {claim['expected']} | {values} | {claim['verdict']} |\n"
    text += CHECKED.format(**told["scale"])
    text += "| removed | " + " | ".join(f"seed {seed['seed']}" for seed in seeds)
    text += " | certified |\n|---|" + "---|" * (len(seeds) + 1) + "\n"
    for asked in seeds[0]["checks"][told["certifiable"]]:
        if asked != "closeness":
            checks = [seed["checks"][told["certifiable"]][asked] for seed in seeds]
            shares = " | ".join(f"{math.floor(1000 * c['share']) / 10:g} %" for c in checks)
            done = sum(check["certified"] for check in checks)
            text += f"| {asked} | {shares} | {done} of {len(checks)} |\n"
    text += SPEED.format(closeness=seeds[0]["checks"]["FFMU"]["closeness"], seed=seeds[0]["seed"])
    for ratio, row in told["speedup_vs_retrain"].items():
        text += f"| {ratio} | {row['one_request']:.2f} | {row['requests_to_break_even']} |\n"
    return text
