"""Fisher information of single weights: masks, noise and one influence step.

The diagonal of the empirical Fisher information on a set of samples is

    F_j = mean over samples of (d log p(y | x) / d w_j)^2

with true labels and one gradient per sample; the square of a batch's gradient is something else.

FisherMask (paper 001; ``methods`` 5.1) scores ``F_f - F_r``, what matters for the data to forget
beyond what matters for the rest, and zeroes the highest over all trained tensors. FisherNoise
(5.6) blurs every weight by how little it matters for the rest:

    A. Golatkar, A. Achille, S. Soatto. "Eternal Sunshine of the Spotless Net: Selective
    Forgetting in Deep Networks." CVPR 2020, arXiv:1911.04933.

A loss is a negative log likelihood, as of :mod:`unlearning.gradients`.
"""

import math
from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor

from unlearning.distillation import Forward, Loss
from unlearning.errors import ParametersError
from unlearning.gradients import check_rows, per_sample_gradients
from unlearning.parameters import Parameters, check_alike, check_finite, trained_names
from unlearning.sums import Statistics, check_statistics, means

Form = Literal["mean", "sum", "ratio"]
"""``F_f - F_r`` of averages; of sums, in which the larger set decides; ``F_f / F_r`` of averages,
as ``F_f / (F_f + F_r)``, which ranks alike and is defined where F_r is 0."""

MOST_SAMPLES = 2000
"""Samples of a set that are enough (``methods`` 5.1)."""
ALPHA, RELATIVE = 3e-6, 0.05
"""Sizes of noise: of the authors' public code, and of eq. 2 in units of rms(w) (5.6)."""


# ---------------------------------------------------------------- information


