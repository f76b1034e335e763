"""MNIST, Fashion-MNIST and CIFAR-10 through torchvision."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset
from torchvision import datasets

from client.task import models
from client.task.classification import Classification, held_out
from client.task.protocol import TaskError, TaskOptions

VALIDATION_SHARE = 0.05


def mnist(options: TaskOptions) -> Classification:
    """Return MNIST; models ``lenet`` (default), ``mlp``, ``cnn``, ``resnet18``."""
    return _task(options, datasets.MNIST, "lenet", mean=[0.1307], deviation=[0.3081])


def fashion_mnist(options: TaskOptions) -> Classification:
    """Return Fashion-MNIST; models as for MNIST."""
    return _task(options, datasets.FashionMNIST, "lenet", mean=[0.2860], deviation=[0.3530])


def cifar10(options: TaskOptions) -> Classification:
    """Return CIFAR-10; models ``lenet`` (default), ``cnn``, ``resnet18``, ``mlp``."""
    return _task(
        options,
        datasets.CIFAR10,
        "lenet",
        mean=[0.4914, 0.4822, 0.4465],
        deviation=[0.2470, 0.2435, 0.2616],
    )


def _task(
    options: TaskOptions,
    kind: type[datasets.VisionDataset],
    model: str,
    *,
    mean: Sequence[float],
    deviation: Sequence[float],
) -> Classification:
    inputs, targets = _load(kind, options.data_dir, train=True)
    test = _load(kind, options.data_dir, train=False)
    kept, chosen = held_out(inputs, targets, share=VALIDATION_SHARE, purpose="validation")
    return Classification(
        options=options,
        inputs=inputs[kept],
        targets=targets[kept],
        validation=TensorDataset(inputs[chosen], targets[chosen]),
        test=TensorDataset(*test),
        classes=10,
        make_model=partial(
            models.build, options.model or model, inputs.shape[1:], 10, mean=mean,
            deviation=deviation,
        ),
    )  # fmt: skip


def _load(
    kind: type[datasets.VisionDataset], data_dir: str, *, train: bool
) -> tuple[Tensor, Tensor]:
    """Return images as float32 in [0, 1], shape (n, channels, height, width), and labels."""
    folder = Path(data_dir) if data_dir else _cache()
    try:
        raw = kind(folder, train=train, download=not data_dir)
    except Exception as error:  # torchvision raises whatever its downloader met
        where = f"in {folder}" if data_dir else "here, and it cannot be downloaded"
        raise TaskError(
            f"{kind.__name__} is not {where}: give its folder with --data-dir, as torchvision lays "
            "it out, or connect to the internet and let torchvision download it"
        ) from error
    images = torch.as_tensor(raw.data)
    images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2)
    return images.contiguous().float() / 255, torch.as_tensor(raw.targets).long()


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "secateur"
