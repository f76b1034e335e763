"""MacForget (approximate): make a model answer for forgotten rows as for rows it never saw.

    Y. Liu, Z. Ma, X. Liu, J. Liu, Z. Jiang, J. Ma, P. Yu, K. Ren. "Learn to Forget: Machine
    Unlearning via Neuron Masking." arXiv:2003.10933.

The source, also called Forsaken, trains "mask gradients" for which its public text gives no
formulas. This reading is ours and only approximate (``methods`` 2.9), and reports say so. With a
target posterior q, every step is

    g = grad KL(q || f(x)),   mean over the forgotten rows
    s = argmin_s 1/2 ||s - M g||^2 + l1 ||s||_1 = sign(M g) max(|M g| - l1, 0)
    w <- w - eta s

M keeps the largest |g| of every weight of a linear or convolutional layer. The L1 norm acts through
s: as a term of the loss it would need second derivatives.

The client that forgets computes this and could return anything; the server adds its weighted
update, as ``partial_updates.merged`` does.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from torch import Tensor
from torch.nn import functional

from unlearning.distillation import Forward
from unlearning.errors import MissingNeedError, ParametersError
from unlearning.gradients import chunked_gradient
from unlearning.masking import top_share
from unlearning.parameters import Parameters, check_finite, copied, prunable_names
from unlearning.partial_updates import Stop, stepped

LEARNING_RATE, STEPS, SHARE, PENALTY = 0.01, 20, 0.1, 1e-4
"""Step eta, number of steps, share of entries that M keeps, and l1 (``methods`` 2.9)."""

Unit = Literal["weight", "neuron"]
"""What M keeps: single entries, or all of what leads to one output."""


def target_posterior(model: Parameters, forward: Forward, unseen: Tensor, classes: int) -> Tensor:
    """Return q, the mean softmax on rows that the model was not trained on.

    Parameters
    ----------
    unseen
        n inputs of no member, such as test rows of the client's own. Without any, q is uniform.
    classes
        Number C of classes, at least 2.

    Returns
    -------
    Tensor
        Shape (C,), summing to 1.

    Raises
    ------
    ParametersError
        If the model has another number of classes.
    """
    if classes < 2:
        raise ParametersError(f"a class method needs at least 2 classes, got {classes}")
    if not len(unseen):
        return torch.full((classes,), 1 / classes)
    with torch.no_grad():
        posteriors = forward(model, unseen).softmax(dim=1)
    if posteriors.shape[1] != classes:
        raise ParametersError(f"the model has {posteriors.shape[1]} classes, not {classes}")
    return posteriors.mean(dim=0)


def divergence(logits: Tensor, targets: Tensor) -> Tensor:
    """Return ``KL(q || softmax)``, the mean over rows.

    Parameters
    ----------
    logits, targets
        Shape (n, C) both; q for every row.
    """
    return functional.kl_div(logits.log_softmax(dim=1), targets, reduction="batchmean")


def mask(slope: Parameters, share: float = SHARE, unit: Unit = "weight") -> dict[str, Tensor]:
    """Return M: the ``ceil(share n)`` largest |g| of every prunable tensor (``methods`` 0).

    Parameters
    ----------
    slope
        Gradient of a model; biases and normalisation are in no mask.
    share
        In [0, 1]; of the entries, or of the outputs, the first dimension, by the sum of |g|.

    Returns
    -------
    dict
        Bool tensors, true where a step may move an entry.

    Raises
    ------
    ParametersError
        If the share is out of range or a gradient is not finite.
    """
    sizes = {name: slope[name].abs() for name in prunable_names(slope)}
    match unit:
        case "weight":
            return top_share(sizes, share, "tensor")
        case "neuron":
            sums = {name: tensor.flatten(1).sum(dim=1) for name, tensor in sizes.items()}
            return {
                name: chosen.reshape(-1, *[1] * (sizes[name].dim() - 1)).expand(sizes[name].shape)
                for name, chosen in top_share(sums, share, "tensor").items()
            }
        case _:
            assert_never(unit)


def mask_gradient(
    slope: Parameters, chosen: Mapping[str, Tensor], penalty: float = PENALTY
) -> dict[str, Tensor]:
    """Return s, the masked gradient with every entry brought nearer to 0 by ``penalty``.

    Raises
    ------
    ParametersError
        If the penalty is negative.
    """
    if not penalty >= 0:
        raise ParametersError(f"the weight of an L1 norm must be at least 0, got {penalty}")
    return {
        name: functional.softshrink(slope[name].masked_fill(~places, 0), penalty)
        for name, places in chosen.items()
    }


def as_unsure_as(forward: Forward, inputs: Tensor, unseen: Tensor) -> Stop:
    """Return a stop rule: the mean confidence on forgotten rows is at most that on unseen ones.

    Confidence is the largest entry of the softmax; both are of the model that is asked about.

    Parameters
    ----------
    inputs, unseen
        Forgotten inputs and those of no member, at least one row each.
    """
    if not (len(inputs) and len(unseen)):
        raise MissingNeedError("comparing confidences needs forgotten rows and unseen rows")

    def reached(model: Parameters) -> bool:
        with torch.no_grad():
            ours, theirs = (
                float(forward(model, rows).softmax(dim=1).amax(dim=1).double().mean())
                for rows in (inputs, unseen)
            )
        return ours <= theirs

    return reached


@dataclass(frozen=True, eq=False)
class Forgetting:
    """How it went.

    Attributes
    ----------
    model
        Where it ended.
    divergences
        KL(q || f(x)) on the forgotten rows, before every step.
    stopped
        Whether the stop rule ended it, rather than the number of steps.
    """

    model: dict[str, Tensor]
    divergences: tuple[float, ...]
    stopped: bool


def forget(
    model: Parameters,
    forward: Forward,
    inputs: Tensor,
    posterior: Tensor,
    *,
    steps: int = STEPS,
    learning_rate: float = LEARNING_RATE,
    share: float = SHARE,
    penalty: float = PENALTY,
    unit: Unit = "weight",
    stop: Stop | None = None,
) -> Forgetting:
    """Move the posterior of forgotten rows towards ``posterior``, a few entries at a time.

    Parameters
    ----------
    inputs
        Rows to forget; without any, nothing changes. Labels are not needed.
    posterior
        q, shape (C,); see ``target_posterior``.
    learning_rate
        Step eta, at least 0.
    stop
        Asked before every step, also the first; such as ``as_unsure_as``.

    Raises
    ------
    ParametersError
        If a number is out of range or something is not finite.
    """
    if not (math.isfinite(learning_rate) and learning_rate >= 0):
        raise ParametersError(f"the learning rate must be at least 0, got {learning_rate}")
    current, found = copied(model), list[float]()
    wanted = posterior.expand(len(inputs), -1)
    for _ in range(steps if len(inputs) else 0):
        if stop is not None and stop(current):
            return Forgetting(current, tuple(found), stopped=True)
        slope = chunked_gradient(current, forward, divergence, inputs, wanted)
        with torch.no_grad():
            found.append(float(divergence(forward(current, inputs), wanted)))
        current = stepped(
            current, mask_gradient(slope, mask(slope, share, unit), penalty), learning_rate
        )
        check_finite(current)
    return Forgetting(current, tuple(found), stopped=False)
