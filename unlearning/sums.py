"""Sums over samples that clients send and the server adds up.

A client answers with a sum per tensor and the number of samples in it (``methods`` 5.7). Sums add,
so the server learns no more than the total where aggregation is secure, and one total is as good
as one data set:

    mean = sum_k U_k / sum_k a_k

Nothing proves that a client's sums are true. ``check_statistics`` refuses what no data could give,
``limited`` and ``undiluted`` bound what a claimed number of samples weighs, and
``clipped_to_median`` and ``clipped_by_norm`` how far one liar can pull.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median_low

import torch
from torch import Tensor

from unlearning.errors import MissingNeedError, ParametersError
from unlearning.parameters import STRETCH, Parameters, check_finite

CLIP = 10.0
"""How many times the median over clients an average may be (``methods`` 5.7)."""
COMPARABLE = 3
"""Clients with samples from which on one can stand out from the others."""


@dataclass(frozen=True)
class Statistics:
    """What some samples add up to.

    Attributes
    ----------
    sums
        Name -> sum over the samples, floating-point.
    count
        Number of samples, at least 0.
    """

    sums: Parameters
    count: int


def check_statistics(
    found: Statistics, like: Parameters, *, most: int | None = None, signed: bool = False
) -> None:
    """Refuse statistics that cannot be a sum over samples.

    Parameters
    ----------
    like
        Tensors of the names and shapes expected.
    most
        Largest number of samples that the client can have, where it is known. Without it, a
        count alone can outweigh all others.
    signed
        Whether sums may be negative; squares and activations after a ReLU may not.

    Raises
    ------
    ParametersError
        If names or shapes differ, a sum is negative, NaN or Inf, the count is no whole number of
        at least 0 or too large, or sums of no samples are not 0.
    """
    count = found.count
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ParametersError(f"a number of samples is a whole number of at least 0, got {count}")
    if most is not None and count > most:
        raise ParametersError(f"statistics claim {count} samples, and there are at most {most}")
    if found.sums.keys() != like.keys():
        differing = ", ".join(sorted(found.sums.keys() ^ like.keys()))
        raise ParametersError(f"statistics differ in their tensors: {differing}")
    check_finite(found.sums)
    for name, tensor in found.sums.items():
        if tensor.shape != like[name].shape or not tensor.is_floating_point():
            raise ParametersError(
                f"sums of {name} are {tuple(tensor.shape)} {tensor.dtype}, and floating-point "
                f"numbers of shape {tuple(like[name].shape)} are expected"
            )
        if not signed and bool((tensor < 0).any()):
            raise ParametersError(f"sums of {name} are negative, and what they add is not")
        if count == 0 and bool(tensor.any()):
            raise ParametersError(f"sums of {name} are over no samples, and are not 0")


def added(parts: Iterable[Statistics]) -> Statistics:
    """Return the statistics of all samples together; at least one part, all checked before.

    Sums are added in float64 and have the first part's dtypes.
    """
    found = list(parts)
    if not found:
        raise MissingNeedError("statistics of no clients cannot be added")
    first = found[0].sums
    sums = {}
    for name in first:
        total = first[name].double()
        for part in found[1:]:
            total = total + part.sums[name].double()
        sums[name] = total.to(first[name].dtype)
    return Statistics(sums, sum(part.count for part in found))


def means(total: Statistics) -> dict[str, Tensor]:
    """Return the averages over the samples.

    Raises
    ------
    MissingNeedError
        If there are no samples.
    """
    if total.count == 0:
        raise MissingNeedError("an average needs at least one sample, and no client has any")
    return {name: tensor / total.count for name, tensor in total.sums.items()}


def limited(part: Statistics, most: float) -> Statistics:
    """Return statistics of the same averages that weigh no more than ``most`` samples.

    Parameters
    ----------
    most
        At least 1; rounded down.
    """
    if part.count <= most:
        return part
    count = math.floor(most)
    share = count / part.count
    return Statistics({name: tensor * share for name, tensor in part.sums.items()}, count)


# ---------------------------------------------------------------- liars


def undiluted(parts: Sequence[Statistics], factor: float = CLIP) -> list[Statistics]:
    """Return statistics of which none far below the others weighs much.

    Sums near 0 that are claimed of many samples take nothing from the others', but dilute
    everybody's average, which clipping does not see. Where the norm of ``U_k / a_k`` is less than
    its median, weighted as in ``clipped_to_median``, over ``factor``, a client counts at most
    as many samples as the median client. Others count in full: who has most of a
    class is no liar. Fewer than ``COMPARABLE`` clients with samples are returned as they are.

    Raises
    ------
    ParametersError
        If the factor is out of range.
    """
    telling = _telling(parts, factor)
    if len(telling) < COMPARABLE:
        return list(parts)
    least = _median_norm(telling) / factor
    limit = median_low(part.count for part in telling)
    return [limited(p, limit) if p.count and _norm(p) < least * p.count else p for p in parts]


@dataclass(frozen=True)
class Clipped:
    """Clients' statistics after clipping."""

    parts: list[Statistics]
    """In the order given."""
    share: float
    """Of the mass ``sum |U|`` over clients and entries, what was clipped; in [0, 1]."""
    compared: int
    """Clients that have samples; with fewer than ``COMPARABLE`` nothing is clipped."""


