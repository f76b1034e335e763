"""PCMU: train by quantised gradients, so that a few samples more or less change no step.

    Z. Zhang, Y. Zhou, X. Zhao, T. Che, L. Lyu. "Prompt Certified Machine Unlearning with
    Randomized Gradient Smoothing and Quantization." NeurIPS, 2022.
    The formulas and the closed form are those of ``methods`` 3.1 and 3.2.

A gradient g is quantised per coordinate, under noise, and the most probable class is the step:

    Q(u) = +1 if u > lam, -1 if u < -lam, 0 otherwise
    S(g) = argmax_c P(Q(g + e) = c),  e ~ N(0, sigma^2),  lam = lam_factor sigma^2
    w   <- w - lr alpha S(g)

No noise is drawn. With Phi the normal distribution function,

    p_plus = Phi((g - lam) / sigma)    p_minus = Phi((-g - lam) / sigma)    p_zero = the rest

and zero wins if and only if ``2 Phi((|g| - lam) / sigma) + Phi((-|g| - lam) / sigma) <= 1``. The
left side grows with |g|, so there is one threshold g* and

    S(g) = sign(g) [|g| > g*]

g* is 0 while ``lam < 0.4307 sigma``, which is ``sigma < 0.4307`` with the paper's lam of sigma^2:
at its sigma of 0.1, S is the sign and nothing else. Above, gradients of the usual size fall into
the dead zone and training stops; see ``dead_zone``.

The papers give no scale for the step. Ours is a constant alpha: one that depended on the data, such
as the mean of |g|, would tell of the removed samples and void the certificates.

Unofficial code on the web draws the noise once and steps along class *indices* 0 to 2, which has
the wrong sign; that is not this method.

Functions on parameter maps work on the trained tensors; statistics of normalisation layers are
never quantised.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, assert_never, get_args

import torch
from torch import Tensor

from unlearning.errors import ParametersError
from unlearning.parameters import Parameters, check_alike, check_finite, copied, trained_names

Mode = Literal["hard", "soft", "sample"]
"""What is stepped along (``methods`` 3.2): ``alpha S(g)``, the only one with a certificate;
``m(g) / m'(0)``, the mean of Q(g + e) scaled to be g where g is small; ``alpha Q(g + e)`` for one
draw of the noise, for tests only."""

SIGMA, LAM_FACTOR = 0.1, 1.0
"""Standard deviation of the noise, and lam in units of sigma^2, of FFMU's Table 16."""
ALPHA = 0.01
"""Scale of a step on one device (``methods`` 3.2)."""

_STEPS = 60
_LARGEST_SOFT_RATIO = 13.0  # of lam and sigma: 1 / m'(0) stays below the largest float32


