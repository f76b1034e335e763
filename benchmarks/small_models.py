"""Tasks with a network that built-in tasks lack: small, with convolutions and normalisation."""

import dataclasses
from collections.abc import Sequence

from torch import nn

from client.task import images
from client.task.classification import Classification
from client.task.models import Standardise
from client.task.protocol import TaskOptions

CHANNELS = (16, 32, 64)


def convnet(mean: float, deviation: float, channels: Sequence[int] = CHANNELS) -> nn.Module:
    """Return Conv-BN-ReLU three times, each halving the image of 28 x 28 pixels, and a head."""
    layers: list[nn.Module] = [Standardise([mean], [deviation])]
    for taken, made in zip((1, *channels), channels, strict=False):
        layers += [
            nn.Conv2d(taken, made, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(made),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * 16, 10))


def mnist(options: TaskOptions) -> Classification:
    """Return MNIST with that network."""
    return _with(images.mnist(options), 0.1307, 0.3081)


def fashion_mnist(options: TaskOptions) -> Classification:
    """Return Fashion-MNIST with that network."""
    return _with(images.fashion_mnist(options), 0.2860, 0.3530)


def _with(task: Classification, mean: float, deviation: float) -> Classification:
    return dataclasses.replace(task, make_model=lambda: convnet(mean, deviation))
