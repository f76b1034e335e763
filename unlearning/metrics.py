"""Measures of a model, computed from its predictions (``methods`` 8). All lie in [0, 1]."""

from torch import Tensor


def accuracy(predicted: Tensor, targets: Tensor) -> float | None:
    """Return the share of ``predicted`` equal to ``targets``; ``None`` for no examples.

    Both are integer tensors of shape (n,).
    """
    if targets.numel() == 0:
        return None
    return float((predicted == targets).double().mean())


def attack_success(predicted: Tensor, true_labels: Tensor, target: int) -> float | None:
    """Return the backdoor success rate on triggered inputs (``methods`` 8, item 3).

    The share of inputs whose true label is not the target and that are predicted as the target.
    Inputs of the target class are left out: predicting them so is no success of the attack.

    Parameters
    ----------
    predicted, true_labels
        Predictions on *triggered* test inputs, and the inputs' true labels; shape (n,).
    target
        Class that the trigger is meant to produce.
    """
    sources = true_labels != target
    if not bool(sources.any()):
        return None
    return float((predicted[sources] == target).double().mean())
