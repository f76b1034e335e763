"""VeriFi's marks: how a client that leaves can check that it was forgotten.

    X. Gao, X. Ma, J. Wang, Y. Sun, B. Li, S. Ji, P. Cheng, J. Chen. "VeriFi: Towards Verifiable
    Federated Unlearning." arXiv:2205.12709, 2022.

Before it leaves, a client chooses markers among its own rows and trains on them for an epoch or
two (``methods`` 2.10). Where it is forgotten, the loss on them rises again:

    max over the check window of the loss - loss after marking
        >= 1/2 (loss before marking - loss after marking)

Markers of *erroneous memory* (vEM) are rows that the model gets wrong, with the wrong class for a
label; those of *forgettable memory* (vFM) are rows whose loss went up and down. Details beyond
that are ours. Training is the caller's: here rows are chosen, relabelled, and judged by losses.

Mark with erroneous memory only where the errors come from the client's own data: where a model that
never saw it errs alike, the loss does not come back, and the check fails a server that did forget.

All three are mean losses on the markers under *global* models; see ``check``. They say whether the
marks are there, not why: what others learn meanwhile lowers the loss or overwrites the marks, also
where nothing is forgotten (``docs/methods.md``).

The check is the leaver's word: marks and losses are its own, and nothing proves them to others.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unlearning.errors import MissingNeedError, ParametersError
from unlearning.parameters import top_count, top_mask

SHARE, WINDOW, RISE = 0.1, 3, 0.5
"""Share of rows to look for markers in, rounds of the check, and the rise it wants (2.10)."""
EPOCHS, WATCHED = 2, 3
"""Epochs of marking, and rounds over which a loss varies."""
Kind = Literal["erroneous", "forgettable"]


@dataclass(frozen=True, eq=False)
class Markers:
    """Rows chosen, and what they are marked as.

    Attributes
    ----------
    rows
        Ascending indices into the client's own rows, shape (m,), m at least 1.
    labels
        One label a marker, shape (m,).
    """

    rows: Tensor
    labels: Tensor


def erroneous_memory(
    losses: Tensor, predicted: Tensor, labels: Tensor, share: float = SHARE
) -> Markers:
    """Choose vEM: of the rows with the highest losses, those wrong in the most frequent way.

    Parameters
    ----------
    losses
        Of every own row under the model before marking, shape (n,); see
        ``gradients.row_losses``.
    predicted, labels
        Classes, shape (n,).
    share
        kappa, in (0, 1]: the ``ceil(kappa n)`` highest losses are looked at.

    Returns
    -------
    Markers
        Rows that are mistaken for the class that most are mistaken for, of equally frequent ones
        the lowest; all marked as that class.

    Raises
    ------
    MissingNeedError
        If no row among them is mistaken.
    ParametersError
        If numbers of rows differ, a loss is not finite or the share is out of range.
    """
    if not len(losses) == len(predicted) == len(labels):
        raise ParametersError(
            f"{len(losses)} losses, {len(predicted)} predictions and {len(labels)} labels are not "
            "of the same rows"
        )
    wrong = _highest(losses, share) & (predicted != labels)
    if not bool(wrong.any()):
        raise MissingNeedError(
            "no row with a high loss is mistaken for another class; mark with forgettable memory"
        )
    error = predicted[wrong].mode().values
    rows = torch.nonzero(wrong & (predicted == error)).reshape(-1)
    return Markers(rows, predicted[rows].to(labels.dtype))


def forgettable_memory(losses: Tensor, labels: Tensor, share: float = SHARE) -> Markers:
    """Choose vFM: the rows whose loss varied most over the last rounds, under their own labels.

    Parameters
    ----------
    losses
        Of every own row under the models of T rounds, shape (T, n), T at least 2.
    labels
        n labels or targets.
    share
        kappa, in (0, 1]: ``ceil(kappa n)`` rows are chosen.

    Raises
    ------
    MissingNeedError
        If there are no rows, or fewer than two rounds.
    ParametersError
        If numbers of rows differ, a loss is not finite or the share is out of range.
    """
    if losses.dim() != 2 or losses.shape[1] != len(labels):
        raise ParametersError(
            f"losses of shape {tuple(losses.shape)} are not of {len(labels)} rows in some rounds"
        )
    if len(losses) < 2:
        raise MissingNeedError(f"a variance needs losses of 2 rounds, got {len(losses)}")
    if not len(labels):
        raise MissingNeedError("markers are chosen among a client's rows, and there are none")
    chosen = _highest(losses.double().var(dim=0, correction=0), share)
    rows = torch.nonzero(chosen).reshape(-1)
    return Markers(rows, labels[rows].clone())


def _highest(scores: Tensor, share: float) -> Tensor:
    if not 0 < share <= 1:
        raise ParametersError(f"the share of rows to mark must lie in (0, 1], got {share}")
    return top_mask(scores, top_count(len(scores), share))


def relabelled(labels: Tensor, markers: Markers) -> Tensor:
    """Return all own labels, those of the markers replaced by what they are marked as."""
    result = labels.clone()
    result[markers.rows] = markers.labels
    return result


@dataclass(frozen=True)
class Check:
    """What the markers say.

    Attributes
    ----------
    result
        ``pass``: the marks are forgotten. ``fail``: the window is over, and they are not.
        ``inconclusive``: the window is not over, or marking did not lower the loss, so that
        there is nothing to forget.
    rise
        Highest loss in the window less that after marking; 0 before its first round.
    needed
        Rise that passes.
    """

    result: Literal["pass", "fail", "inconclusive"]
    rise: float
    needed: float


def check(
    before: float,
    after: float,
    following: Sequence[float],
    *,
    window: int = WINDOW,
    share: float = RISE,
) -> Check:
    """Judge from mean losses on the markers, under the labels that they are marked with.

    Parameters
    ----------
    before, after
        Under the global model that marking started from, and under the first published one that
        has the marked update in it. Not under the marking client's own: averaging dilutes marks,
        and the rise over its own would pass a server that forgets nothing.
    following
        Under the global models of the rounds since the client left, in order; those past the
        window do not count.
    window
        Rounds that count, at least 1.
    share
        Part of what marking won that has to be lost again, over 0. A model that only came
        halfway back passes; one that marking changed little is easily passed by chance.

    Raises
    ------
    ParametersError
        If a loss is not finite or a number is out of range.
    """
    counted = list(following[:window])
    if not all(math.isfinite(loss) for loss in (before, after, *counted)):
        raise ParametersError(
            f"markers are judged by finite losses, got {before}, {after} and then {counted}"
        )
    if window < 1 or not share > 0:
        raise ParametersError(
            f"a check needs a window of at least 1 round and a rise over 0, got {window}, {share}"
        )
    rise, needed = max((loss - after for loss in counted), default=0.0), share * (before - after)
    if not needed > 0:
        return Check("inconclusive", rise, needed)
    if rise >= needed:
        return Check("pass", rise, needed)
    return Check("fail" if len(counted) == window else "inconclusive", rise, needed)
