"""Label flipping: train on what is to be forgotten, with wrong labels.

Paper 002, naive and with partial updates (``methods`` 6.3). Each forgotten sample gets a label
drawn uniformly from the C - 1 others, and a few epochs on these samples follow. With partial
updates a step moves only some entries, many in early layers and few in late ones.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from unlearning.distillation import Forward, Loss
from unlearning.errors import MissingNeedError, ParametersError
from unlearning.parameters import Parameters
from unlearning.partial_updates import Pattern, Stop, train_partially

LEARNING_RATE, BATCH_SIZE, EPOCHS = 0.01, 128, 5
"""Not printed in the paper; ``methods`` 6.3."""


def check_classes(labels: Tensor, classes: int) -> None:
    """Raise unless labels are a vector of integers in [0, C), C being at least 2.

    Raises
    ------
    MissingNeedError
        If the labels are no classes, such as the numbers of a regression.
    ParametersError
        If there are fewer than 2 classes, or a label is none of them.
    """
    whole = labels.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    if labels.dim() != 1 or not whole:
        raise MissingNeedError(
            f"a class method needs one integer label a sample, got {labels.dtype} of shape "
            f"{tuple(labels.shape)}"
        )
    if classes < 2:
        raise ParametersError(f"a class method needs at least 2 classes, got {classes}")
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < classes):
        raise ParametersError(
            f"labels must lie in 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())}"
        )


def flipped(labels: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    """Return a wrong label for every sample, uniform over the other classes.

    Parameters
    ----------
    labels
        Shape (n,), integers in [0, C).
    classes
        Number C of classes, at least 2.

    Raises
    ------
    MissingNeedError, ParametersError
        As ``check_classes``.
    """
    check_classes(labels, classes)
    away = torch.randint(1, classes, labels.shape, generator=generator)
    return ((labels.long() + away) % classes).to(labels.dtype)


def train_on_flipped(
    model: Parameters,
    forward: Forward,
    loss: Loss,
    inputs: Tensor,
    labels: Tensor,
    classes: int,
    *,
    generator: torch.Generator,
    shares: Mapping[str, float] | None = None,
    pattern: Pattern = "comb",
    seed: int = 0,
    epochs: int = EPOCHS,
    learning_rate: float = LEARNING_RATE,
    batch_size: int = BATCH_SIZE,
    stop: Stop | None = None,
) -> dict[str, Tensor]:
    """Return the model after training on forgotten samples with flipped labels.

    Parameters
    ----------
    inputs, labels
        The samples to forget, n rows; without any, nothing changes.
    classes
        Number C of classes.
    generator
        Draws the labels, then the orders of the epochs.
    shares
        ``shares_by_depth(model)`` for partial updates; ``None`` for the naive method.
    pattern, seed, stop
        See ``train_partially``.

    Raises
    ------
    MissingNeedError, ParametersError
        As ``check_classes`` and ``train_partially``.
    """
    wrong = flipped(labels, classes, generator)
    return train_partially(
        model,
        forward,
        loss,
        inputs,
        wrong,
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        generator=generator,
        shares=shares,
        pattern=pattern,
        seed=seed,
        stop=stop,
    )
