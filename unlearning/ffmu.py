"""FFMU: PCMU in a federation; devices send gradients, and the server quantises their average.

    T. Che, Y. Zhou, Z. Zhang, L. Lyu, J. Liu, D. Yan, D. Dou, J. Huan. "Fast Federated Machine
    Unlearning with Nonlinear Functional Theory." ICML, 2023; eq. 13-15, Table 16.
    (``methods`` 3.3.)

In round t, with S, alpha and lr as in ``unlearning.pcmu``, device k of K computes

    v = w^(t-1);  for every batch:  g = gradient at v,  v <- v - lr alpha_local S(g)
    Gbar_k = mean of these g

and the server steps from where the round started:

    Gbar = (1/K) sum_k Gbar_k,    w^t = w^(t-1) - lr alpha_server S(Gbar)

The model after the last round is the answer to every later request to forget samples, as far as
``unlearning.certificates`` shows that it would have been the same without them.

K = 1 is PCMU. The certificate needs every device to send *one* gradient of *all* its samples at
w^(t-1): one epoch of one batch. The papers' average over noise at inference is left out; S stands
in for it.

A gradient travels in the form of a model, ``w - G`` (``as_model``), so that whatever looks at what
devices send can take it for what it takes all others for: its difference from w is the update.

The ablation FFMU-N, in which devices send v and the server averages these models, is plain
averaging: ``unlearning.parameters.weighted_mean``.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from unlearning import pcmu
from unlearning.errors import ParametersError
from unlearning.parameters import Parameters, copied, trained_names, weighted_mean

Batch = TypeVar("Batch")

ALPHA_SERVER = 0.05
"""Scale of the server's step (``methods`` 3.2); a device's is ``pcmu.ALPHA``."""
LEARNING_RATE, ROUNDS = 0.1, 200
"""Of Table 16."""
DECAY = 0.1
"""What the learning rate is multiplied by after half and after three quarters of the rounds."""


def learning_rate(number: int, rounds: int, initial: float = LEARNING_RATE) -> float:
    """Return the learning rate of round ``number``.

    Parameters
    ----------
    number
        From 1 to ``rounds``. Of 200 rounds, 1 to 100 have the initial rate, 101 to 150 a tenth
        of it and 151 to 200 a hundredth.
    initial
        Above 0.

    Raises
    ------
    ParametersError
        If a number is out of range.
    """
    if not 1 <= number <= rounds:
        raise ParametersError(f"a round's number must lie from 1 to {rounds}, got {number}")
    if not (math.isfinite(initial) and initial > 0):
        raise ParametersError(f"the learning rate must be a number above 0, got {initial}")
    passed = (2 * number > rounds) + (4 * number > 3 * rounds)
    return initial * DECAY**passed


def device_round(
    model: Parameters,
    batches: Iterable[Batch],
    gradient_of: Callable[[Parameters, Batch], Parameters],
    learning_rate: float,
    quantiser: pcmu.Quantiser,
    generator: torch.Generator | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train one device for a round (eq. 13).

    Parameters
    ----------
    model
        w^(t-1).
    batches
        Of all local epochs, one after the other; at least one. One batch of all samples gives
        the gradient at w^(t-1), which is what the certificate is about.
    gradient_of
        ``gradient_of(v, batch)`` is the gradient of the *mean* loss over the batch, with the
        names, shapes and types of v's trained tensors.
    learning_rate
        Above 0.

    Returns
    -------
    tuple
        The local model v, which FFMU-N sends, and Gbar_k, which FFMU sends.

    Raises
    ------
    ParametersError
        If there is no batch, or as in ``pcmu.step``.
    """
    local, count = copied(model), 0
    total = {name: torch.zeros_like(model[name]) for name in trained_names(model)}
    for batch in batches:
        gradient = gradient_of(local, batch)
        local = pcmu.step(local, gradient, learning_rate, quantiser, generator)
        for name in total:
            total[name] += gradient[name]
        count += 1
    if not count:
        raise ParametersError("a device without a batch has no gradient to send; leave it out")
    return local, {name: tensor / count for name, tensor in total.items()}


def as_model(start: Parameters, gradient: Parameters) -> dict[str, Tensor]:
    """Return ``w - G``, in which no sign of G is lost; other tensors are copies of w's.

    Where G is too small to be told from w, the number next to w in its direction is sent. So the
    gradient that is read differs by no more than the spacing of numbers at w, its sign never does,
    and what is sent is w itself where G is 0, and nowhere else.

    Parameters
    ----------
    start
        w^(t-1), float32.
    gradient
        G; at least w's trained tensors.
    """
    sent = copied(start)
    for name in trained_names(start):
        origin, step = start[name], gradient[name]
        moved = origin - step
        nearest = torch.nextafter(origin, torch.full_like(origin, math.inf).copysign(-step))
        sent[name] = torch.where((moved == origin) & (step != 0), nearest, moved)
    return sent


def as_gradient(start: Parameters, sent: Parameters) -> dict[str, Tensor]:
    """Return the gradient that ``as_model`` made ``sent`` of, over the trained tensors."""
    return {name: start[name] - sent[name] for name in trained_names(start)}


def average(
    gradients: Sequence[Parameters], samples: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """Return Gbar over the trained tensors (eq. 14).

    Parameters
    ----------
    gradients
        Gbar_k of every device; at least one, all alike.
    samples
        Samples of every device, to weight by them; without, all devices count the same.

    Raises
    ------
    ParametersError
        If gradients differ or the numbers of samples define no average.
    """
    if not gradients:
        raise ParametersError("no device sent a gradient, so there is none to average")
    trained = [{name: sent[name] for name in trained_names(sent)} for sent in gradients]
    return weighted_mean(trained, [1.0] * len(trained) if samples is None else samples)


def server_step(
    model: Parameters,
    gradients: Sequence[Parameters],
    learning_rate: float,
    quantiser: pcmu.Quantiser,
    *,
    samples: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Return ``w^t = w^(t-1) - lr alpha S(Gbar)`` (eq. 15); buffers are copies of the model's.

    Parameters
    ----------
    model
        w^(t-1), which every device started from.
    quantiser
        The server's; its alpha is ``ALPHA_SERVER`` unless there is a reason.

    Other arguments are those of ``average`` and ``pcmu.step``, and so are the errors.
    """
    return pcmu.step(model, average(gradients, samples), learning_rate, quantiser, generator)
