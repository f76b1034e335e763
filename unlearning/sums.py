"""Sums over samples that clients send and the server adds up.

A client answers with a sum per tensor and the number of samples in it (``methods`` 5.7). Sums add,
so the server learns no more than the total where aggregation is secure, and one total is as good
as one data set:

    mean = sum_k U_k / sum_k a_k

Nothing proves that a client's sums are true. ``check_statistics`` refuses what no data could give,
and ``clipped_to_median`` bounds how far one liar can pull.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unlearning.errors import MissingNeedError, ParametersError
from unlearning.parameters import Parameters, check_finite

CLIP = 10.0
"""How many times the median over clients an average may be (``methods`` 5.7)."""


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


def clipped_to_median(parts: Sequence[Statistics], factor: float = CLIP) -> list[Statistics]:
    """Return every client's statistics with its averages clipped (``methods`` 5.7).

    No coordinate of ``|U_k / a_k|`` may exceed ``factor`` times its median over the clients that
    have samples; of two medians the lower. A liar among more than two then weighs as much as an
    extreme honest client with its number of samples. Where most clients' averages are 0 all are
    clipped to it, and a client that is the only one with samples is believed.

    Parameters
    ----------
    parts
        Checked before.
    factor
        At least 1.

    Raises
    ------
    ParametersError
        If the factor is out of range.
    """
    if not (math.isfinite(factor) and factor >= 1):
        raise ParametersError(f"averages are clipped at 1 or more medians, got {factor}")
    telling = [part for part in parts if part.count]
    if not telling:
        return list(parts)
    limits = {
        name: factor
        * torch.stack([part.sums[name].abs() / part.count for part in telling]).median(0)[0]
        for name in telling[0].sums
    }
    return [
        Statistics(
            {
                name: tensor.clamp(-limits[name] * part.count, limits[name] * part.count)
                for name, tensor in part.sums.items()
            },
            part.count,
        )
        for part in parts
    ]
