"""RCAD: training that is to be uncertain on inputs pushed towards a higher loss.

    A. Setlur, B. Eysenbach, V. Smith, S. Levine. "Adversarial Unlearning: Reducing Confidence
    Along Adversarial Directions." NeurIPS 2022, arXiv:2206.01367.

    loss(x, y) + lambda (log C - H(f(x + alpha g / ||g||))),    g = grad_x loss(x, y)

with the entropy H of the softmax (``methods`` 2.13). It regularises and erases nothing; it is here
because papers compare with it. Whoever trains adds the second term, ``penalty``, to the loss.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from unlearning.distillation import Forward, Loss
from unlearning.errors import MissingNeedError, ParametersError
from unlearning.gradients import check_rows
from unlearning.parameters import Parameters

STRENGTH, RADIUS = 0.2, 1.0
"""Lambda and alpha of the authors' public script."""
Penalty = Callable[[Parameters, Tensor, Tensor], Tensor]
"""Model, inputs and targets of a batch -> what is added to its loss, without dimensions."""


def perturbed(
    model: Parameters,
    forward: Forward,
    loss: Loss,
    inputs: Tensor,
    targets: Tensor,
    radius: float = RADIUS,
) -> Tensor:
    """Return the inputs, each moved by ``radius`` along the gradient of its own loss.

    Parameters
    ----------
    inputs, targets
        n rows each.
    radius
        Euclidean length alpha of a row's perturbation, at least 0. A row whose loss does not
        depend on it stays.

    Returns
    -------
    Tensor
        The inputs' shape; nothing flows back through it.

    Raises
    ------
    MissingNeedError
        If inputs are no real numbers.
    ParametersError
        If rows do not match or the radius is out of range.
    """
    check_rows(inputs, targets)
    if not (math.isfinite(radius) and radius >= 0):
        raise ParametersError(f"the perturbation's length must be at least 0, got {radius}")
    if not inputs.is_floating_point():
        raise MissingNeedError(
            f"inputs can be perturbed if they are real numbers, got {inputs.dtype}"
        )
    fixed = {name: tensor.detach() for name, tensor in model.items()}
    leaf = inputs.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = loss(forward(fixed, leaf), targets).mean()
    (slope,) = torch.autograd.grad(value, leaf)
    # In float64: the gradient of one row in a mean is small, and its square would vanish.
    rows = slope.flatten(1).double()
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    directions = torch.where(lengths > 0, rows / lengths, 0.0)
    return inputs.detach() + (radius * directions).to(inputs.dtype).reshape(inputs.shape)


def confidence(logits: Tensor) -> Tensor:
    """Return the mean over rows of ``log C - H(softmax)``, in [0, log C]; 0 where all is equal.

    Parameters
    ----------
    logits
        Shape (n, C), at least one row.
    """
    logs = functional.log_softmax(logits, dim=1)
    return math.log(logits.shape[1]) + (logs.exp() * logs).sum(dim=1).mean()


def penalty(
    forward: Forward,
    loss: Loss,
    *,
    strength: float = STRENGTH,
    radius: float = RADIUS,
    forget: tuple[Tensor, Tensor] | None = None,
    most: int = 128,
    generator: torch.Generator | None = None,
) -> Penalty:
    """Return what RCAD adds to the loss of a batch.

    Parameters
    ----------
    forward
        Of a network in evaluation mode: the perturbed pass must not move running statistics.
    strength
        Lambda, at least 0.
    radius
        See ``perturbed``.
    forget
        Inputs and targets to forget, at least one row: uncertainty is then asked for around rows
        drawn from these, at most ``most`` a batch, and not around the batch itself.
    generator
        Draws them.

    Raises
    ------
    MissingNeedError, ParametersError
        If a number is out of range, or there is nothing to draw from.
    """
    if not (math.isfinite(strength) and strength >= 0):
        raise ParametersError(f"the strength of RCAD must be at least 0, got {strength}")
    if forget is not None and (generator is None or not len(forget[0]) or most < 1):
        raise MissingNeedError("rows to perturb need a generator, and at least one to draw")

    def around(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if forget is None:
            return inputs, targets
        chosen = torch.randperm(len(forget[0]), generator=generator)[: min(most, len(inputs))]
        return forget[0][chosen], forget[1][chosen]

    def value(model: Parameters, inputs: Tensor, targets: Tensor) -> Tensor:
        near = perturbed(model, forward, loss, *around(inputs, targets), radius)
        return strength * confidence(forward(model, near))

    return value