@dataclass(frozen=True, kw_only=True)
class Quantiser:
    """How a gradient becomes a step.

    Raises
    ------
    ParametersError
        If anything is out of range; all faults are told at once.
    """

    sigma: float = SIGMA
    """Standard deviation of the noise, in the unit of the gradient; more than 0."""
    lam_factor: float = LAM_FACTOR
    """lam in units of sigma^2; at least 0."""
    mode: Mode = "hard"
    alpha: float = ALPHA
    """Length of a step per coordinate before the learning rate; more than 0, and the same for
    all rounds and data. ``soft`` has a scale of its own and does not use it."""

    def __post_init__(self) -> None:
        faults = []
        if not (math.isfinite(self.sigma) and self.sigma > 0):
            faults.append(f"sigma must be a number above 0, got {self.sigma}")
        if not (math.isfinite(self.lam_factor) and self.lam_factor >= 0):
            faults.append(f"lam_factor must be a number of at least 0, got {self.lam_factor}")
        if self.mode not in get_args(Mode):
            faults.append(f"mode must be one of {', '.join(get_args(Mode))}, got {self.mode!r}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            faults.append(f"alpha must be a number above 0, got {self.alpha}")
        if not faults and not math.isfinite(self.lam):
            faults.append(f"lam = lam_factor sigma^2 is {self.lam}; lower sigma or lam_factor")
        if not faults and self.mode == "soft" and self.lam > _LARGEST_SOFT_RATIO * self.sigma:
            faults.append(
                f"mode soft needs lam of at most {_LARGEST_SOFT_RATIO:g} sigma, got "
                f"{self.lam / self.sigma:g}; lower sigma or lam_factor"
            )
        if faults:
            raise ParametersError("quantiser: " + "; ".join(faults))

    @property
    def lam(self) -> float:
        """Where Q leaves zero, in the unit of the gradient."""
        return self.lam_factor * self.sigma * self.sigma

    @property
    def threshold(self) -> float:
        """g*, the largest gradient for which S is zero."""
        return threshold(self.sigma, self.lam)


@lru_cache(maxsize=256)
def threshold(sigma: float, lam: float) -> float:
    """Return g*, the largest |g| for which S(g) = 0; from 0 to ``lam`` (``methods`` 3.1).

    The root of ``2 Phi((x - lam) / sigma) + Phi((-x - lam) / sigma) = 1``, by bisection. It lies
    in [0, lam] because the left side grows with x and is at least 1 at lam; where it is that at 0
    already, g* is 0.

    Parameters
    ----------
    sigma, lam
        In the unit of the gradient; above 0, and at least 0.
    """

    def excess(x: float) -> float:
        return 2 * _normal_cdf((x - lam) / sigma) + _normal_cdf((-x - lam) / sigma) - 1

    low, high = 0.0, lam
    if excess(low) >= 0:
        return 0.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if excess(middle) <= 0:
            low = middle
        else:
            high = middle
    return low


def dead_zone(quantiser: Quantiser) -> str | None:
    """Return a warning if S swallows small gradients, ``None`` if it does not (``methods`` 3.1)."""
    if quantiser.mode != "hard" or quantiser.threshold == 0:
        return None
    return (
        f"DeadZone({quantiser.threshold:.4g}): with sigma {quantiser.sigma:g} and lam "
        f"{quantiser.lam:g}, gradients of up to g* = {quantiser.threshold:.4g} move nothing, and "
        "most are smaller; lower sigma or lam_factor until lam is below 0.4307 sigma"
    )


def quantise(values: Tensor, lam: float) -> Tensor:
    """Return Q: +1 above ``lam``, -1 below ``-lam``, 0 between and at both.

    Parameters
    ----------
    values
        Floating point, any shape.

    Returns
    -------
    Tensor
        int8, the shape of ``values``.
    """
    exact = values.double()  # in the tensor's own type lam would be rounded
    return (exact > lam).to(torch.int8) - (exact < -lam).to(torch.int8)


def smoothed(gradient: Tensor, sigma: float, lam: float) -> Tensor:
    """Return ``S(g) = sign(g) [|g| > g*]``, the most probable of Q(g + e); ties are 0.

    Parameters
    ----------
    gradient
        Floating point, any shape.

    Returns
    -------
    Tensor
        int8 in {-1, 0, 1}, the shape of ``gradient``.
    """
    return quantise(gradient, threshold(sigma, lam))


def probabilities(gradient: Tensor, sigma: float, lam: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return P(Q(g + e) = +1), = -1 and = 0; float64, the shape of ``gradient``, sum 1."""
    exact = gradient.double()
    size = exact.abs()
    plus = torch.special.ndtr((exact - lam) / sigma)
    minus = torch.special.ndtr((-exact - lam) / sigma)
    # As a difference of the two on the smaller side of the bell, it is exact where it is tiny.
    zero = torch.special.ndtr((lam - size) / sigma) - torch.special.ndtr((-lam - size) / sigma)
    return plus, minus, zero.clamp_min_(0)


def soft_mean(gradient: Tensor, sigma: float, lam: float) -> Tensor:
    """Return ``m(g) = E Q(g + e) = p_plus - p_minus``; float64 in [-1, 1], odd, increasing."""
    exact = gradient.double()
    plus: Tensor = torch.special.ndtr((exact - lam) / sigma)
    minus: Tensor = torch.special.ndtr((-exact - lam) / sigma)
    return plus - minus


def slope_at_zero(sigma: float, lam: float) -> float:
    """Return ``m'(0) = 2 / (sigma sqrt(2 pi)) exp(-lam^2 / (2 sigma^2))``, per unit of g."""
    return 2 / (sigma * math.sqrt(2 * math.pi)) * math.exp(-((lam / sigma) ** 2) / 2)


def rescaled_mean(gradient: Tensor, sigma: float, lam: float) -> Tensor:
    """Return ``m(g) / m'(0)``: g where g is small, never beyond ``1 / m'(0)``; float64."""
    return soft_mean(gradient, sigma, lam) / slope_at_zero(sigma, lam)


def direction(
    gradient: Tensor, quantiser: Quantiser, generator: torch.Generator | None = None
) -> Tensor:
    """Return what is stepped against, in the shape and type of ``gradient`` (``methods`` 3.2).

    Parameters
    ----------
    gradient
        Finite; NaN would come out as 0 and is looked for in ``directions``.
    generator
        What ``sample`` draws the noise from; the other modes draw none.

    Raises
    ------
    ParametersError
        If ``sample`` has nothing to draw from.
    """
    sigma, lam, alpha = quantiser.sigma, quantiser.lam, quantiser.alpha
    match quantiser.mode:
        case "hard":
            return smoothed(gradient, sigma, lam).to(gradient.dtype).mul_(alpha)
        case "soft":
            return rescaled_mean(gradient, sigma, lam).to(gradient.dtype)
        case "sample":
            if generator is None:
                raise ParametersError("mode sample needs a generator to draw its noise from")
            noise = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
            noisy = gradient.double() + sigma * noise.to(gradient.device)
            return quantise(noisy, lam).to(gradient.dtype).mul_(alpha)
    assert_never(quantiser.mode)


def directions(
    gradients: Parameters, quantiser: Quantiser, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Return ``direction`` of every trained tensor, in the map's order.

    Raises
    ------
    ParametersError
        If a gradient is not finite, or ``sample`` has nothing to draw from.
    """
    trained = {name: gradients[name] for name in trained_names(gradients)}
    check_finite(trained)
    return {name: direction(tensor, quantiser, generator) for name, tensor in trained.items()}


def step(
    model: Parameters,
    gradients: Parameters,
    learning_rate: float,
    quantiser: Quantiser,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Return ``w - lr u(g)``; buffers are copies of the model's.

    Parameters
    ----------
    gradients
        At least the model's trained tensors, in the same shapes and types; buffers are not read.
    learning_rate
        Above 0.

    Raises
    ------
    ParametersError
        If gradients do not fit the model, or the learning rate, a gradient or the new model is
        not a number.
    """
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise ParametersError(f"the learning rate must be a number above 0, got {learning_rate}")
    check_alike(
        {name: model[name] for name in trained_names(model)},
        {name: gradients[name] for name in trained_names(gradients)},
    )
    result = copied(model)
    for name, tensor in directions(gradients, quantiser, generator).items():
        result[name] -= learning_rate * tensor
    check_finite(result)
    return result


def _normal_cdf(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2
