"""VeriFi's scale-to-unlearn: leavers' last contribution scaled down, the others' scaled up.

    X. Gao, X. Ma, J. Wang, Y. Sun, B. Li, S. Ji, P. Cheng, J. Chen. "VeriFi: Towards Verifiable
    Federated Unlearning." arXiv:2205.12709, 2022.

Of leavers u with share p_u of the last round's weight, and the others A, for a few rounds:

    w^t = w^(t-1) + s_up sum_{k in A} p_k D_k + s_dn p_u D_u,   s_up = 1 / (1 - p_u),  s_dn = 0

The idea is the paper's; formula and numbers are ours (``methods`` 2.10). In the last round, whose
models are at hand, the shares of A sum to ``1 - p_u`` and the step is that to their average. In
the rounds after it they sum to 1, and the step is ``s_up`` times an ordinary one.

Only the server's part is here; how a leaver marks its data and checks the result is in
``unlearning.verifi_marks``.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from unlearning.errors import ParametersError, SecateurError
from unlearning.parameters import Parameters, check_alike, check_finite, trained_names
from unlearning.plan import Ask, Plan
from unlearning.retraining import Aggregate, federated_average

ROUNDS = 3
"""Rounds for which contributions are scaled."""


def scale_to_unlearn(
    previous: Parameters,
    retained: Parameters,
    sent: Sequence[Parameters],
    shares: Sequence[float],
    clients: Sequence[str],
    *,
    first_round: int,
    rounds: int = ROUNDS,
    strong: bool = False,
    aggregate: Aggregate = federated_average,
) -> Plan[Parameters]:
    """Scale for ``rounds`` rounds and return the last model. The first round asks nobody.

    Parameters
    ----------
    previous
        Model that the last round started from.
    retained
        Average of the other clients in that round, with the federation's own weights.
    sent, shares
        The leavers' models in that round, and their shares of its weight; p_u is their sum and
        lies in [0, 1).
    clients
        Who trains in the later rounds: everybody but the leavers.
    first_round
        Number that the first of the later rounds carries.
    rounds
        At least 1, the last round included.
    strong
        Take the leavers' last contribution back once more, ``s_dn = -1``, in the first round.
    aggregate
        How a round's answers become a model, as in ``retraining.retrain``.

    Raises
    ------
    ParametersError
        If models differ, shares are out of range or a model is not finite.
    """
    if not clients:
        raise SecateurError("nobody is left to train with: every client is to be forgotten")
    total = math.fsum(shares)
    if len(sent) != len(shares) or not (total < 1 and all(share >= 0 for share in shares)):
        raise ParametersError(
            f"{len(sent)} leavers need as many shares that sum to less than 1, got {list(shares)}"
        )
    check_alike(previous, retained, *sent)
    model = {name: tensor.clone() for name, tensor in retained.items()}
    if strong:
        for left, share in zip(sent, shares, strict=True):
            for name in trained_names(model):
                model[name] -= share * (left[name] - previous[name])
    check_finite(model)
    for number in range(first_round, first_round + rounds - 1):
        answers = yield Ask(
            "train", to=tuple(clients), arrays=model, config={"round": number}, mean=True
        )
        model = _scaled(model, aggregate(number, model, answers), 1 / (1 - total))
        check_finite(model)
    return model


def _scaled(start: Parameters, end: Parameters, factor: float) -> dict[str, Tensor]:
    """Return ``start + factor (end - start)`` over the trained tensors; the rest is ``end``'s."""
    trained = set(trained_names(end))
    return {
        name: start[name] + factor * (tensor - start[name]) if name in trained else tensor.clone()
        for name, tensor in end.items()
    }
