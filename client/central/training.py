"""Training on one machine, with a rate for every step and somebody who may look at each."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from client.central.settings import Training, Tuning
from client.forgetting.interface import Rows
from client.scratch import scratch_for
from client.task.protocol import Task
from client.train import Penalty, optimizer_for, order_seed, precision, seed_dropout
from unlearning.amnesiac import concentrated_batches
from unlearning.errors import MissingNeedError, ParametersError
from unlearning.masking import replayed_rate
from unlearning.parameters import Parameters, check_finite
from unlearning.randomness import derive_seed

Rate = Callable[[float], float]
"""Epochs since the beginning, with fractions -> learning rate."""
Each = Callable[[int, Parameters], None]
"""Told of every epoch, from 1, and the model after it."""


class Watch(Protocol):
    """Looks at steps."""

    def wants(self, rows: Tensor) -> bool:
        """Return whether to be told of a step on these rows."""

    def saw(
        self, epoch: int, batch: int, rows: Tensor, before: Parameters, now: Parameters
    ) -> None:
        """Be told of a step; both models are the caller's to keep."""


def training_rate(settings: Training) -> Rate:
    """Return the rates of the training itself."""
    return _replayed(settings, settings.learning_rate, settings.local_epochs)


def tuning_rate(settings: Training, tuning: Tuning, epochs: int) -> Rate:
    """Return the rates of so many epochs of fine-tuning."""
    first = tuning.learning_rate or settings.learning_rate
    if tuning.schedule == "constant":
        return lambda _: first
    return _replayed(settings, first, max(1, epochs))


def _replayed(settings: Training, first: float, budget: int) -> Rate:
    return lambda epoch: replayed_rate(
        epoch,
        first,
        settings.milestones,
        settings.learning_rate_factor,
        settings.local_epochs,
        budget,
    )


def fit(
    task: Task,
    start: Parameters,
    rows: Rows,
    settings: Training,
    *,
    epochs: int,
    rate: Rate,
    purpose: tuple[int, int],
    device: torch.device,
    concentrated: Sequence[int] = (),
    watch: Watch | None = None,
    each: Each | None = None,
    penalty: Penalty | None = None,
) -> dict[str, Tensor]:
    """Return the model after some epochs of ordinary training.

    With a constant rate it is, bit for bit, one round of a client (``client.train.train``).

    Parameters
    ----------
    rows
        Inputs and targets, at least one.
    purpose
        With the seed it fixes the order of the rows and every dropout mask.
    concentrated
        Numbers of rows that lie in the share ``settings.concentration`` of an epoch's batches.
    watch, each
        Who looks at steps, and at epochs.
    penalty
        Added to the loss of a batch.

    Raises
    ------
    MissingNeedError
        If there are no rows.
    ParametersError
        If training diverges, or the concentrated rows do not fit.
    """
    inputs, targets = rows
    if not len(inputs):
        raise MissingNeedError("training needs at least one row, and there are none left")
    scratch = scratch_for(task, device)
    scratch.load(start)
    model = scratch.model
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer_for(trainable, settings, 0)
    with torch.random.fork_rng(devices=[]):
        seed_dropout(device, derive_seed(settings.seed, "dropout", *purpose))
        for epoch in range(epochs):
            batches = list(_batches(len(inputs), settings, purpose, epoch, concentrated))
            for number, chosen in enumerate(batches):
                if not model.training:
                    model.train()
                for group in optimizer.param_groups:
                    group["lr"] = rate(epoch + number / len(batches))
                watched = watch is not None and watch.wants(chosen)
                before = scratch.state() if watched else {}
                with precision(settings, device):
                    here = inputs.index_select(0, chosen), targets.index_select(0, chosen)
                    loss = task.loss(model(here[0].to(device)), here[1].to(device))
                if penalty is not None:
                    loss = loss + penalty(model, *here)
                gradients = torch.autograd.grad(loss, trainable, allow_unused=True)
                for parameter, gradient in zip(trainable, gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
                if watch is not None and watched:
                    watch.saw(epoch, number, chosen, before, scratch.state())
            if each is not None:
                now = scratch.state()
                each(epoch + 1, now)
                scratch.load(now)  # whoever looked may have used the same module
    found = scratch.state()
    try:
        check_finite(found)
    except ParametersError as error:
        raise ParametersError(f"training diverged: {error}; lower the learning rate") from error
    return found


def _batches(
    size: int,
    settings: Training,
    purpose: tuple[int, int],
    epoch: int,
    concentrated: Sequence[int],
) -> Iterator[Tensor]:
    order = torch.Generator().manual_seed(order_seed(settings, purpose, epoch))
    if concentrated and settings.concentration:
        share = settings.concentration
        yield from concentrated_batches(size, concentrated, settings.batch_size, share, order)
    else:
        yield from torch.split(torch.randperm(size, generator=order), settings.batch_size)
