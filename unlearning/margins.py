"""What is kept of a training so that any later request for samples can be answered.

``certificates.certified`` looks at one request, and at every device's gradient. Here it is turned
around: a round is looked at once, when nobody knows who will ask for what. Device k of K has n_k
samples, of which n_fk are to go; no entry of any sample's gradient is larger than c. The average
moves by at most

    (1/K) sum_k n_fk / (n_k - n_fk) (|G_k| + c)  <=  load / K (max_k |G_k| + c)
    load = sum_k n_fk / (n_k - n_fk)

so a coordinate with the margin m keeps its step if

    load < reach = K (m - r) / (max_k |G_k| + c)

r being what rounding can do. The load is the request's alone and the reach the round's alone, and
what is certified for a load is certified for every smaller one: the smallest reach says for which
requests the model stays as it is, and the numbers of reaches between certain steps what share of
the (coordinate, round) pairs is certified otherwise. No tensor is kept.

Little is lost: with one device the bound is that of ``certified``, and with more c is what counts,
being much larger than any mean.

Where no sample of any device moves a coordinate, its mean is 0 with and without the deletion, and
the reach is infinite. That takes more than a mean of 0, in which samples may cancel out, so devices
tell how often that happens.

r is as in ``certificates``, for all samples and for gradients that travel as ``w - G``: a mean of n
numbers is computed to within n u c, the average adds its own terms, and reading ``w - G`` up to
2 u (|w| + c), u being half the spacing of numbers at 1. Twice that is allowed, each way.
"""

import bisect
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unlearning.certificates import Device, ExactCheck, margin
from unlearning.distillation import Forward, Loss
from unlearning.errors import MissingNeedError, NotCertifiedError, ParametersError
from unlearning.ffmu import average
from unlearning.gradients import check_rows, per_sample_gradients
from unlearning.parameters import Parameters, check_finite, trained_names
from unlearning.pcmu import Quantiser

CHUNK = 64
"""Rows whose gradients are held at once."""
EDGES = torch.cat(
    [torch.logspace(-12, 4, 16 * 8 + 1, dtype=torch.float64), torch.tensor([math.inf])]
)
"""Between which reaches are counted: eight steps a power of ten, and the infinite ones."""


# ------------------------------------------------------------------------------------ on a device


@dataclass(frozen=True)
class Bounded:
    """One device's gradient, and what the check needs to know of it."""

    gradient: dict[str, Tensor]
    """Mean over the samples."""
    largest: float
    """c: no entry of a sample's gradient is larger."""
    cancelled: int
    """Coordinates that some sample moves though their mean is 0."""


def bounded_gradient(
    model: Parameters,
    forward: Forward,
    loss: Loss,
    inputs: Tensor,
    targets: Tensor,
    *,
    clip: float = math.inf,
) -> Bounded:
    """Return the mean gradient of all samples, each clipped entry by entry.

    Parameters
    ----------
    forward
        Of a network in evaluation mode: nothing may be drawn at random or tie rows together.
    inputs, targets
        n rows each, at least one; their order has no meaning.
    clip
        Bound c, above 0. Infinite, nothing is clipped and c is the largest entry there is.

    Raises
    ------
    MissingNeedError
        If there are no rows.
    ParametersError
        If rows do not match, the bound is out of range, or a gradient is not finite.
    """
    return bounded_gradients(model, forward, loss, [(inputs, targets)], clip=clip)[0]


