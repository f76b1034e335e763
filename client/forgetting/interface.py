"""What a step is given, and what it returns."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from client.task.protocol import Task
from strategies.messages import LocalTraining
from unlearning.distillation import Forward, Loss
from unlearning.gradients import Learn
from unlearning.parameters import Parameters

Rows = tuple[Tensor, Tensor]
"""Inputs and targets, n rows each."""


@dataclass(frozen=True, eq=False)
class Holding:
    """What one data holder computes with.

    Attributes
    ----------
    task
        Builds the model and defines the loss.
    forward, loss
        The model as a function, in evaluation mode with frozen buffers; and the loss of a batch.
    learn
        The same in training mode, which gives the buffers after a batch, too.
    forget, remain
        Rows to forget, and the others that may be trained on; either may be empty.
    test
        Rows of the holder's own that nobody trains on.
    training
        How the holder trains; the seed is there.
    purpose
        Round and client: with the seed they fix everything that is drawn.
    device
        Where to compute.
    trained
        Names of the tensors that training moves; ``None`` to judge by their names.
    """

    task: Task
    forward: Forward
    learn: Learn
    loss: Loss
    forget: Rows
    remain: Rows
    test: Rows
    training: LocalTraining
    purpose: tuple[int, int]
    device: torch.device
    trained: frozenset[str] | None = None


@dataclass(frozen=True)
class Outcome:
    """What a step made.

    Attributes
    ----------
    arrays
        The model, or the statistics of a query, on the CPU.
    metrics
        Numbers to report: how long, how far, how much.
    """

    arrays: Parameters = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
