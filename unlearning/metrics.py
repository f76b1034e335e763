"""Measures of a model, computed from its predictions (``methods`` 8). All lie in [0, 1]."""

from torch import Tensor


def accuracy(predicted: Tensor, targets: Tensor) -> float | None:
    """Return the share of ``predicted`` equal to ``targets``; ``None`` for no examples.

    Both are integer tensors of shape (n,).
    """
    if targets.numel() == 0:
        return None
    return float((predicted == targets).double().mean())


def forgetting_rate(before: Tensor, after: Tensor) -> float | None:
    """Return the share of rows taken for members before that are none after (``methods`` 8.11).

    Parameters
    ----------
    before, after
        Bool, shape (n,): whether a test of membership takes each row to forget for one that the
        model was trained on, before and after forgetting.

    Returns
    -------
    float
        In [0, 1]; ``None`` if no row was taken for a member before.
    """
    members = before.bool()
    if not members.any():
        return None
    return float((~after.bool()[members]).double().mean())