def clipped_to_median(parts: Sequence[Statistics], factor: float = CLIP) -> Clipped:
    """Return every client's statistics with its averages clipped (``methods`` 5.7).

    No entry of ``|U_k / a_k|`` may exceed ``factor`` times its median over the clients that have
    samples. In that median a client weighs as many samples as it has, but no more than the median
    client; of two medians the lower counts. Where more than half of that weight is at 0, which is
    usual where many have few samples, the bound is ``factor`` times what a positive average of the
    tensor usually is: the median over clients of the median over their positive entries.

    A liar among three or more then adds as much as an extreme honest client with its number of
    samples, and cannot take anything away from the others' sums. One or two clients cannot be
    held against one another: they are believed.

    Parameters
    ----------
    parts
        Checked before; their order does not matter.
    factor
        At least 1.

    Raises
    ------
    ParametersError
        If the factor is out of range.
    """
    telling = _telling(parts, factor)
    if len(telling) < COMPARABLE:
        return Clipped(list(parts), 0.0, len(telling))
    weights = _weights(telling)
    limits = {}
    for name in telling[0].sums:
        averages = [part.sums[name].abs().reshape(-1) / part.count for part in telling]
        middle = torch.cat(
            [
                weighted_median(torch.stack(columns), weights)
                for columns in zip(*(torch.split(a, STRETCH) for a in averages), strict=True)
            ]
        )
        usual = _usual(averages, weights)
        limit = factor * torch.where(middle > 0, middle, usual)
        limits[name] = limit.reshape(telling[0].sums[name].shape)
    found = [
        Statistics(
            {
                name: tensor.clamp(-limits[name] * part.count, limits[name] * part.count)
                for name, tensor in part.sums.items()
            },
            part.count,
        )
        for part in parts
    ]
    return Clipped(found, _lost(parts, found), len(telling))


def clipped_by_norm(parts: Sequence[Statistics], factor: float = CLIP) -> Clipped:
    """Return every client's statistics shortened, so that no average is far longer than others.

    The norm over all tensors of ``U_k / a_k`` may be ``factor`` times its median, weighted as in
    ``clipped_to_median``. Directions stay, and so do eigenvalues' signs: for gradients and
    Hessians, whose entries mean nothing one by one.

    Raises
    ------
    ParametersError
        If the factor is out of range.
    """
    telling = _telling(parts, factor)
    if len(telling) < COMPARABLE:
        return Clipped(list(parts), 0.0, len(telling))
    limit = factor * _median_norm(telling)
    found = []
    for part in parts:
        norm = _norm(part)
        share = min(1.0, limit * part.count / norm) if norm else 1.0
        found.append(
            Statistics({name: tensor * share for name, tensor in part.sums.items()}, part.count)
        )
    return Clipped(found, _lost(parts, found), len(telling))


def weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    """Return, column by column, the lowest value up to which half of the weight lies.

    Parameters
    ----------
    values
        Shape (k, n), k at least 1.
    weights
        Shape (k,), over 0.

    Returns
    -------
    Tensor
        Shape (n,).
    """
    ordered, places = values.sort(dim=0)
    reached = weights[places].cumsum(dim=0)
    first = (2 * reached >= weights.sum()).to(torch.uint8).argmax(dim=0)
    return ordered.gather(0, first.unsqueeze(0)).squeeze(0)


def _telling(parts: Sequence[Statistics], factor: float) -> list[Statistics]:
    """Return the parts that have samples, once the factor is seen to be in range."""
    if not (math.isfinite(factor) and factor >= 1):
        raise ParametersError(f"averages are clipped at 1 or more medians, got {factor}")
    return [part for part in parts if part.count]


def _weights(telling: Sequence[Statistics]) -> Tensor:
    """Return what clients weigh in a median: one among three never weighs half."""
    most = median_low(part.count for part in telling)
    return torch.tensor([min(part.count, most) for part in telling], dtype=torch.float64)


def _usual(averages: Sequence[Tensor], weights: Tensor) -> float:
    """Return what a positive average usually is; 0 where there is none."""
    positive = [(average[average > 0], weight) for average, weight in
                zip(averages, weights, strict=True)]  # fmt: skip
    medians = [(found.median(), weight) for found, weight in positive if len(found)]
    if not medians:
        return 0.0
    values, those = (torch.stack(column) for column in zip(*medians, strict=True))
    return float(weighted_median(values.unsqueeze(1), those))


def _median_norm(telling: Sequence[Statistics]) -> float:
    """Return the median length of an average; of those over 0 where the median is 0."""
    norms = torch.tensor([_norm(part) / part.count for part in telling], dtype=torch.float64)
    weights = _weights(telling)
    middle = float(weighted_median(norms.unsqueeze(1), weights))
    return middle or _usual([norm.reshape(1) for norm in norms], weights)


def _norm(part: Statistics) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in part.sums.values()))


def _mass(parts: Sequence[Statistics]) -> float:
    return sum(float(t.double().abs().sum()) for part in parts for t in part.sums.values())


def _lost(before: Sequence[Statistics], after: Sequence[Statistics]) -> float:
    whole = _mass(before)
    return max(0.0, 1 - _mass(after) / whole) if whole > 0 else 0.0
