"""What is measured: workloads, and the file that gives every contender the same work."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset

from client.task import images, models
from client.task.classification import Classification
from client.task.evaluation import state_of
from client.task.protocol import Examples, Split, TaskOptions, load_task, server_data
from server.federation import initial_model
from server.settings import Settings
from unlearning.randomness import generator

BARE = ("bare", "bare-2")
SCALING = (*BARE[:1], "sequential", "batched")
EVERYONE = (*BARE, "sequential", "batched", "ray", "pfl")


@dataclass(frozen=True)
class Workload:
    """One federation to be run by several contenders.

    Attributes
    ----------
    summary
        What a reader of the results is told.
    values
        Fields of ``Settings``; everything is computed on the CPU.
    rounds, quick_rounds
        Rounds per run, normally and with ``--quick``.
    family
        Workloads of one family are one curve; ``at`` is the place on its axis.
    """

    summary: str
    clients: int
    values: Mapping[str, Any]
    rounds: int
    quick_rounds: int
    contenders: tuple[str, ...] = EVERYONE
    family: str = ""
    at: int = 0

    def settings(self, data_dir: str = "") -> Settings:
        """Return the federation's settings."""
        values = {"device": "cpu", "identity": "partition", "data_dir": data_dir, **self.values}
        return Settings.model_validate(values)


def _digits(clients: int) -> Workload:
    return Workload(
        f"scikit-learn's digits, {clients} clients, MLP 64-32-10 (2,410 parameters), 1 local epoch "
        "in batches of 15",
        clients,
        {"task": "digits", "model": "mlp", "batch_size": 15, "learning_rate": 0.1},
        rounds=80,
        quick_rounds=10,
    )


def _ffmu(clients: int, local: str) -> Workload:
    plain = _digits(clients)
    how = {
        "path": "1 local epoch of quantised steps in batches of 15",
        "full": "one gradient of all rows of a client, row by row",
    }
    return replace(
        plain,
        summary=f"FFMU on scikit-learn's digits, {clients} clients, MLP 64-32-10 (2,410 "
        f"parameters), {how[local]}",
        values={**plain.values, "strategy": "ffmu", "local_gradient": local},
        contenders=("sequential", "batched"),
    )


def _fashion(clients: int, rounds: int, quick_rounds: int) -> Workload:
    return Workload(
        f"Fashion-MNIST, {clients} clients, LeNet (61,706 parameters), 2 local epochs in batches "
        "of 50",
        clients,
        {
            "task": "fashion-mnist",
            "model": "lenet",
            "local_epochs": 2,
            "batch_size": 50,
            "learning_rate": 0.1,
        },
        rounds=rounds,
        quick_rounds=quick_rounds,
    )


