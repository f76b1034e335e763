"""What can be said of a model trained by quantised gradients: three different statements.

They are those of ``methods`` 3.5, for ``unlearning.pcmu`` and ``unlearning.ffmu``. Only the second
is about whether a deletion changes the model; never report "forgotten" on the others.

(a) **Paper radius and budget (Theorem 1), per coordinate.** How far a gradient may move before its
    class does, in the papers' way, and how many samples they allow to be removed. With z = Phi^-1
    of the probabilities of the two most probable classes, L the Lipschitz constant of a sample's
    gradient in its data, T coordinates, d input dimensions and N samples,

        dPhi = z_1 - z_2           R' = sigma / 2 dPhi           R = sqrt(T) / L R'
        B' = floor(N - 36 d L^2 / (T dPhi^2)),  clipped to [0, N - 1]

    Where S is the sign and the opposite sign is the runner-up, R' = |g|: the distance to the flip.
    B' has no sigma, and with a dPhi of 1 soon allows all samples but one to be removed, so it is
    given as the papers' number and not as evidence (``methods`` 13).

(b) **Our exact one-round check.** Without n_f of its n samples a mean gradient G changes by

        |G' - G| = n_f / (n - n_f) |G - mean_f g| <= n_f / (n - n_f) (|G| + c)

    c being the largest |g| of a sample. If that is less than the distance ``||G| - g*|`` to where
    S changes, the step is the same. If it holds for every coordinate of every round, the first
    step is the same, hence the second starts from the same place, and so on: the model is the one
    that training without these samples gives, bit for bit. Nothing is assumed of the noise.

(c) **Closeness bound (Theorem 4).** ``(K - 1) C d / (sqrt(2 pi) K sigma)`` between the outputs of
    the global and of a device's model. C is the Lipschitz constant of a step function, so there is
    none; the observed one proves nothing. It compares models and says nothing about deletion.

The sums behind G are rounded, and differently for n and for n - n_f samples. (b) allows for that:
u being half the spacing of numbers at 1, a mean of n numbers up to c is computed to within n u c,
two of them to within 2 n u c, and the average of devices adds to it in the same way. Twice that is
allowed, for the rounding of the gradients themselves. What cannot be covered here is arithmetic
that is not a function of its inputs: training must be deterministic, and without dropout.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from unlearning.errors import NotCertifiedError, ParametersError
from unlearning.ffmu import average
from unlearning.parameters import (
    BUFFERS,
    Parameters,
    check_alike,
    check_finite,
    copied,
    trained_names,
)
from unlearning.pcmu import Quantiser, probabilities
from unlearning.rows import column_blocks

PAPER = "Paper radius and budget (Theorem 1), per coordinate"
EXACT = "Our exact one-round check"
CLOSENESS = "Closeness bound (Theorem 4)"

Weights = Literal["uniform", "samples"]
"""How the server averages: all devices the same, or by their samples."""
Sample = tuple[Tensor, Parameters]
"""Inputs of one sample, and the gradient of its loss."""


# ------------------------------------------------------------------ (a) paper radius and budget


def confidence_gap(gradient: Tensor, quantiser: Quantiser) -> Tensor:
    """Return ``dPhi = Phi^-1(p_A) - Phi^-1(p_B)`` of the two most probable classes.

    Parameters
    ----------
    gradient
        Floating point, any shape, finite.

    Returns
    -------
    Tensor
        float64, at least 0, the shape of ``gradient``. 0 where two classes tie.
    """
    sigma, lam = quantiser.sigma, quantiser.lam
    size = gradient.double().abs()
    towards, against = (size - lam) / sigma, (-size - lam) / sigma
    plus, minus, zero = probabilities(size, sigma, lam)
    # By way of the other two where zero is all but certain. Never more than the class next to it
    # alone would leave; that stands in for probabilities too small to be told from 0 or 1.
    most = -towards
    resting = torch.where(
        zero < 0.5, torch.special.ndtri(zero), -torch.special.ndtri(plus + minus)
    ).minimum(most)
    resting = torch.where(zero > 0, resting, most)
    best = torch.maximum(towards, resting)
    second = torch.maximum(torch.minimum(towards, resting), against)
    return best - second


def gradient_radius(gap: Tensor, sigma: float) -> Tensor:
    """Return ``R' = sigma / 2 dPhi``, in the unit of the gradient."""
    return sigma / 2 * gap


