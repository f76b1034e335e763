"""Gradient ascent: raise the loss on what is to be forgotten.

Inside a ball, UN or PGA (``methods`` 2.12), for a client that leaves:

    A. Halimi, S. Kadhe, A. Rawat, N. Baracaldo. "Federated Unlearning: How to Erase a Client in
    FL?" arXiv:2207.05521, 2022.

    w_ref = (w - p_k w_k) / (1 - p_k)         the others' average
    w <- project(w + eta grad F_k(w))         onto the ball of a radius around w_ref

The public code compares squared distances with its thresholds, where the text says L2. Distances
here are L2, the radius being the root of a third of the mean squared distance to random models.

The client could return anything, so the server projects its answer again (``projected_again``).

Without a ball, but with few entries a step, for a class or samples (paper 002, ``methods`` 6.4):
``ascend_partially``.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from unlearning.distillation import Forward, Loss
from unlearning.errors import MissingNeedError, ParametersError
from unlearning.gradients import batches, check_rows, clipped, gradient
from unlearning.label_flip import check_classes
from unlearning.parameters import Parameters, check_alike, check_finite, trained_names
from unlearning.partial_updates import Pattern, Stop, stepped, train_partially

LEARNING_RATE, MOMENTUM, LONGEST, EPOCHS = 0.01, 0.9, 5.0, 5
"""Of ascent inside a ball: step, momentum, bound on a gradient's norm, passes (2.12)."""
DRAWN = 10
"""Freshly initialised models that the ball's radius is measured by (2.12)."""
FARTHEST = 1.5
"""Distance from the leaving client's model at which to stop; about the root of the source's 2.2."""
FORGOTTEN = 0.01
"""Accuracy on forgotten samples that counts as forgotten (``methods`` 6.3, 6.4)."""
PARTIAL_RATE = 1e-3


# ---------------------------------------------------------------- the ball


def distance(model: Parameters, other: Parameters) -> float:
    """Return the Euclidean distance over the trained tensors, computed in float64."""
    squares = [
        float((model[name].double() - other[name].double()).square().sum())
        for name in trained_names(model)
    ]
    return math.sqrt(sum(squares))


def others_average(model: Parameters, leaver: Parameters, share: float) -> dict[str, Tensor]:
    """Return ``w_ref = (w - p_k w_k) / (1 - p_k)``, the average of all but one client.

    Parameters
    ----------
    model
        The last round's average w. Buffers are its own: were it not exactly that average, the
        formula could make a variance negative.
    leaver
        What the leaving client sent in that round.
    share
        Its weight p_k in the average, in [0, 1).

    Raises
    ------
    ParametersError
        If models differ or hold NaN or Inf, or the share is out of range.
    """
    if not 0 <= share < 1:
        raise ParametersError(f"the leaving client's share must lie in [0, 1), got {share}")
    check_alike(model, leaver)
    check_finite(leaver)
    result = {name: tensor.clone() for name, tensor in model.items()}
    for name in trained_names(model):
        result[name] = (model[name] - share * leaver[name]) / (1 - share)
    check_finite(result)
    return result


def random_radius(reference: Parameters, drawn: Iterable[Parameters]) -> float:
    """Return the ball's radius, ``sqrt(1/3 mean ||w_ref - w_rand||^2)`` (2.12).

    Parameters
    ----------
    drawn
        Freshly initialised models, ``DRAWN`` in the source; at least one. Looked at one by one.
    """
    squares = [distance(reference, other) ** 2 for other in drawn]
    if not squares:
        raise MissingNeedError(
            "the radius of the ball is measured by freshly initialised models, and there are none; "
            "give some, or a radius"
        )
    return math.sqrt(sum(squares) / len(squares) / 3)


def start_radius(reference: Parameters, start: Parameters) -> float:
    """Return ``||w_ref - w_0|| / 2``, a radius that needs the initial model only (2.12)."""
    return distance(reference, start) / 2


