"""Masking before fine-tuning: zero the share of a model that scores highest, then train on.

Paper 001 (``methods`` 5). A method scores weights, ``unlearning.fisher``, or whole channels,
``unlearning.channel_masks``; here is what all have in common: the choice by score, the random
baseline, the learning rates of the epochs that follow, and how steady accuracy is meanwhile.
Masked weights are zeroed once, by ``unlearning.fedup.prune``, and may grow again.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from unlearning.errors import ParametersError
from unlearning.parameters import Parameters, top_count, top_mask
from unlearning.partial_updates import layers

Scope = Literal["model", "layer", "tensor"]
"""Among what the share is chosen: all scores, those of a layer (weight and bias together, told by
the names), or those of one tensor."""

TUNED = 5
"""Epochs S of fine-tuning after a mask."""
SMALL, USUAL = 0.02, 0.04
"""Shares R to mask: for CIFAR, and for MNIST and Tiny-ImageNet (``methods`` 5.1)."""


def top_share(
    scores: Mapping[str, Tensor], rate: float, scope: Scope = "model"
) -> dict[str, Tensor]:
    """Choose the highest scores: ``ceil(R n)`` of the n in each scope.

    Parameters
    ----------
    scores
        Name -> scores, finite, of any shape. Of equal ones those of earlier tensors go first, and
        in a tensor those with the lower row-major index.
    rate
        Share R, in [0, 1].

    Returns
    -------
    dict
        Bool tensors of the scores' shapes, true where a score is chosen.

    Raises
    ------
    ParametersError
        If scores are not finite or the rate is out of range.
    """
    match scope:
        case "model":
            groups: list[tuple[str, ...]] = [tuple(scores)]
        case "layer":
            groups = list(layers(scores).values())
        case "tensor":
            groups = [(name,) for name in scores]
    chosen: dict[str, Tensor] = {}
    for names in groups:
        if names:
            together = torch.cat([scores[name].reshape(-1) for name in names])
            mask = top_mask(together, top_count(together.numel(), rate))
            parts = torch.split(mask, [scores[name].numel() for name in names])
            chosen.update(
                {
                    name: part.reshape(scores[name].shape)
                    for name, part in zip(names, parts, strict=True)
                }
            )
    return {name: chosen[name] for name in scores}


def says_nothing(scores: Mapping[str, Tensor]) -> bool:
    """Return whether all scores are equal, so that ties alone decide what is masked.

    So it is where forgotten and remaining data are the same; worth a warning.
    """
    lowest = min((float(t.min()) for t in scores.values() if t.numel()), default=0.0)
    highest = max((float(t.max()) for t in scores.values() if t.numel()), default=0.0)
    return lowest == highest


def random_mask(like: Parameters, rate: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Return RandomMask, ``ceil(R P)`` of all P entries drawn uniformly (``methods`` 5.4).

    Parameters
    ----------
    like
        What may be masked: a model's trained tensors, or scores of channels.
    """
    size = sum(tensor.numel() for tensor in like.values())
    order = torch.randperm(size, generator=generator)
    # Ranks as negative scores: of a permutation, each subset is as likely.
    parts = torch.split(-order, [tensor.numel() for tensor in like.values()])
    return top_share(
        {
            name: part.reshape(tensor.shape)
            for (name, tensor), part in zip(like.items(), parts, strict=True)
        },
        rate,
    )


def replayed_rate(
    epoch: float,
    first: float,
    milestones: Sequence[float],
    factor: float,
    original: float,
    budget: float,
) -> float:
    """Return the learning rate of a training replayed in fewer epochs (``methods`` 5).

    ``lr'(u) = lr(u T / S)``: milestones at 80 and 120 of T = 160 epochs are at 2.5 and 3.75 of
    S = 5. To be asked at every step, since milestones need not fall between epochs.

    Parameters
    ----------
    epoch
        Epochs u since fine-tuning began, with fractions, at least 0; past the budget the last
        rate stays.
    first, milestones, factor
        Of the original training: its first rate, the epochs from which on it is multiplied by
        the factor once more.
    original, budget
        Epochs T of that training and S of this one, over 0.

    Raises
    ------
    ParametersError
        If a number is out of range.
    """
    if not (epoch >= 0 and original > 0 and budget > 0):
        raise ParametersError(
            f"epoch {epoch} of {budget} cannot replay {original}: an epoch must be at least 0 and "
            "both lengths over 0"
        )
    then = min(epoch, budget) * original / budget
    return first * math.prod(factor for milestone in milestones if then >= milestone)


def volatility_net(accuracies: Sequence[float]) -> float | None:
    """Return the volatility that paper 001 prints (``methods`` 5.8).

    ``sum_t (Acc_t - Acc_(t-1)) / (T - 1)`` telescopes: it is the net change per epoch, whatever
    happened on the way. Its sign is opposite for remaining and forgotten data.

    Parameters
    ----------
    accuracies
        After each of T epochs. Fewer than two have no volatility.
    """
    if len(accuracies) < 2:
        return None
    return (accuracies[-1] - accuracies[0]) / (len(accuracies) - 1)


def volatility_abs(accuracies: Sequence[float]) -> float | None:
    """Return the mean of ``|Acc_t - Acc_(t-1)|``, which is what volatility means (5.8)."""
    if len(accuracies) < 2:
        return None
    pairs = zip(accuracies[1:], accuracies[:-1], strict=True)
    return sum(abs(after - before) for after, before in pairs) / (len(accuracies) - 1)
