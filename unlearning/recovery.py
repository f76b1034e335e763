"""How long recovery may take, and when it is over (FedUP, ``methods`` 1.4)."""

import math
from collections.abc import Sequence


def rounds_to_reach(accuracies: Sequence[float], target: float) -> int | None:
    """Return the first round, counted from 1, whose accuracy is at least ``target``.

    Parameters
    ----------
    accuracies
        Accuracy in [0, 1] after rounds 1, 2, ...; NaN never reaches anything.
    """
    for number, accuracy in enumerate(accuracies, start=1):
        if accuracy >= target:
            return number
    return None


def recovery_bound(rounds: int, rate: float) -> int:
    """Return FedUP's budget of recovery rounds, ``max(1, ceil(R* P))``.

    Parameters
    ----------
    rounds
        R*: rounds the original run needed to come within the tolerance of its final accuracy.
    rate
        Pruning rate P in [0, 1].

    Notes
    -----
    arXiv 2508.13853 states this as a bound, but one row of its Table II exceeds it (R* = 75,
    P = 3 %, printed 4 rounds): treat it as a budget and report when it is exceeded.
    """
    return max(1, math.ceil(rounds * rate - 1e-9))