def _synthetic(family: str, clients: int, model: str, at: int) -> Workload:
    return Workload(
        f"made-up data of the digits' size, {clients} clients of 10 examples, {model}, 1 step",
        clients,
        {
            "task": f"{__name__}:synthetic",
            "model": model,
            "examples": clients * EXAMPLES,
            "batch_size": EXAMPLES,
            "learning_rate": 0.1,
        },
        rounds=max(6, min(80, 6000 // clients)) if family == "clients" else 12,
        quick_rounds=4,
        contenders=SCALING,
        family=family,
        at=at,
    )


EXAMPLES = 10
"""Of a client of the synthetic task."""

WORKLOADS: dict[str, Workload] = {
    "digits-10": _digits(10),
    "digits-100": _digits(100),
    **{
        f"ffmu-{local}-{clients}": _ffmu(clients, local)
        for local in ("path", "full")
        for clients in (10, 100)
    },
    "fashion-100": _fashion(100, 6, 4),
    "fashion-1000": _fashion(1000, 6, 4),
    "cifar-10": Workload(
        "CIFAR-10, 10 clients that train on 64 images each, ResNet-18 (11.2 million parameters), "
        "1 local epoch in batches of 32; 500 images for the server's evaluation",
        10,
        {
            "task": f"{__name__}:cifar10",
            "model": "resnet18",
            "examples": 710,  # a client keeps 7 of its 71 for its own test
            "batch_size": 32,
            "learning_rate": 0.05,
        },
        rounds=5,
        quick_rounds=4,
    ),
    **{
        f"clients-{count}": _synthetic("clients", count, "mlp", count)
        for count in (10, 30, 100, 300, 1000, 3000, 10_000)
    },
    **{
        f"size-{model}": _synthetic("size", 100, model, parameters)
        for model, parameters in {
            "mlp-32": 2_410,
            "mlp-128": 9_610,
            "mlp-512": 38_410,
            "mlp-256-256": 85_002,
            "mlp-512-512": 301_066,
            "mlp-1024-1024": 1_126_410,
        }.items()
    },
}


# ---------------------------------------------------------------- tasks of the benchmarks' own
def cifar10(options: TaskOptions) -> Classification:
    """Return CIFAR-10 with few examples at the server: evaluation is not what is compared."""
    task = images.cifar10(options)
    few = TensorDataset(*(tensor[:250].clone() for tensor in task.test.tensors))
    validation = TensorDataset(*(tensor[:250].clone() for tensor in task.validation.tensors))
    return replace(task, validation=validation, test=few)


@dataclass(frozen=True)
class _Sliced(Classification):
    """A client's examples are a slice, which costs the same for 10 clients and for 10,000."""

    def client_data(self, partition: int, partitions: int) -> Split:
        mine = slice(partition * EXAMPLES, (partition + 1) * EXAMPLES)
        train = TensorDataset(self.inputs[mine], self.targets[mine])
        return Split(train, TensorDataset(self.inputs[:0], self.targets[:0]))


def synthetic(options: TaskOptions) -> Classification:
    """Return points in 64 dimensions, in the class whose random direction they follow most."""
    draw = generator(options.seed, "synthetic task")
    held_out = 500
    inputs = torch.rand(options.examples + held_out, 1, 8, 8, generator=draw)
    directions = torch.randn(64, 10, generator=draw)
    targets = ((inputs.flatten(1) - 0.5) @ directions).argmax(dim=1)
    train, rest = slice(0, options.examples), slice(options.examples, None)
    server = TensorDataset(inputs[rest], targets[rest])
    return _Sliced(
        options=options,
        inputs=inputs[train],
        targets=targets[train],
        validation=server,
        test=server,
        classes=10,
        make_model=lambda: models.build(
            options.model, (1, 8, 8), 10, mean=[0.5], deviation=[0.289]
        ),
    )


# ---------------------------------------------------------------- the exported file
def export(workload: Workload, path: Path, *, data_dir: str = "") -> None:
    """Write a workload's data, initial weights and settings to ``path``, an ``.npz`` file."""
    settings = workload.settings(data_dir)
    task = load_task(settings.task_options())
    server = server_data(task)
    model = initial_model(task, settings.seed)
    assert server.validation is not None  # noqa: S101  every workload's server has data
    assert server.test is not None  # noqa: S101
    clients = [
        _tensors(task.client_data(number, workload.clients).train)
        for number in range(workload.clients)
    ]
    first = next(module for module in model.modules() if isinstance(module, models.Standardise))
    meta = {
        "model": settings.model,
        "shape": list(clients[0][0].shape[1:]),
        "classes": 10,
        "mean": first.mean.tolist(),
        "deviation": first.deviation.tolist(),
        "seed": settings.seed,
        "clients": workload.clients,
        "local_epochs": settings.local_epochs,
        "batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "settings": settings.model_dump(),
    }
    arrays: dict[str, Any] = {
        "meta": np.array(json.dumps(meta)),
        "sizes": np.array([len(targets) for _, targets in clients]),
        "train_x": torch.cat([inputs for inputs, _ in clients]).numpy(),
        "train_y": torch.cat([targets for _, targets in clients]).numpy(),
        **{f"weights/{name}": tensor.numpy() for name, tensor in state_of(model).items()},
    }
    for name, examples in (("validation", server.validation), ("test", server.test)):
        arrays[f"{name}_x"], arrays[f"{name}_y"] = (t.numpy() for t in _tensors(examples))
    np.savez(path, **arrays)


def _tensors(examples: Examples) -> tuple[torch.Tensor, ...]:
    assert isinstance(examples, TensorDataset)  # noqa: S101  of every built-in task
    return examples.tensors