def projected(model: Parameters, centre: Parameters, radius: float) -> dict[str, Tensor]:
    """Return the nearest model in the ball around ``centre``; inside of it a copy.

    Parameters
    ----------
    radius
        In the norm over trained tensors, at least 0; 0 returns the centre's trained tensors.
        Buffers are the model's.

    Raises
    ------
    ParametersError
        If models differ, one holds NaN or Inf, or the radius is out of range.
    """
    if not (math.isfinite(radius) and radius >= 0):
        raise ParametersError(f"a radius must be a number of at least 0, got {radius}")
    check_alike(model, centre)
    check_finite(model)
    check_finite(centre)
    result = {name: tensor.clone() for name, tensor in model.items()}
    away = distance(model, centre)
    if away <= radius:
        return result
    for name in trained_names(model):
        middle = centre[name].double()
        moved = middle + (radius / away) * (model[name].double() - middle)
        result[name] = moved.to(model[name].dtype)
    return result


def projected_again(answer: Parameters, reference: Parameters, radius: float) -> dict[str, Tensor]:
    """Return what the server may use of a leaving client's answer.

    As ``projected``, with the buffers of w_ref: nothing bounds those that a client sends.
    """
    result = projected(answer, reference, radius)
    trained = set(trained_names(reference))
    return {
        name: result[name] if name in trained else tensor.clone()
        for name, tensor in reference.items()
    }


@dataclass(frozen=True)
class Ascent:
    """How an ascent inside a ball went.

    Attributes
    ----------
    model
        Where it ended, in the ball.
    distances
        Distance from w_ref after every step.
    stopped
        Whether a stop rule ended it, rather than the number of epochs.
    """

    model: dict[str, Tensor]
    distances: tuple[float, ...]
    stopped: bool


def ascend_in_ball(
    reference: Parameters,
    leaver: Parameters,
    forward: Forward,
    loss: Loss,
    inputs: Tensor,
    targets: Tensor,
    *,
    radius: float,
    batch_size: int,
    generator: torch.Generator,
    epochs: int = EPOCHS,
    learning_rate: float = LEARNING_RATE,
    momentum: float = MOMENTUM,
    longest: float = LONGEST,
    farthest: float = FARTHEST,
    stop: Stop | None = None,
) -> Ascent:
    """Climb the leaving client's loss from w_ref without leaving the ball (2.12).

    Parameters
    ----------
    reference
        Average w_ref of the others: start and centre.
    leaver
        The client's own last model w_k; far enough from it, enough is forgotten.
    inputs, targets
        The client's data, or the part of it to forget; without rows w_ref is returned.
    radius
        Of the ball, at least 0.
    batch_size, epochs, learning_rate, momentum, longest
        Of the stochastic ascent; gradients longer than ``longest`` are scaled down to it.
    generator
        Draws the orders.
    farthest
        Ends at the first step after which ``||w - w_k||`` exceeds it; may be infinite.
    stop
        Asked after every epoch, such as whether validation accuracy fell under a floor.

    Raises
    ------
    ParametersError
        If models or rows differ, a number is out of range or something is not finite.
    """
    if not (math.isfinite(learning_rate) and learning_rate >= 0 and 0 <= momentum < 1):
        raise ParametersError(
            f"the learning rate must be at least 0 and the momentum in [0, 1), got "
            f"{learning_rate} and {momentum}"
        )
    check_alike(reference, leaver)
    check_rows(inputs, targets)
    current = projected(reference, reference, radius)
    speed = {name: torch.zeros_like(current[name]) for name in trained_names(current)}
    distances: list[float] = []
    for _ in range(epochs if len(inputs) else 0):
        for rows, wanted in batches(inputs, targets, batch_size, generator):
            slope = clipped(gradient(current, forward, loss, rows, wanted), longest)
            speed = {name: momentum * speed[name] + slope[name] for name in speed}
            current = projected(stepped(current, speed, -learning_rate), reference, radius)
            distances.append(distance(current, reference))
            if distance(current, leaver) > farthest:
                return Ascent(current, tuple(distances), stopped=True)
        if stop is not None and stop(current):
            return Ascent(current, tuple(distances), stopped=True)
    return Ascent(current, tuple(distances), stopped=False)


