"""Drift subtraction: take back part of how clients pulled the model away from the others.

A method of this project (``methods`` 1.9). An attacker's influence is what it added over all
rounds, not what the last one shows. So the server keeps one row per client, the sum of its pulls:
in every round, with wbar the average of the participants,

    S_k <- memory S_k + p_k (w_k - wbar)

To forget clients F, of share p_F in the last round, it starts from the average b of the others:

    w' = b - strength / (1 - p_F) sum_{k in F} S_k

and recovery rounds follow. Since ``m - wbar = (1 - p_F) (m - b)``, m being the average of F, a
strength of 1 takes back ``p_F (m - b)`` of every round: to first order, the model had F sent what
the others did. Strength 0 forgets like going on without F.

Buffers have no rows. Those of w' are b's.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import Tensor

from unlearning.errors import ParametersError
from unlearning.parameters import (
    Parameters,
    check_alike,
    check_finite,
    trained_names,
    weighted_mean,
)

STRENGTH, HETEROGENEOUS_STRENGTH = 0.4, 0.3
"""Part of the pull to take back; less where honest clients differ much from one another."""


def updated(
    ledger: Mapping[str, Parameters],
    models: Mapping[str, Parameters],
    weights: Mapping[str, float],
    memory: float = 1.0,
) -> dict[str, Parameters]:
    """Return the ledger after one more round.

    Parameters
    ----------
    ledger
        Client -> row S_k; empty before the first round.
    models
        Participant -> the model w_k that it sent; at least one, all alike.
    weights
        Participant -> its weight in the average, in any unit.
    memory
        What is left of older pulls, in (0, 1]; 0.9 remembers about ten rounds.

    Returns
    -------
    dict
        Client -> row over the trained tensors. The rows of those who sat the round out are the
        ones given.

    Raises
    ------
    ParametersError
        If models differ, weights define no average or ``memory`` is out of range.
    """
    if not 0 < memory <= 1:
        raise ParametersError(f"the ledger's memory must lie in (0, 1], got {memory}")
    if not models or models.keys() != weights.keys():
        raise ParametersError(
            f"models of {sorted(models)} cannot be averaged with weights of {sorted(weights)}"
        )
    clients, total = sorted(models), sum(weights.values())
    rows: dict[str, dict[str, Tensor]] = {client: {} for client in clients}
    for name in trained_names(models[clients[0]]):
        sent = [models[client][name] for client in clients]
        average = weighted_mean([{name: w} for w in sent], [weights[c] for c in clients])[name]
        for client, tensor in zip(clients, sent, strict=True):
            row = (tensor - average).mul_(weights[client] / total)
            if client in ledger:
                row += memory * ledger[client][name]
            rows[client][name] = row
    return {**ledger, **rows}


def updated_rows(
    ledger: Mapping[str, Parameters],
    models: Mapping[str, Parameters],
    weights: Mapping[str, float],
    memory: float,
    clients: Collection[str],
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield some participants and their rows as ``updated`` has them, one after the other.

    For models and ledgers in files: the average and one row are held, however many clients there
    are, and nothing is read of a round in which none of ``clients`` took part. Arguments and errors
    are those of ``updated``.
    """
    if not models or models.keys() != weights.keys():
        raise ParametersError(
            f"models of {sorted(models)} cannot be averaged with weights of {sorted(weights)}"
        )
    if models.keys().isdisjoint(clients):
        return
    everybody, total = sorted(models), sum(weights.values())
    average = weighted_mean([models[c] for c in everybody], [weights[c] for c in everybody])
    for client in everybody:
        if client not in clients:
            continue
        row = {}
        for name in trained_names(average):
            pull = (models[client][name] - average[name]).mul_(weights[client] / total)
            if client in ledger:
                pull += memory * ledger[client][name]
            row[name] = pull
        yield client, row


def subtract(
    retained: Parameters,
    rows: Sequence[Sequence[Parameters]],
    shares: Sequence[float],
    strength: float = STRENGTH,
) -> dict[str, Tensor]:
    """Return ``b - sum_events strength / (1 - p_F) sum_{k in F} S_k``.

    Parameters
    ----------
    retained
        Average b of the others in the last round.
    rows
        Per detection event, the ledger's rows of the clients found in it, as they were then.
    shares
        Per event, these clients' share p_F of that round's weight, in [0, 1).
    strength
        At least 0; linear.

    Raises
    ------
    ParametersError
        If rows do not fit the model, a number is out of range or the result is not finite.
    """
    if not (math.isfinite(strength) and strength >= 0):
        raise ParametersError(f"the strength must be a number of at least 0, got {strength}")
    if len(rows) != len(shares) or not all(0 <= share < 1 for share in shares):
        raise ParametersError(
            f"{len(rows)} events need as many shares in [0, 1), got {list(shares)}"
        )
    result = {name: tensor.clone() for name, tensor in retained.items()}
    trained = {name: result[name] for name in trained_names(result)}
    for event, share in zip(rows, shares, strict=True):
        for row in event:
            check_alike(trained, row)
            for name, tensor in row.items():
                trained[name] -= strength / (1 - share) * tensor
    check_finite(result)
    return result