def bounded_gradients(
    model: Parameters,
    forward: Forward,
    loss: Loss,
    held: Sequence[tuple[Tensor, Tensor]],
    *,
    clip: float = math.inf,
) -> list[Bounded]:
    """Return the ``bounded_gradient`` of several devices at the same model.

    A row's gradient is that of the row alone, whoever holds it: computed with others' rows it
    differs by rounding. Of one device nothing differs.

    Parameters
    ----------
    held
        Inputs and targets of each device, at least one row each.

    Raises
    ------
    MissingNeedError, ParametersError
        As ``bounded_gradient``; one device's fault is everybody's.
    """
    for inputs, targets in held:
        check_rows(inputs, targets)
    if not all(len(inputs) for inputs, _ in held):
        raise MissingNeedError("a gradient needs at least one row of data, and there are none")
    if not clip > 0:
        raise ParametersError(f"the bound on a gradient's entries must be above 0, got {clip}")
    inputs, targets = (torch.cat(parts) for parts in zip(*held, strict=True))
    ends = list(itertools.accumulate(len(own) for own, _ in held))
    found = [_Sums(model, end - len(own)) for end, (own, _) in zip(ends, held, strict=True)]
    for start in range(0, len(inputs), CHUNK):
        stop = min(start + CHUNK, len(inputs))
        gradients = per_sample_gradients(
            model, forward, loss, inputs[start:stop], targets[start:stop]
        )
        check_finite(gradients)
        first, last = bisect.bisect_right(ends, start), bisect.bisect_left(ends, stop)
        for sums, end in zip(found[first : last + 1], ends[first : last + 1], strict=True):
            own = slice(max(sums.begin, start) - start, min(end, stop) - start)
            sums.add({name: single[own] for name, single in gradients.items()}, clip)
    return [sums.bounded(end - sums.begin, clip) for sums, end in zip(found, ends, strict=True)]


class _Sums:
    """What one device's samples add up to, whose rows begin at ``begin`` among all."""

    def __init__(self, model: Parameters, begin: int) -> None:
        names = trained_names(model)
        self.begin = begin
        self._types = {name: model[name].dtype for name in names}
        self._total = {name: torch.zeros_like(model[name], dtype=torch.float64) for name in names}
        self._moved = {name: torch.zeros_like(model[name], dtype=torch.bool) for name in names}
        self._largest = 0.0

    def add(self, gradients: Parameters, clip: float) -> None:
        """Add gradients of single samples, shape (n, ...)."""
        for name, single in gradients.items():
            held = single.clamp(-clip, clip) if clip < math.inf else single
            self._total[name] += held.sum(dim=0)
            size = held.abs().amax(dim=0)
            self._moved[name] |= size > 0
            self._largest = max(self._largest, float(size.max()))

    def bounded(self, samples: int, clip: float) -> Bounded:
        """Return the mean over so many samples."""
        gradient = {
            name: (total / samples).to(self._types[name]) for name, total in self._total.items()
        }
        cancelled = sum(int((self._moved[n] & (gradient[n] == 0)).sum()) for n in gradient)
        return Bounded(gradient, self._largest if clip == math.inf else clip, cancelled)


# ---------------------------------------------------------------------------------- on the server


def load(removals: Iterable[tuple[int, int]]) -> float:
    """Return ``sum_k n_fk / (n_k - n_fk)`` of a request; above 0.

    Parameters
    ----------
    removals
        (n_fk, n_k) of every device that loses samples.

    Raises
    ------
    NotCertifiedError
        If a device would lose all it has.
    ParametersError
        If a number is out of range or nothing is removed.
    """
    total = 0.0
    for removed, samples in removals:
        if not 0 <= removed <= samples or samples < 1:
            raise ParametersError(
                "a device has at least one sample and loses at most all of them, got "
                f"{removed} of {samples}"
            )
        if removed == samples:
            raise NotCertifiedError(
                f"a device cannot lose all of its {samples} samples and stay in the average; "
                "forget the client instead"
            )
        total += removed / (samples - removed)
    if not total:
        raise ParametersError("no sample is to be removed, so there is nothing to certify")
    return total