def data_radius(radius: Tensor, coordinates: int, lipschitz: float) -> Tensor:
    """Return ``R = sqrt(T) / L R'``, in the unit of the data, as we read a damaged formula."""
    return math.sqrt(coordinates) / lipschitz * radius


def budget(gap: Tensor, samples: int, dimension: int, coordinates: int, lipschitz: float) -> Tensor:
    """Return ``B' = floor(N - 36 d L^2 / (T dPhi^2))``, clipped to [0, N - 1]; int64.

    Parameters
    ----------
    gap
        dPhi, at least 0.
    samples, dimension, coordinates
        N, d and T: of the data set, of one input and of the gradient.
    lipschitz
        L, above 0, in the unit of the gradient over that of the data.
    """
    taken = 36 * dimension * lipschitz**2 / (coordinates * gap.double() ** 2)
    return (samples - taken).floor().clamp(0, samples - 1).long()


def estimated_lipschitz(pairs: Iterable[tuple[Sample, Sample]]) -> float:
    """Return the largest ``||g_i - g_j|| / ||x_i - x_j||`` of pairs of samples, such as 64.

    An estimate from below. It is infinite for a pair of equal inputs with different gradients,
    such as two labels for one picture: then there is no L.

    Raises
    ------
    ParametersError
        If no pair differs in anything.
    """
    ratios = []
    for (x, g), (y, h) in pairs:
        moved, apart = _distance(g, h), float((x.double() - y.double()).norm())
        if apart > 0 or moved > 0:
            ratios.append(moved / apart if apart > 0 else math.inf)
    if not ratios:
        raise ParametersError("a Lipschitz constant needs pairs of samples that differ; draw more")
    return max(ratios)


@dataclass(frozen=True, kw_only=True)
class PaperCertificate:
    """Statement (a) over all coordinates of one gradient."""

    gradient_radius: tuple[float, float]
    """Smallest and median R'; of an even number, the lower of the two in the middle."""
    data_radius: tuple[float, float]
    """Smallest and median R."""
    budget: tuple[int, int]
    """Smallest and median B'. The smallest is the model's, and all but surely 0."""
    removed: int
    """Samples asked about."""
    share: float
    """Share of coordinates, in [0, 1], with a budget of at least ``removed``."""
    lipschitz: float
    estimated: bool
    """Whether L was estimated from samples."""

    @property
    def statement(self) -> str:
        """All in one line."""
        return (
            f"{PAPER}: R' min {self.gradient_radius[0]:.4g}, median {self.gradient_radius[1]:.4g}; "
            f"R min {self.data_radius[0]:.4g}, median {self.data_radius[1]:.4g}; B' min "
            f"{self.budget[0]}, median {self.budget[1]}; {_percent(self.share)} of coordinates "
            f"allow {self.removed} to be removed; L = {self.lipschitz:.4g}"
            f"{' (estimated)' if self.estimated else ''}. The model's budget is the smallest of "
            "them, which is all but surely 0; this shows nothing to be forgotten"
        )


def paper_certificate(
    gradients: Parameters,
    quantiser: Quantiser,
    *,
    samples: int,
    dimension: int,
    lipschitz: float,
    removed: int,
    estimated: bool = False,
) -> PaperCertificate:
    """Return statement (a) for an average gradient.

    Parameters
    ----------
    gradients
        Finite; buffers are not read.
    samples, dimension, lipschitz
        N, d and L as in ``budget``; T is counted.
    removed
        Samples to be removed, at least 1.
    estimated
        Whether ``lipschitz`` comes from ``estimated_lipschitz``.

    Raises
    ------
    ParametersError
        If a gradient is not finite, there is none, or a number is out of range.
    """
    if not (samples >= 1 and dimension >= 1 and removed >= 1 and lipschitz > 0):
        raise ParametersError(
            "samples, dimension and removed must be at least 1 and lipschitz above 0, got "
            f"{samples}, {dimension}, {removed} and {lipschitz}"
        )
    trained = {name: gradients[name] for name in trained_names(gradients)}
    check_finite(trained)
    if not trained:
        raise ParametersError("there is no gradient to certify: every tensor is a buffer")
    gap = torch.cat([confidence_gap(tensor, quantiser).reshape(-1) for tensor in trained.values()])
    radius = gradient_radius(gap, quantiser.sigma)
    reach = data_radius(radius, gap.numel(), lipschitz)
    budgets = budget(gap, samples, dimension, gap.numel(), lipschitz)
    return PaperCertificate(
        gradient_radius=(float(radius.min()), float(radius.median())),
        data_radius=(float(reach.min()), float(reach.median())),
        budget=(int(budgets.min()), int(budgets.median())),
        removed=removed,
        share=float((budgets >= removed).double().mean()),
        lipschitz=lipschitz,
        estimated=estimated,
    )


