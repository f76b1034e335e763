"""Measures of a model, computed from its predictions (``methods`` 8). All lie in [0, 1]."""

from torch import Tensor


def accuracy(predicted: Tensor, targets: Tensor) -> float | None:
    """Return the share of ``predicted`` equal to ``targets``; ``None`` for no examples.

    Both are integer tensors of shape (n,).
    """
    if targets.numel() == 0:
        return None
    return float((predicted == targets).double().mean())
