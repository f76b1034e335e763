"""A federation in plain PyTorch, from an exported file: the loop that all others are compared to.

Run as ``python -m benchmarks.plain FILE ROUNDS STARTED``. Of Secateur it imports nothing, so that
other environments can read exported files, and build the same models, with this module.
"""

import json
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

EVALUATION_BATCH = 1024

Parameters = Mapping[str, Tensor]
Examples = tuple[Tensor, Tensor]
"""Inputs and class labels."""


# ---------------------------------------------------------------- the exported work
@dataclass(frozen=True)
class Work:
    """What every contender does: the content of an exported file."""

    meta: dict[str, Any]
    """Model, hyper-parameters, and the ``Settings`` that they come from."""
    clients: list[Examples]
    """Every client's training examples."""
    validation: Examples
    test: Examples
    weights: Parameters
    """Of round 0."""


def read(path: str | Path) -> Work:
    """Read an exported file; nothing in it is executed."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != "meta"}
        meta = json.loads(str(file["meta"]))
    sizes = arrays["sizes"].tolist()
    inputs = arrays["train_x"].split_with_sizes(sizes)
    targets = arrays["train_y"].split_with_sizes(sizes)
    return Work(
        meta,
        list(zip(inputs, targets, strict=True)),
        (arrays["validation_x"], arrays["validation_y"]),
        (arrays["test_x"], arrays["test_y"]),
        {
            name.removeprefix("weights/"): tensor
            for name, tensor in arrays.items()
            if name.startswith("weights/")
        },
    )


def read_meta(path: str | Path) -> dict[str, Any]:
    """Read what an exported file says about itself, without the data."""
    with np.load(path, allow_pickle=False) as file:
        found: dict[str, Any] = json.loads(str(file["meta"]))
    return found


# ---------------------------------------------------------------- the same models again
class Standardise(nn.Module):
    """Subtract a mean and divide by a deviation."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Any, deviation: Any) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return inputs with mean 0 and deviation 1."""
        return (inputs - self.mean) / self.deviation


def build_model(work: Work) -> nn.Module:
    """Return the model that ``work`` is about, with its first weights."""
    meta = work.meta
    kind, *widths = meta["model"].split("-")
    shape, classes = meta["shape"], meta["classes"]
    networks = {"mlp": _mlp, "lenet": _lenet, "resnet18": _resnet18}
    network = networks[kind](shape, classes, [int(width) for width in widths])
    model = nn.Sequential(Standardise(meta["mean"], meta["deviation"]), network)
    model.load_state_dict(dict(work.weights))
    return model


def _mlp(shape: Sequence[int], classes: int, hidden: Sequence[int]) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    widths = [prod(shape), *(hidden or (32,))]
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


def _lenet(shape: Sequence[int], classes: int, _: Sequence[int]) -> nn.Module:
    channels, height, width = shape
    flattened = 16 * ((height // 2 - 4) // 2) * ((width // 2 - 4) // 2)
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(flattened, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, classes),
    )  # fmt: skip


def _resnet18(shape: Sequence[int], classes: int, _: Sequence[int]) -> nn.Module:
    from torchvision.models import resnet18  # noqa: PLC0415  slow to import, and rarely needed

    network = resnet18(num_classes=classes)
    network.conv1 = nn.Conv2d(shape[0], 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network  # type: ignore[no-any-return]


# ---------------------------------------------------------------- federated averaging
def train_client(
    model: nn.Module, examples: Examples, meta: Mapping[str, Any], order: torch.Generator
) -> None:
    """Train ``model`` in place on one client's examples."""
    inputs, targets = examples
    optimizer = torch.optim.SGD(model.parameters(), lr=meta["learning_rate"])
    model.train()
    for _ in range(meta["local_epochs"]):
        rows = torch.randperm(len(targets), generator=order)
        for batch in torch.split(rows, meta["batch_size"]):
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs[batch]), targets[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def federated_round(
    model: nn.Module, weights: Parameters, work: Work, orders: Sequence[torch.Generator]
) -> Parameters:
    """Return the mean of all clients' models, weighted by their numbers of examples."""
    total = sum(len(targets) for _, targets in work.clients)
    mean: dict[str, Tensor] = {}
    for examples, order in zip(work.clients, orders, strict=True):
        model.load_state_dict(weights)
        train_client(model, examples, work.meta, order)
        share = len(examples[1]) / total
        # A running sum: keeping every client's model until the end would be slower and larger.
        for name, tensor in model.state_dict().items():
            if name in mean:
                mean[name].add_(tensor, alpha=share)
            else:
                mean[name] = tensor.float() * share
    return {name: tensor.to(weights[name].dtype) for name, tensor in mean.items()}


@torch.inference_mode()
def accuracy(model: nn.Module, examples: Examples) -> float:
    """Return the share of examples that ``model`` classifies correctly."""
    model.eval()
    inputs, targets = examples
    hits = 0
    for rows in torch.split(torch.arange(len(targets)), EVALUATION_BATCH):
        hits += int((model(inputs[rows]).argmax(dim=1) == targets[rows]).sum())
    return hits / max(1, len(targets))


# ---------------------------------------------------------------- measuring
def report(
    started: float,
    ends: Sequence[float],
    test_accuracy: float,
    *packages: str,
    peak: float | None = None,
) -> None:
    """Print one JSON document: what a contender's process has to say at its end.

    Parameters
    ----------
    started
        When the process was started, on the clock of ``time.monotonic``.
    ends
        When each round ended, from round 0, the evaluation of the initial model.
    packages
        Whose versions are reported besides those that every contender uses.
    peak
        ``peak_mb`` of an earlier moment, for who has processes that have ended since.
    """
    found = {
        "rounds": [end - begin for begin, end in pairwise(ends)],
        "first_round": ends[1] - started,
        "accuracy": test_accuracy,
        "peak_mb": peak or peak_mb(),
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "numpy", *packages)},
        },
    }
    sys.stdout.write(json.dumps(found) + "\n")


def peak_mb() -> float:
    """Return the most memory that this process and its descendants held, in MB.

    Each process counts with its own peak, so the sum is an upper bound where there are several.
    """
    status = {}
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError:
            continue  # the process has ended
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        status[int(fields["Pid"])] = int(fields["PPid"]), fields.get("VmHWM", "0 kB")
    if not status:
        import resource  # noqa: PLC0415  only where there is no /proc

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on macOS
    family = {int(Path("/proc/self").resolve().name)}
    while more := {pid for pid, (parent, _) in status.items() if parent in family} - family:
        family |= more
    return sum(int(status[pid][1].split()[0]) for pid in family) * 1024 / 1e6


def main(path: str, rounds: str, started: str) -> None:
    """Run the plain loop and report."""
    work = read(path)
    model, weights = build_model(work), work.weights
    orders = [torch.Generator().manual_seed(work.meta["seed"])] * len(work.clients)
    test_accuracy, ends = 0.0, []
    for number in range(int(rounds) + 1):
        if number:
            weights = federated_round(model, weights, work, orders)
            model.load_state_dict(weights)
        accuracy(model, work.validation)
        test_accuracy = accuracy(model, work.test)
        ends.append(time.monotonic())
    report(float(started), ends, test_accuracy)


if __name__ == "__main__":
    main(*sys.argv[1:])