def reach(
    model: Parameters, devices: Sequence[Device], quantiser: Quantiser, *, cancelled: bool = False
) -> Tensor:
    """Return, per coordinate of a round, the load below which the step stays the same.

    Parameters
    ----------
    model
        w^(t-1), which gradients came with as ``w - G``.
    devices
        Everybody in the round, at least one, with ``largest`` as one number; ``removed`` is not
        read. They count the same in the average.
    quantiser
        The server's.
    cancelled
        Whether samples cancel out somewhere, so that a mean of 0 does not say that none moves it.

    Returns
    -------
    Tensor
        float64, shape (P,), in the order of the trained tensors. Not above 0 where not even the
        smallest deletion is certified, infinite where none changes anything.

    Raises
    ------
    ParametersError
        If gradients differ in form or are not finite, or a device has no samples, or a c that is
        no number or smaller than its mean.
    """
    if fewest := [device.samples for device in devices if device.samples < 1]:
        raise ParametersError(f"a device has at least one sample, got {fewest[0]}")
    whole = average([device.gradient for device in devices])
    check_finite(whole)
    count, samples = len(devices), max(device.samples for device in devices)
    largest = max(_largest(device) for device in devices)
    parts = []
    for name, mean in whole.items():
        unit = torch.finfo(mean.dtype).eps / 2
        smallest = torch.finfo(mean.dtype).smallest_normal * 2 * unit  # below it is 0
        weight = model[name].double().abs()
        size = torch.zeros_like(weight)
        for device in devices:
            own = device.gradient[name].double().abs()
            slack = 4 * unit * (device.samples * _largest(device) + weight) + 4 * smallest
            if not bool((own <= _largest(device) + slack).all()):
                raise ParametersError(
                    f"tensor {name}: a device's mean gradient is larger than what it says is the "
                    "largest of a sample"
                )
            size = torch.maximum(size, own)
        summing = 4 * (count + 2 + samples) * (unit * largest + smallest)
        rounding = summing + 8 * (unit * (weight + largest) + smallest)
        found = count * (margin(mean, quantiser) - rounding) / (size + largest).clamp_min(smallest)
        if not cancelled:
            found[size == 0] = math.inf
        parts.append(found.reshape(-1))
    return torch.cat(parts)


def _largest(device: Device) -> float:
    """Return a device's c."""
    found = device.largest
    if not isinstance(found, int | float) or not (math.isfinite(found) and found >= 0):
        raise ParametersError(
            f"a device must tell the largest gradient of a sample as one number, got {found!r}"
        )
    return float(found)


@dataclass(frozen=True, kw_only=True)
class Margins:
    """Reaches of all rounds so far, as numbers of (coordinate, round) pairs."""

    counts: tuple[int, ...] = (0,) * (len(EDGES) + 1)
    """Pairs below the first edge, from each edge to the next, and from the last on."""
    lowest: float = math.inf
    """The smallest reach: requests with a smaller load leave the model as it is."""
    rounds: int = 0

    def after(self, reaches: Tensor) -> "Margins":
        """Return the margins after one more round, with what ``reach`` says of it."""
        places = torch.bucketize(reaches.double().cpu(), EDGES, right=True)
        added = torch.bincount(places, minlength=len(self.counts)).tolist()
        return Margins(
            counts=tuple(old + new for old, new in zip(self.counts, added, strict=True)),
            lowest=min(self.lowest, float(reaches.min()) if reaches.numel() else math.inf),
            rounds=self.rounds + 1,
        )

    def check(self, asked: float) -> ExactCheck:
        """Return the check of a request.

        Parameters
        ----------
        asked
            ``load`` of the request, above 0.

        Returns
        -------
        ExactCheck
            Complete if and only if the load is below every reach. Otherwise pairs are counted from
            the next edge on, so that some with a reach of up to 4/3 of the load are passed over:
            at least as many as it says are certified.
        """
        pairs = sum(self.counts)
        first = int(torch.bucketize(torch.tensor(asked, dtype=torch.float64), EDGES, right=True))
        certified = pairs if asked < self.lowest else sum(self.counts[first + 1 :])
        return ExactCheck(certified=certified, pairs=pairs, rounds=self.rounds)
