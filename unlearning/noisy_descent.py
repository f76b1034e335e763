r"""Noisy gradient descent: forget by going on without the data, under noise that is accounted for.

    R. Chourasia, N. Shah. "Forget Unlearning: Towards True Data-Deletion in Machine Learning."
    ICML 2023, arXiv:2210.08911.

A step uses all n rows, every row's gradient clipped to the norm c (``methods`` 2.15):

    g = 1/n sum_i clip(grad l_i(w), c)
    w <- w - eta (g + mu w) + sqrt(2 eta) s xi,    xi standard normal

To forget m rows, a few more such steps follow on the rest. Nothing is remembered for it.

**Accounting.** Without the m rows g moves by at most

    ||g - g'|| = m/n ||mean over the m - mean over the others|| <= 2 c m / n

(replacing m rows gives the same bound), so the step moves by at most ``eta 2 c m / n`` before
noise of standard deviation ``sqrt(2 eta) s`` is added. It is a Gaussian mechanism of multiplier

    z = sqrt(2 eta) s / (eta 2 c m / n) = s n / (c m sqrt(2 eta)),

as if noise of deviation ``s sqrt(2 / eta)`` were added to the *mean gradient*. Its Renyi divergence
of order a is ``a / (2 z^2) = a eta c^2 m^2 / (s n)^2``. Over T steps divergences add; decay depends
on the last model only. So every order a > 1 has

    D_a <= a rho,    rho = T eta (c m / (s n))^2

between the models that T steps give with and without the m rows, in both directions. The steps that
follow see the same rows in both cases, and post-processing does not add to it: the bound holds
between the unlearned model and one never trained on the m rows. That it shrinks in these steps
needs a convex loss and is not claimed. With probability at least 1 - delta (Mironov 2017, Prop. 3)

    epsilon = rho + 2 sqrt(rho log(1/delta)),    at a = 1 + sqrt(log(1/delta) / rho).

The numbers are those of one data holder with n rows: averages over clients are post-processing.
They count on real-valued noise; floating-point numbers only come near it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from unlearning.distillation import Forward, Loss
from unlearning.errors import MissingNeedError, ParametersError
from unlearning.gradients import check_rows, chunked_gradient, per_sample_gradients
from unlearning.parameters import Parameters, check_finite, copied, top_count, trained_names

UNLEARNING_SHARE = 0.2
"""Rounds that follow a deletion, as a share of those before it (``methods`` 2.15)."""
DELTA = 1e-5
NONE = "none"
"""The statement where there is no guarantee."""


@dataclass(frozen=True)
class Settings:
    """Numbers of the method.

    Attributes
    ----------
    learning_rate
        Step eta, over 0.
    decay
        mu, at least 0.
    clip
        Bound c on the norm of a row's gradient, over 0; ``None`` does not clip, and nothing is
        guaranteed.
    noise
        s, at least 0; at 0 nothing is guaranteed.
    """

    learning_rate: float = 0.1
    decay: float = 1e-4
    clip: float | None = 1.0
    noise: float = 1e-3

    def __post_init__(self) -> None:
        numbers = (self.learning_rate, self.decay, self.noise)
        if not (all(map(math.isfinite, numbers)) and min(numbers) >= 0 < self.learning_rate):
            raise ParametersError(
                "the learning rate must be over 0, decay and noise at least 0, got "
                f"{self.learning_rate}, {self.decay} and {self.noise}"
            )
        if self.clip is not None and not (math.isfinite(self.clip) and self.clip > 0):
            raise ParametersError(f"the bound on a row's gradient must be over 0, got {self.clip}")


DEFAULT = Settings()


def unlearning_rounds(rounds: int) -> int:
    """Return K_u, ``ceil(0.2 R)`` rounds of training without the forgotten rows."""
    return top_count(rounds, UNLEARNING_SHARE)


# ---------------------------------------------------------------- descent


def clipped_gradient(
    model: Parameters,
    forward: Forward,
    loss: Loss,
    inputs: Tensor,
    targets: Tensor,
    longest: float,
    chunk: int = 16,
) -> dict[str, Tensor]:
    """Return the mean over rows of their gradients, each scaled down to ``longest`` at most.

    Parameters
    ----------
    forward
        Of a network in evaluation mode: batch statistics would let a row act through others.
    inputs, targets
        n rows each, at least one.
    longest
        Bound c on the norm over all trained tensors together, over 0.
    chunk
        Gradients held at once, at least 1.

    Raises
    ------
    MissingNeedError
        If there are no rows.
    ParametersError
        If rows do not match, a gradient is not finite or a number is out of range.
    """
    check_rows(inputs, targets)
    if not len(inputs):
        raise MissingNeedError("gradients need at least one row of data, and there are none")
    if chunk < 1 or not longest > 0:
        raise ParametersError(
            f"a chunk holds at least 1 gradient and the bound is over 0, got {chunk}, {longest}"
        )
    total = {name: torch.zeros_like(model[name]) for name in trained_names(model)}
    for rows, wanted in zip(torch.split(inputs, chunk), torch.split(targets, chunk), strict=True):
        found = per_sample_gradients(model, forward, loss, rows, wanted)
        # Nothing bounds a gradient that is not finite: 0 times infinity is no number.
        check_finite(found)
        squares = torch.stack([t.flatten(1).double().square().sum(dim=1) for t in found.values()])
        factors = (longest / squares.sum(dim=0).sqrt()).clamp(max=1)
        for name, tensor in found.items():
            total[name] += torch.tensordot(factors.to(tensor.dtype), tensor, dims=1)
    return {name: tensor / len(inputs) for name, tensor in total.items()}


def step(
    model: Parameters,
    slope: Parameters,
    generator: torch.Generator,
    settings: Settings = DEFAULT,
) -> dict[str, Tensor]:
    """Return ``w - eta (g + mu w) + sqrt(2 eta) s xi`` over the trained tensors.

    Parameters
    ----------
    model
        Buffers are copied.
    slope
        Gradient g of the mean loss over the trained tensors.
    generator
        Draws xi, tensor by tensor in the model's order; without noise nothing is drawn.

    Raises
    ------
    ParametersError
        If the result is not finite.
    """
    moved = copied(model)
    deviation = math.sqrt(2 * settings.learning_rate) * settings.noise
    for name in trained_names(model):
        pull = slope[name] + settings.decay * model[name]
        moved[name] = model[name] - settings.learning_rate * pull
        if deviation:
            drawn = torch.randn(moved[name].shape, generator=generator, dtype=moved[name].dtype)
            moved[name] += deviation * drawn.to(moved[name].device)
    check_finite(moved)
    return moved


def train(
    model: Parameters,
    forward: Forward,
    loss: Loss,
    inputs: Tensor,
    targets: Tensor,
    *,
    steps: int,
    generator: torch.Generator,
    settings: Settings = DEFAULT,
    chunk: int = 16,
) -> dict[str, Tensor]:
    """Return the model after ``steps`` steps on all rows; on those that remain, it unlearns.

    Parameters
    ----------
    inputs, targets
        n rows each; without rows nothing changes, and nothing is drawn.
    generator
        Draws the noise.
    chunk
        Gradients held at once, at least 1.

    Raises
    ------
    ParametersError
        If rows do not match or something is not finite.
    """
    current = copied(model)
    check_rows(inputs, targets)
    for _ in range(steps if len(inputs) else 0):
        if settings.clip is None:
            slope = chunked_gradient(current, forward, loss, inputs, targets)
        else:
            slope = clipped_gradient(current, forward, loss, inputs, targets, settings.clip, chunk)
        current = step(current, slope, generator, settings)
    return current


# ---------------------------------------------------------------- accounting


@dataclass(frozen=True)
class Guarantee:
    """What the noise hides; see the top of this file.

    Attributes
    ----------
    rho
        ``D_a <= a rho`` for every order a > 1.
    multiplier
        z, the noise of a step over the most that the forgotten rows can move it.
    rows, forgotten, steps
        n, m and T.
    """

    rho: float
    multiplier: float
    rows: int
    forgotten: int
    steps: int

    def divergence(self, order: float) -> float:
        """Return the bound on the Renyi divergence of an order over 1."""
        if not order > 1:
            raise ParametersError(f"the order of a Renyi divergence must be over 1, got {order}")
        return order * self.rho

    def epsilon(self, delta: float = DELTA) -> float:
        """Return epsilon for a delta in (0, 1)."""
        if not 0 < delta < 1:
            raise ParametersError(f"delta must lie in (0, 1), got {delta}")
        return self.rho + 2 * math.sqrt(self.rho * math.log(1 / delta))

    @property
    def statement(self) -> str:
        """All in one line."""
        return (
            f"Renyi divergence of order a at most {self.rho:.4g} a from a model never trained on "
            f"{self.forgotten} of {self.rows} rows, hence epsilon {self.epsilon():.4g} at delta "
            f"{DELTA:g}; {self.steps} steps of the Gaussian mechanism of multiplier "
            f"{self.multiplier:.4g}"
        )


def guarantee(settings: Settings, *, rows: int, forgotten: int = 1, steps: int) -> Guarantee | None:
    """Return what holds for ``forgotten`` rows after training; ``None`` without clip or noise.

    Parameters
    ----------
    rows
        n rows of the data holder in training, the forgotten ones included.
    forgotten
        m, from 1 to n.
    steps
        T steps that saw these rows, over all rounds, at least 0. Rows must not have been fewer
        in any of them.

    Raises
    ------
    ParametersError
        If a number is out of range.
    """
    if not (1 <= forgotten <= rows and steps >= 0):
        raise ParametersError(
            f"forgetting 1 to n of n rows after 0 or more steps has a bound, got {forgotten} of "
            f"{rows} after {steps}"
        )
    if settings.clip is None or not settings.noise:
        return None
    sensitivity = settings.learning_rate * 2 * settings.clip * forgotten / rows
    multiplier = math.sqrt(2 * settings.learning_rate) * settings.noise / sensitivity
    return Guarantee(steps / (2 * multiplier**2), multiplier, rows, forgotten, steps)


def statement(found: Guarantee | None) -> str:
    """Return the line to print: the guarantee, or that there is none."""
    return NONE if found is None else found.statement