# ---------------------------------------------------------------------- (b) exact one-round check


@dataclass(frozen=True, kw_only=True)
class Device:
    """What one device says of a round, and how many of its samples are to go."""

    gradient: Parameters
    """Gbar_k: the mean gradient of all its samples at the model that the round started from."""
    samples: int
    """n_k, at least 1."""
    removed: int = 0
    """n_f, of these, less than ``samples``."""
    largest: Parameters | float | None = None
    """c: the largest |g| of a sample, per coordinate, or one number where gradients are clipped
    to it. Needed where something is removed, and from the device itself: it is trusted."""


def check_certifiable(
    model: Parameters,
    quantiser: Quantiser,
    *,
    full: bool,
    frozen_statistics: bool = False,
) -> None:
    """Raise ``NotCertifiedError`` unless (b) can hold for a training; all reasons are told.

    Parameters
    ----------
    full
        Whether a device sends one gradient of all its samples a round.
    frozen_statistics
        Whether normalisation layers use, and do not change, statistics made without the samples.
    """
    faults = []
    if quantiser.mode != "hard":
        faults.append(f"mode must be hard, got {quantiser.mode}")
    if not full:
        faults.append("devices must send one gradient of all their samples at the round's start")
    statistics = [name for name in model if name.split(".")[-1] in BUFFERS]
    if statistics and not frozen_statistics:
        faults.append(
            f"{len(statistics)} tensors, such as {statistics[0]}, are statistics that see the data "
            "directly; freeze them or use another normalisation"
        )
    if faults:
        raise NotCertifiedError(f"{EXACT} does not apply: " + "; ".join(faults))


def margin(average_gradient: Tensor, quantiser: Quantiser) -> Tensor:
    """Return ``||G| - g*|``: how far a coordinate is from where S changes; float64."""
    return (average_gradient.double().abs() - quantiser.threshold).abs()


def change(mean_gradient: Tensor, largest: Tensor | float, removed: int, samples: int) -> Tensor:
    """Return ``n_f / (n - n_f) (|G| + c)``, the most a mean changes by; float64."""
    return removed / (samples - removed) * (mean_gradient.double().abs() + largest)


def certified(
    devices: Sequence[Device], quantiser: Quantiser, weights: Weights = "uniform"
) -> dict[str, Tensor]:
    """Return where a round's step is the same without the samples to be removed.

    What is compared is the server's average with its distance to where S changes; of one device
    alone, these are its own. ``uniform`` averages move by 1/K of what the devices' means do.
    With ``samples`` the shares change with the deletion too, and the average is simply the mean
    over all N samples of the federation: it moves by ``(n_f |G| + sum_k n_fk c_k) / (N - n_f)``.

    Where c = 0 on all devices concerned, each of their samples has a gradient of 0, such as at a
    dead unit or for a pixel that is always black. Their means are 0 with and without the deletion,
    so the average is the same however small its margin is.

    Parameters
    ----------
    devices
        Everybody in the round; at least one, and something removed from at least one.

    Returns
    -------
    dict
        Bool, per trained tensor, true where certified. For fewer samples removed it is true
        as well.

    Raises
    ------
    NotCertifiedError
        If the mode is not ``hard``, a device would lose all its samples, or one that loses
        some does not tell its largest gradient.
    ParametersError
        If gradients differ or are not finite, or a number is out of range.
    """
    _check_devices(devices, quantiser, weights)
    numbers = [float(device.samples) for device in devices] if weights == "samples" else None
    whole = average([device.gradient for device in devices], numbers)
    check_finite(whole)
    for device in devices:
        if device.removed:
            _check_largest(device, whole)
    masks = {}
    for name, mean in whole.items():
        moved, rounding, untouched = _change_of_average(name, mean, devices, weights)
        masks[name] = (moved + rounding < margin(mean, quantiser)) | untouched
    return masks