def balanced_rows(labels: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Choose at most ``most`` rows, as many of every class as there can be.

    Parameters
    ----------
    labels
        Shape (n,). Where there are no classes, a vector of zeros chooses uniformly.
    most
        At least 0.

    Returns
    -------
    Tensor
        Ascending indices, ``min(n, most)`` of them. Numbers of two classes differ by at most one,
        unless the smaller class is exhausted.
    """
    if most < 0:
        raise ParametersError(f"at most {most} rows cannot be chosen; give a number from 0 on")
    order = torch.randperm(len(labels), generator=generator)
    turn = torch.empty(len(labels), dtype=torch.long)
    for value in set(labels.tolist()):
        of_class = order[labels[order] == value]
        turn[of_class] = torch.arange(len(of_class))
    # Stable: within a turn, classes follow each other in the order drawn.
    ranked = order[torch.argsort(turn[order], stable=True)]
    return ranked[:most].sort().values


def fisher_statistics(
    model: Parameters,
    forward: Forward,
    loss: Loss,
    inputs: Tensor,
    targets: Tensor,
    chunk: int = 16,
) -> Statistics:
    """Return the sum of squared gradients over samples, and their number.

    Parameters
    ----------
    forward
        Of a network in evaluation mode.
    inputs, targets
        n rows each; without rows all sums are 0.
    chunk
        Gradients held at once, at least 1; each takes as much memory as the model.

    Returns
    -------
    Statistics
        Sums over the trained tensors, float32 or wider. Buffers have none.

    Raises
    ------
    ParametersError
        If rows do not match, the chunk is out of range or a gradient is not finite.
    """
    check_rows(inputs, targets)
    if chunk < 1:
        raise ParametersError(f"at least one gradient is held at once, got a chunk of {chunk}")
    names = trained_names(model)
    totals = {name: torch.zeros(model[name].shape, dtype=torch.float64) for name in names}
    for start in range(0, len(inputs), chunk):
        rows = slice(start, start + chunk)
        gradients = per_sample_gradients(model, forward, loss, inputs[rows], targets[rows])
        for name, tensor in gradients.items():
            totals[name] += tensor.double().square().sum(dim=0)
    sums = {
        name: total.to(torch.promote_types(model[name].dtype, torch.float32))
        for name, total in totals.items()
    }
    check_finite(sums)
    return Statistics(sums, len(inputs))


def fisher_scores(
    forget: Statistics, remain: Statistics | None, form: Form = "mean"
) -> dict[str, Tensor]:
    """Return how much more a weight matters for what is to be forgotten (``methods`` 5.1).

    Parameters
    ----------
    forget, remain
        Squared gradients on both sets, from one data holder or added over clients. Without
        remaining data the score is ``F_f`` alone, whatever the form.
    form
        How the two are compared.

    Raises
    ------
    MissingNeedError
        If a set has no samples.
    ParametersError
        If the two differ in names or shapes.
    """
    ours = means(forget)
    if remain is None:
        return ours
    theirs = means(remain)
    check_alike(ours, theirs)
    match form:
        case "mean":
            return {name: ours[name] - theirs[name] for name in ours}
        case "sum":
            return {name: forget.sums[name] - remain.sums[name] for name in ours}
        case "ratio":
            both = {name: ours[name] + theirs[name] for name in ours}
            return {
                name: torch.where(both[name] > 0, ours[name] / both[name], 0.0) for name in ours
            }


# ---------------------------------------------------------------- noise


def _checked(model: Parameters, fisher: Parameters) -> dict[str, Tensor]:
    trained = {name: model[name] for name in trained_names(model)}
    check_statistics(Statistics(fisher, 1), trained)
    return trained


def noise_scale(
    model: Parameters, fisher: Parameters, relative: float = RELATIVE, epsilon: float = 1e-8
) -> float:
    """Return c such that FisherNoise has a mean standard deviation of ``relative`` rms(w).

    The mean is over all trained entries: ``c = relative rms(w) / mean((h + eps)^(-1/4))``.
    """
    trained = _checked(model, fisher)
    if not (relative >= 0 and epsilon > 0):
        raise ParametersError(
            f"the size of noise must be at least 0 and epsilon over 0, got {relative}, {epsilon}"
        )
    size = sum(tensor.numel() for tensor in trained.values())
    if not size:
        return 0.0
    squares = sum(float(tensor.double().square().sum()) for tensor in trained.values())
    spread = sum(float(((fisher[name].double() + epsilon) ** -0.25).sum()) for name in trained)
    return relative * math.sqrt(squares / size) / (spread / size)


def fisher_noise(
    model: Parameters,
    fisher: Parameters,
    scale: float,
    generator: torch.Generator,
    epsilon: float = 1e-8,
) -> dict[str, Tensor]:
    """Return ``w + c (h + eps)^(-1/4) xi``, paper 001, eq. 2, with the noise it leaves out.

    Parameters
    ----------
    model
        Buffers are copied.
    fisher
        Information h on the remaining data, over the trained tensors.
    scale
        Number c of at least 0, the paper's ``(lambda s^2)^(1/4)``; see ``noise_scale``.
    generator
        Draws xi, standard normal, tensor by tensor in the model's order.
    epsilon
        Over 0: bounds the noise where nothing depends on a weight.

    Raises
    ------
    ParametersError
        If ``fisher`` does not fit or is negative, or a number is out of range.
    """
    trained = _checked(model, fisher)
    if not (math.isfinite(scale) and scale >= 0 and epsilon > 0):
        raise ParametersError(
            f"the scale of noise must be at least 0 and epsilon over 0, got {scale}, {epsilon}"
        )
    result = {name: tensor.clone() for name, tensor in model.items()}
    for name, tensor in trained.items():
        deviation = scale * (fisher[name] + epsilon) ** -0.25
        result[name] = _blurred(tensor, deviation, generator)
    check_finite(result)
    return result


def golatkar_noise(
    model: Parameters,
    fisher: Parameters,
    generator: torch.Generator,
    *,
    head: Collection[str] = (),
    forgotten_class: int | None = None,
    alpha: float = ALPHA,
) -> dict[str, Tensor]:
    """Return the model with noise by the recipe of the authors' public code (``methods`` 5.6).

    Variances are ``alpha min(1 / (h + 1e-8), 1e3)``, in the head at most 1e2 of it, averaged over
    dimension 1 of tensors that have one, and ten times as large in the head and in vectors. The
    forgotten class's row of the head is drawn around 0 with a variance of 10 * 1e-4.

    Parameters
    ----------
    head
        Names of the last layer's tensors, their first dimension the classes.
    forgotten_class
        In [0, C); ``None`` where no whole class is forgotten.
    alpha
        At least 0; 0 leaves all weights but the forgotten class's as they are.

    Raises
    ------
    ParametersError
        As ``fisher_noise``; also if a name of the head is unknown or the class out of range.
    """
    trained = _checked(model, fisher)
    unknown = sorted(set(head) - trained.keys())
    if unknown:
        raise ParametersError(f"the head has no trained tensors called {', '.join(unknown)}")
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ParametersError(f"the size of noise must be a number of at least 0, got {alpha}")
    if forgotten_class is not None:
        _check_class(forgotten_class, [trained[name] for name in head])
    result = {name: tensor.clone() for name, tensor in model.items()}
    for name, tensor in trained.items():
        last = name in head
        variance = alpha * (1 / (fisher[name] + 1e-8)).clamp(max=1e2 if last else 1e3)
        if tensor.dim() > 1:
            variance = variance.mean(dim=1, keepdim=True).expand_as(tensor).clone()
        middle = tensor.clone()
        if last and forgotten_class is not None:
            middle[forgotten_class] = 0
            variance[forgotten_class] = 1e-4
        if last or tensor.dim() == 1:
            variance = variance * 10
        result[name] = _blurred(middle, variance.sqrt(), generator)
    check_finite(result)
    return result


def _check_class(chosen: int, head: Collection[Tensor]) -> None:
    if not head:
        raise ParametersError("forgetting a class needs the names of the head's tensors")
    for tensor in head:
        if not 0 <= chosen < len(tensor):
            raise ParametersError(f"classes are numbered from 0 to {len(tensor) - 1}, got {chosen}")


def _blurred(middle: Tensor, deviation: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(middle.shape, generator=generator, dtype=deviation.dtype)
    return (middle + deviation * drawn).to(middle.dtype)


# ---------------------------------------------------------------- influence


def influence_step(
    model: Parameters,
    gradients: Parameters,
    fisher: Parameters,
    samples: int,
    damping: float = 1e-2,
) -> dict[str, Tensor]:
    """Return ``w + 1/n H^-1 sum_f grad l`` with ``H = diag(F) + damping`` (``methods`` 5.6, 2.14).

    One Newton step towards the minimum without the forgotten samples, with the Fisher information
    for the curvature. On deep networks it forgets little.

    Parameters
    ----------
    gradients
        Sum over the forgotten samples of the loss's gradient, over the trained tensors; zero if
        there are none.
    fisher
        Average over all samples, the forgotten ones included.
    samples
        Number n of all samples, at least 1.
    damping
        Over 0.

    Raises
    ------
    ParametersError
        If something does not fit or is out of range.
    """
    trained = _checked(model, fisher)
    check_alike(trained, gradients)
    if samples < 1 or not damping > 0:
        raise ParametersError(
            f"an influence needs at least 1 sample and damping over 0, got {samples}, {damping}"
        )
    result = {name: tensor.clone() for name, tensor in model.items()}
    for name, tensor in trained.items():
        step = gradients[name] / (fisher[name] + damping) / samples
        result[name] = (tensor + step).to(tensor.dtype)
    check_finite(result)
    return result
