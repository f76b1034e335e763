"""A simple attack: who has a small loss was trained on."""

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor


def attack_auc(members: Tensor, others: Tensor) -> float:
    """Return the area under the curve of an attack that takes small losses for members.

    Parameters
    ----------
    members, others
        Loss of each row that was trained on, and of each that was not; at least one of either.

    Returns
    -------
    float
        In [0, 1]; 0.5 is a guess.
    """
    truth = [1] * len(members) + [0] * len(others)
    return float(roc_auc_score(truth, torch.cat([-members, -others]).numpy()))