# ---------------------------------------------------------------- when to stop


def accuracy_at_most(
    forward: Forward, inputs: Tensor, labels: Tensor, classes: int, most: float = FORGOTTEN
) -> Stop:
    """Return a stop rule: at most the share ``most`` of these samples is still recognised.

    For forgotten samples. As a floor for ascent, give validation samples and a ``most`` of, say,
    0.12 where guessing has 0.1.

    Parameters
    ----------
    inputs, labels
        n rows each, at least one; labels in [0, C).
    most
        In [0, 1].
    """
    check_classes(labels, classes)
    check_rows(inputs, labels)
    if not len(inputs):
        raise MissingNeedError("an accuracy needs at least one sample")

    def reached(model: Parameters) -> bool:
        with torch.no_grad():
            right = forward(model, inputs).argmax(dim=1) == labels
        return int(right.sum()) <= most * len(labels) + 1e-9

    return reached


def loss_over(forward: Forward, loss: Loss, inputs: Tensor, targets: Tensor, limit: float) -> Stop:
    """Return a stop rule: the mean loss is over a limit, or no number any more."""
    check_rows(inputs, targets)
    if not len(inputs):
        raise MissingNeedError("a loss needs at least one sample")

    def reached(model: Parameters) -> bool:
        with torch.no_grad():
            return not float(loss(forward(model, inputs), targets).mean()) <= limit

    return reached


def either(*rules: Stop) -> Stop:
    """Return a stop rule that says yes as soon as one of ``rules`` does."""
    return lambda model: any(rule(model) for rule in rules)


def most_uncertain_loss(classes: int) -> float:
    """Return ``2 log C``, the limit of ``loss_over`` for ascent with C classes (6.4)."""
    if classes < 2:
        raise ParametersError(f"a class method needs at least 2 classes, got {classes}")
    return 2 * math.log(classes)


# ---------------------------------------------------------------- without a ball


def ascend_partially(
    model: Parameters,
    forward: Forward,
    loss: Loss,
    inputs: Tensor,
    targets: Tensor,
    *,
    generator: torch.Generator,
    shares: Mapping[str, float] | None = None,
    pattern: Pattern = "comb",
    seed: int = 0,
    epochs: int = EPOCHS,
    learning_rate: float = PARTIAL_RATE,
    batch_size: int = 128,
    longest: float = LONGEST,
    stop: Stop | None = None,
) -> dict[str, Tensor]:
    """Return the model after ``w <- w + a S grad`` on forgotten samples (``methods`` 6.4).

    Nothing bounds the loss, so give a ``stop``, such as ``either`` of few samples recognised and
    a loss over ``2 log C``.

    Parameters
    ----------
    inputs, targets
        What is to be forgotten, n rows each; without any, nothing changes.
    shares
        ``shares_by_depth(model, first=FEW, last=MANY)`` for partial updates; ``None`` for the
        naive method.
    pattern, seed, longest, stop
        See ``train_partially``.

    Raises
    ------
    ParametersError
        As ``train_partially``; also if the learning rate is negative.
    """
    if not learning_rate >= 0:
        raise ParametersError(f"the learning rate must be at least 0, got {learning_rate}")
    return train_partially(
        model,
        forward,
        loss,
        inputs,
        targets,
        epochs=epochs,
        learning_rate=-learning_rate,
        batch_size=batch_size,
        generator=generator,
        shares=shares,
        pattern=pattern,
        seed=seed,
        longest=longest,
        stop=stop,
    )