def _change_of_average(
    name: str, mean: Tensor, devices: Sequence[Device], weights: Weights
) -> tuple[Tensor, Tensor, Tensor]:
    """Return how far one tensor's average can move, what rounding can add, and where it cannot.

    Both are float64; the last is bool, true where the average is the same bits either way.
    """
    total, gone = sum(d.samples for d in devices), sum(d.removed for d in devices)
    by_samples = weights == "samples"
    moved = torch.zeros(mean.shape, dtype=torch.float64)
    if by_samples:
        moved += gone / (total - gone) * mean.double().abs()
    rounding = torch.zeros_like(moved)
    untouched = torch.ones(mean.shape, dtype=torch.bool)
    unit = torch.finfo(mean.dtype).eps / 2
    smallest = torch.finfo(mean.dtype).smallest_normal * 2 * unit  # below it is 0
    for device in devices:
        share = device.samples / (total - gone) if by_samples else 1 / len(devices)
        size, terms = device.gradient[name].double().abs(), len(devices) + 2
        if device.removed:
            bound = _bound(device, name)
            moved += (
                device.removed / (total - gone) * bound
                if by_samples
                else change(size, bound, device.removed, device.samples) / len(devices)
            )
            untouched &= bound == 0
            size, terms = bound, terms + device.samples
        elif by_samples:
            untouched &= size == 0
        rounding += 4 * terms * share * (unit * size + smallest)
    return moved, rounding, untouched


@dataclass(frozen=True, kw_only=True)
class ExactCheck:
    """Statement (b), gathered round by round."""

    certified: int = 0
    """(coordinate, round) pairs that are certified, of ``pairs``."""
    pairs: int = 0
    rounds: int = 0

    def after(self, masks: Mapping[str, Tensor]) -> "ExactCheck":
        """Return the check after one more round, with what ``certified`` says of it."""
        return ExactCheck(
            certified=self.certified + sum(int(mask.sum()) for mask in masks.values()),
            pairs=self.pairs + sum(mask.numel() for mask in masks.values()),
            rounds=self.rounds + 1,
        )

    @property
    def share(self) -> float | None:
        """Share of certified pairs, in [0, 1]; ``None`` before the first round."""
        return self.certified / self.pairs if self.pairs else None

    @property
    def complete(self) -> bool:
        """Whether all pairs are certified; false before the first round."""
        return 0 < self.pairs == self.certified

    @property
    def statement(self) -> str:
        """All in one line."""
        if self.share is None:
            return f"{EXACT}: no round was looked at, so nothing is certified"
        verdict = (
            "all: the model is the one that training without these samples gives"
            if self.complete
            else "not all: nothing is shown"
        )
        return (
            f"{EXACT}: {self.certified} of {self.pairs} (coordinate, round) pairs certified in "
            f"{self.rounds} rounds, {_percent(self.share)}; {verdict}"
        )


def answer(model: Parameters, check: ExactCheck, rounds: int) -> dict[str, Tensor]:
    """Answer a request to forget samples: the model as it is, or a refusal (``methods`` 3.6).

    Parameters
    ----------
    check
        Gathered for the samples requested, or for more of each device's.
    rounds
        Rounds that the model was trained for; all of them must have been looked at.

    Returns
    -------
    dict
        A copy of the model, which is exactly what training without the samples gives.

    Raises
    ------
    NotCertifiedError
        Unless every coordinate of every round is certified.
    """
    if check.rounds != rounds:
        raise NotCertifiedError(
            f"{EXACT} needs all {rounds} rounds of the training, and {check.rounds} were looked "
            "at; use a method that forgets"
        )
    if not check.complete:
        raise NotCertifiedError(f"{check.statement}; use a method that forgets")
    return copied(model)


def _check_devices(devices: Sequence[Device], quantiser: Quantiser, weights: Weights) -> None:
    check_certifiable({}, quantiser, full=True)
    if weights not in get_args(Weights):
        raise ParametersError(
            f"weights must be one of {', '.join(get_args(Weights))}, got {weights!r}"
        )
    for device in devices:
        if not 0 <= device.removed <= device.samples or device.samples < 1:
            raise ParametersError(
                "a device has at least one sample and loses at most all of them, got "
                f"{device.removed} of {device.samples}"
            )
        if device.removed == device.samples:
            raise NotCertifiedError(
                f"a device cannot lose all of its {device.samples} samples and stay in the "
                "average; forget the client instead"
            )
        if device.removed and device.largest is None:
            raise NotCertifiedError(
                f"{EXACT} needs the largest gradient of a sample from every device that loses "
                "some; record it in training"
            )
    if not any(device.removed for device in devices):
        raise ParametersError("no sample is to be removed, so there is nothing to certify")


