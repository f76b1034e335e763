"""FisherMask's statistics beside a training epoch on the same rows, for every model built in.

Both are timed in turn, several times, and the quickest of each counts: whatever else the machine
does then slows both or neither. Random pixels take as long as images.
"""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.data import TensorDataset

from benchmarks import seeds
from benchmarks.small_models import convnet
from client.central.run import initial_model
from client.central.settings import Training
from client.central.training import fit, training_rate
from client.forgetting.holding import holding_of
from client.forgetting.interface import Holding
from client.forgetting.statistics import fisher_of
from client.task import models
from client.task.classification import Classification
from client.task.protocol import Split, TaskOptions
from unlearning.parameters import Parameters, trained_names
from unlearning.randomness import generator

REPETITIONS = 5
LIMIT = 3.0
"""Statistics may take as long as so many epochs (``methods`` 5)."""
TABLE, DIGITS, GREY, COLOUR = (30,), (1, 8, 8), (1, 28, 28), (3, 32, 32)
CONVNET = "28 x 28 grey, ConvNet"
MODELS: dict[str, tuple[tuple[int, ...], str, int]] = {
    "breast cancer, MLP": (TABLE, "mlp", 1000),
    "digits, MLP": (DIGITS, "mlp", 1000),
    "digits, CNN": (DIGITS, "cnn", 1000),
    "28 x 28 grey, MLP": (GREY, "mlp", 1000),
    "28 x 28 grey, LeNet": (GREY, "lenet", 1000),
    "28 x 28 grey, CNN": (GREY, "cnn", 500),
    CONVNET: (GREY, "", 500),
    "28 x 28 grey, ResNet-18": (GREY, "resnet18", 64),
    "32 x 32 colour, MLP": (COLOUR, "mlp", 1000),
    "32 x 32 colour, LeNet": (COLOUR, "lenet", 500),
    "32 x 32 colour, CNN": (COLOUR, "cnn", 256),
    "32 x 32 colour, ResNet-18": (COLOUR, "resnet18", 64),
}
"""Data and model -> shape of a row, model, and number of rows; all that is built in, and the
network of these benchmarks."""


def measured(training: Training, names: Sequence[str] = tuple(MODELS)) -> dict[str, Any]:
    """Return the seconds of each model; epochs are those of this training."""
    return {name: _of(name, training) for name in names}


def _of(name: str, training: Training) -> dict[str, Any]:
    shape, model, count = MODELS[name]
    draw = generator(training.seed, "squares")
    inputs = torch.rand(count, *shape, generator=draw)
    targets = torch.randint(10, (count,), generator=draw)
    rows, ones = TensorDataset(inputs, targets), [1.0] * shape[0]
    task = Classification(
        TaskOptions(task=name), inputs, targets, rows, rows, classes=10,
        make_model=partial(models.build, model, shape, 10, mean=ones, deviation=ones)
        if model
        else partial(convnet, 1.0, 1.0),
    )  # fmt: skip
    holding = holding_of(
        task, Split(rows, rows), torch.zeros(0, dtype=torch.long), training=training,
        purpose=(0, 0), device=torch.device("cpu"),
    )  # fmt: skip
    start = initial_model(task, training.seed)
    size = sum(start[name].numel() for name in trained_names(start))
    return {"parameters": size, **beside(start, holding, training)}


def beside(model: Parameters, holding: Holding, training: Training) -> dict[str, Any]:
    """Return the quickest seconds of statistics over all rows, and of an epoch on them."""
    rows = holding.remain
    statistics, epochs = [], []
    for _ in range(1 + REPETITIONS):
        started = time.perf_counter()
        fisher_of(model, holding, rows)
        middle = time.perf_counter()
        fit(
            holding.task, model, rows, training, epochs=1, rate=training_rate(training),
            purpose=(2, 0), device=holding.device,
        )  # fmt: skip
        statistics.append(middle - started)
        epochs.append(time.perf_counter() - middle)
    # The first of each warms up.
    return {
        "rows": len(rows[0]),
        "statistics_seconds": min(statistics[1:]),
        "epoch_seconds": min(epochs[1:]),
    }


def ratio(timed: dict[str, Any]) -> float:
    """Return the statistics' time in epochs."""
    return float(timed["statistics_seconds"] / timed["epoch_seconds"])


def table(timed: Mapping[str, Any]) -> str:
    """Return a table of what ``measured`` found."""
    lines = [
        (
            name, f"{found['parameters']:,}", f"{found['rows']:,}",
            f"{found['statistics_seconds']:.3g}", f"{found['epoch_seconds']:.3g}",
            f"{ratio(found):.1f}", "yes" if ratio(found) <= LIMIT else "no",
        )
        for name, found in timed.items()
    ]  # fmt: skip
    head = ("model", "parameters", "rows", "statistics, s", "epoch, s", "epochs", "holds")
    return seeds.table(head, lines)
