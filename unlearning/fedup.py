"""FedUP: forget clients by zeroing the large weights on which the two groups disagree most.

    N. Romandini, C. Borcea, R. Montanari, L. Foschini. "FedUP: Efficient Pruning-based Federated
    Unlearning for Model Poisoning Attacks." arXiv:2508.13853, 2025.
    (Another method bears the same name: arXiv:2606.24113 is not this one.)

In the last round the clients started from ``w_prev``; the flagged ones returned models with mean
m, the others with average b. For every linear and convolutional weight tensor separately:

    dis   = (m - b)^2                    disagreement of the groups
    score = dis * |w_prev|               weighted by how much the weight matters
    zero the ceil(P n) weights of b with the highest scores (Algorithm 1)

Biases, normalisation layers and buffers stay as in b. Zeroed weights are free to grow again in
the recovery rounds among the retained clients.

Departs from the listing in one point: it multiplies by the *signed* weight, which can only select
positive ones; the text speaks of the highest magnitudes, and so do we.
"""

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from unlearning.errors import BenignMajorityError
from unlearning.parameters import (
    Parameters,
    check_alike,
    check_finite,
    mean,
    top_count,
    top_mask,
)

ADAPTIVE_MIN, ADAPTIVE_MAX, ADAPTIVE_GAMMA = 0.01, 0.15, 5.0
"""P_min, P_max and gamma of the adaptive rate (arXiv 2508.13853, eq. 3-6)."""
FALSE_POSITIVE_PERCENTILE = 0.75


def check_majority(flagged: int, participants: int) -> None:
    """Raise ``BenignMajorityError`` if more than floor((N - 1) / 2) of N are flagged."""
    most = (participants - 1) // 2
    if flagged > most:
        raise BenignMajorityError(
            f"{flagged} of {participants} participants are to be forgotten, but at most {most} can "
            "be while an honest majority remains; acquit some, or retrain without them"
        )


def disagreement(
    flagged: Parameters, retained: Parameters, names: Sequence[str]
) -> dict[str, Tensor]:
    """Return ``(m - b)^2`` for each prunable tensor."""
    return {name: (flagged[name] - retained[name]).square() for name in names}


def largest_disagreement(events: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the elementwise maximum over detections made in different rounds (``methods`` 1.5)."""
    merged = dict(events[0])
    for event in events[1:]:
        merged = {name: torch.maximum(tensor, event[name]) for name, tensor in merged.items()}
    return merged


def conflict_mask(
    disagreements: Mapping[str, Tensor], previous: Parameters, rate: float
) -> dict[str, Tensor]:
    """Choose the weights to zero: per tensor, the highest scores that are not exactly 0.

    Parameters
    ----------
    disagreements
        From ``disagreement`` or ``largest_disagreement``.
    previous
        Model that the round started from.
    rate
        Share P of each tensor, in [0, 1].

    Returns
    -------
    dict
        Bool tensors, true where a weight is to be zeroed. A weight on which the groups agree
        exactly is no evidence of conflict and is kept, whatever the rate.
    """
    masks = {}
    for name, dis in disagreements.items():
        score = dis * previous[name].abs()
        masks[name] = top_mask(score, top_count(score.numel(), rate)) & (score > 0)
    return masks


def prune(model: Parameters, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``model`` with the masked weights set to zero; every other tensor is a copy."""
    return {
        name: torch.where(masks[name], torch.zeros_like(tensor), tensor)
        if name in masks
        else tensor.clone()
        for name, tensor in model.items()
    }


def fedup(
    disagreements: Mapping[str, Tensor], previous: Parameters, retained: Parameters, rate: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Forget the clients behind ``disagreements`` (Algorithm 1, steps 3 to 5).

    Parameters
    ----------
    disagreements
        Per prunable tensor, from ``disagreement`` or ``largest_disagreement``; empty where nobody
        is to be forgotten.
    previous
        Global model that the round started from.
    retained
        Average b of the other clients, with the federation's own weights.
    rate
        Share P of each tensor to zero, in [0, 1].

    Returns
    -------
    tuple
        The pruned model, and the masks: true where a weight was zeroed.

    Raises
    ------
    ParametersError
        If models differ in names or shapes or hold NaN or Inf, or the rate is out of range.
    """
    check_alike(previous, retained)
    check_finite(previous)
    check_finite(retained)
    masks = conflict_mask(disagreements, previous, rate)
    return prune(retained, masks), masks


def similarity(vectors: Sequence[Tensor]) -> float | None:
    """Return the mean cosine over unordered pairs (SIM, eq. 5); ``None`` for fewer than two.

    Parameters
    ----------
    vectors
        Last layer of each retained client's *local model*, weight then bias, flattened. The
        cosine with a zero vector counts as 0.
    """
    if len(vectors) < 2:
        return None
    stacked = torch.stack([v.double() for v in vectors])
    norms = stacked.norm(dim=1, keepdim=True)
    unit = torch.where(norms > 0, stacked / norms.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    cosines = unit @ unit.T
    upper = torch.triu_indices(len(vectors), len(vectors), offset=1)
    return float(cosines[upper[0], upper[1]].mean())


def adaptive_rate(
    sim: float,
    *,
    smallest: float = ADAPTIVE_MIN,
    largest: float = ADAPTIVE_MAX,
    gamma: float = ADAPTIVE_GAMMA,
) -> float:
    """Return the pruning rate for a similarity of the retained clients (eq. 3-6).

    ``z = clip((SIM - 0.5) / 0.5, 0, 1)``, ``P = (P_max - P_min) z^gamma + P_min``: the more alike
    honest clients are, the more a disagreement with them means, and the more may be cut.
    """
    z = min(max((sim - 0.5) / 0.5, 0.0), 1.0)
    return (largest - smallest) * math.pow(z, gamma) + smallest


def mean_score(
    model: Parameters, reference: Parameters, previous: Parameters, names: Sequence[str]
) -> float:
    """Return the mean conflict score of a model against a reference, over prunable weights."""
    total = sum(
        float(((model[n] - reference[n]).square() * previous[n].abs()).double().sum())
        for n in names
    )
    return total / sum(previous[name].numel() for name in names)


def conflict_percentiles(
    locals_: Mapping[str, Parameters],
    previous: Parameters,
    flagged: Collection[str],
    names: Sequence[str],
) -> dict[str, float]:
    """Return, per flagged client, the share of retained clients with a lower conflict score.

    Each retained client is compared to the mean of the other retained ones, so that nobody is
    compared to itself (``methods`` 1.6). A value below ``FALSE_POSITIVE_PERCENTILE`` suggests
    that the client was flagged by mistake.
    """
    others = sorted(locals_.keys() - set(flagged))
    if len(others) < 2:
        return {}
    average = mean([locals_[client] for client in others])
    count = len(others)
    left_out = []
    for client in others:
        # mean of the others without this one: (n * mean - own) / (n - 1)
        rest = {n: (average[n] * count - locals_[client][n]) / (count - 1) for n in names}
        left_out.append(mean_score(locals_[client], rest, previous, names))
    return {
        client: sum(
            score < mean_score(locals_[client], average, previous, names) for score in left_out
        )
        / count
        for client in sorted(flagged)
    }