def _check_largest(device: Device, whole: Parameters) -> None:
    """Raise unless c is finite, fits, and is at least |Gbar_k|, as the largest of a mean must."""
    if isinstance(device.largest, Mapping):
        largest = {name: device.largest[name] for name in trained_names(device.largest)}
        check_alike(whole, largest)
        check_finite(largest)
    for name, tensor in whole.items():
        size, bound = device.gradient[name].double().abs(), _bound(device, name)
        slack = 1 + 2 * device.samples * torch.finfo(tensor.dtype).eps
        if not bool((size <= bound * slack).all()) or not bool(torch.isfinite(bound).all()):
            raise ParametersError(
                f"tensor {name}: the largest gradient of a sample is somewhere not finite or below "
                "the mean of all samples; both must be of the same loss and the same model"
            )


def _bound(device: Device, name: str) -> Tensor:
    """Return c of one tensor, float64."""
    if isinstance(device.largest, Mapping):
        return device.largest[name].double()
    return torch.full_like(device.gradient[name], device.largest or 0.0, dtype=torch.float64)


# ---------------------------------------------------------------------------- (c) closeness bound


@dataclass(frozen=True, kw_only=True)
class Closeness:
    """Statement (c) for one round."""

    bound: float
    """On the distance of outputs, which lie in [0, 1]."""
    constant: float
    """C_obs, the largest ``||q_k - q_l|| / ||Gbar_k - Gbar_l||``: observed, not a proof."""
    distance: float
    """d, the largest ``||Gbar_k - Gbar_l||``."""
    devices: int

    @property
    def vacuous(self) -> bool:
        """Whether the bound is at least 1, and so says nothing."""
        return self.bound >= 1

    @property
    def statement(self) -> str:
        """All in one line."""
        return (
            f"{CLOSENESS}: {self.bound:.4g}{', vacuous' if self.vacuous else ''}; {self.devices} "
            f"devices, d = {self.distance:.4g}, C_obs = {self.constant:.4g} (observed, not a "
            "proof). It compares models and says nothing about deletion"
        )


def closeness(
    gradients: Sequence[Parameters], quantised: Sequence[Parameters], sigma: float
) -> Closeness:
    """Return ``(K - 1) C_obs d / (sqrt(2 pi) K sigma)``; 0 for one device (Theorem 4).

    Parameters
    ----------
    gradients, quantised
        Gbar_k and q_k = S(Gbar_k) of every device, in the same order; at least one. Takes time
        in proportion to the pairs of devices. Devices with equal gradients are left out of C_obs.
    sigma
        Above 0.

    Raises
    ------
    ParametersError
        If there are not as many of one as of the other, they differ in form, or ``sigma`` is out
        of range.
    """
    count = len(gradients)
    if not count or count != len(quantised):
        raise ParametersError(f"{count} gradients cannot be compared with {len(quantised)} steps")
    if not (math.isfinite(sigma) and sigma > 0):
        raise ParametersError(f"sigma must be a number above 0, got {sigma}")
    if count == 1:
        return Closeness(bound=0.0, constant=0.0, distance=0.0, devices=1)
    names = trained_names(gradients[0])  # of int8 steps this would be none
    apart, stepped = _pair_distances(gradients, names), _pair_distances(quantised, names)
    ratios = stepped[apart > 0] / apart[apart > 0]
    constant = float(ratios.max()) if ratios.numel() else 0.0
    distance = float(apart.max())
    return Closeness(
        bound=(count - 1) * constant * distance / (math.sqrt(2 * math.pi) * count * sigma),
        constant=constant,
        distance=distance,
        devices=count,
    )


def _pair_distances(models: Sequence[Parameters], names: Sequence[str]) -> Tensor:
    """Return the distances of all pairs over ``names``, float64, shape (K (K - 1) / 2,).

    From differences rather than inner products: C_obs is decided by pairs that are close.
    """
    check_alike(*models)
    squares = torch.zeros(len(models) * (len(models) - 1) // 2, dtype=torch.float64)
    for name in names:
        rows = torch.stack([model[name].reshape(-1) for model in models])
        for block in column_blocks(rows):
            squares += torch.pdist(block.double()).square_()
    return squares.sqrt_()


def _distance(one: Parameters, other: Parameters) -> float:
    check_alike(one, other)
    squares = (
        float((one[name].double() - other[name].double()).square().sum())
        for name in trained_names(one)
    )
    return math.sqrt(math.fsum(squares))


def _percent(share: float) -> str:
    """Return a share as text that says 100 % only of all."""
    return f"{math.floor(share * 1000) / 10:g} %"
