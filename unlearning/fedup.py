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
positive ones; the text speaks of the highest magnitudes, and so do we. The listing's score and the
paper's ablations are there for comparison, as ``Score``.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, assert_never

import torch
from torch import Tensor

from unlearning.errors import BenignMajorityError, ParametersError
from unlearning.parameters import (
    STRETCH,
    Parameters,
    check_alike,
    check_finite,
    stretches,
    top_count,
    top_mask,
)

Score = Literal["abs", "signed", "diff", "malmag", "random", "natural"]
"""What ranks the weights (``methods`` 1.7): ``dis |w_prev|``, the default; ``dis w_prev``, the
listing taken literally; ``dis``; ``|m|``; a uniform draw; nothing, which zeroes none."""

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
    """Return ``(m - b)^2`` for each tensor in ``names``.

    Only these tensors are ever pruned. They are the prunable weights; whoever wants biases pruned
    as well names them here.
    """
    return {name: (flagged[name] - retained[name]).square_() for name in names}


def largest_disagreement(events: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the elementwise maximum over detections made in different rounds (``methods`` 1.5)."""
    merged = dict(events[0])
    for event in events[1:]:
        merged = {name: torch.maximum(tensor, event[name]) for name, tensor in merged.items()}
    return merged


def conflict_mask(
    disagreements: Mapping[str, Tensor],
    previous: Parameters,
    rate: float,
    *,
    score: Score = "abs",
    flagged: Parameters | None = None,
    generator: torch.Generator | None = None,
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
    score
        What ranks the weights. All but ``natural`` zero exactly as many weights of each tensor
        as ``abs`` does, so that they differ in the choice alone (``methods`` 1.7).
    flagged
        Mean model m of the flagged clients; ``malmag`` ranks by it.
    generator
        What ``random`` draws from, tensor by tensor in the order of ``disagreements``.

    Returns
    -------
    dict
        Bool tensors, true where a weight is to be zeroed. A weight on which the groups agree
        exactly is no evidence of conflict: by default it is kept, and it never counts, whatever
        the rate.

    Raises
    ------
    ParametersError
        If scores are not finite, the rate is out of range, or the score lacks what it ranks by.
    """
    masks = {}
    for name, dis in disagreements.items():
        weight = previous[name]
        conflict = dis * weight.abs()
        mask = top_mask(conflict, top_count(conflict.numel(), rate)) & (conflict > 0)
        if score == "natural":
            mask = torch.zeros_like(mask)
        elif score != "abs":
            ranked_by = _scores(score, name, dis, weight, flagged, generator)
            mask = top_mask(ranked_by, int(mask.count_nonzero()))
        masks[name] = mask
    return masks


def _scores(
    score: Literal["signed", "diff", "malmag", "random"],
    name: str,
    dis: Tensor,
    weight: Tensor,
    flagged: Parameters | None,
    generator: torch.Generator | None,
) -> Tensor:
    match score:
        case "signed":
            return dis * weight
        case "diff":
            return dis
        case "malmag":
            if flagged is None:
                raise ParametersError("the score malmag needs the flagged clients' mean model")
            return flagged[name].abs()
        case "random":
            if generator is None:
                raise ParametersError("the score random needs a generator to draw from")
            return torch.randperm(dis.numel(), generator=generator).reshape(dis.shape)
    assert_never(score)


def prune(model: Parameters, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``model`` with the masked weights set to zero; every other tensor is a copy."""
    return {
        name: tensor.masked_fill(masks[name], 0) if name in masks else tensor.clone()
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


def conflict_percentiles(
    locals_: Mapping[str, Parameters],
    previous: Parameters,
    flagged: Collection[str],
    names: Sequence[str],
) -> dict[str, float]:
    """Return, per flagged client, the share of retained clients with a lower conflict score.

    The score of a model is the sum of ``(w_k - b)^2 |w_prev|`` over the tensors in ``names``, b
    being the plain mean of the retained clients' models. Each retained client is compared to the
    mean of the other retained ones, so that nobody is compared to itself (``methods`` 1.6):
    without its own model the mean of n is ``n / (n - 1)`` times as far from it. A value below
    ``FALSE_POSITIVE_PERCENTILE`` suggests that the client was flagged by mistake. Empty where
    fewer than two clients are retained.
    """
    others = sorted(locals_.keys() - set(flagged))
    if len(others) < 2:
        return {}
    clients = [*others, *sorted(flagged)]
    totals = torch.zeros(len(clients), dtype=torch.float64)
    scratch = torch.empty(len(clients), STRETCH)
    for name in names:
        weights = previous[name].reshape(-1).abs()
        for part, pieces in stretches(name, [locals_[client] for client in clients]):
            models = scratch[:, : part.stop - part.start]
            for row, piece in zip(models, pieces, strict=True):
                row.copy_(piece)
            conflict = models.sub_(models[: len(others)].mean(dim=0)).square_()
            totals += torch.mv(conflict, weights[part])
    scores = dict(zip(clients, totals.tolist(), strict=True))
    farther = (len(others) / (len(others) - 1)) ** 2
    left_out = [farther * scores[client] for client in others]
    return {
        client: sum(score < scores[client] for score in left_out) / len(others)
        for client in sorted(flagged)
    }
