"""Plans that train without the forgotten clients: retraining and natural forgetting.

Both are ordinary rounds among the retained clients and differ in where they start, so they share
one generator (``methods`` 2.1 and 2.2):

* **Retrain**, the gold baseline, starts from the model of round 0 and replays every round. It is
  exact: the result is what training would have given had the forgotten clients never taken part.
* **Natural forgetting** starts from today's model and hopes that the rest will overwrite the
  forgotten clients' influence. It is the null hypothesis of every unlearning method.
"""

from collections.abc import Callable, Mapping, Sequence

from unlearning.errors import SecateurError
from unlearning.parameters import Parameters, weighted_mean
from unlearning.plan import Answer, Ask, Plan, Scalar

Aggregate = Callable[[int, Parameters, Sequence[Answer]], Parameters]
"""Round number, model the round started from, answers -> model of the next round."""


def federated_average(number: int, start: Parameters, answers: Sequence[Answer]) -> Parameters:
    """Average the answers by their numbers of examples: FedAvg."""
    del number, start
    return weighted_mean(
        [answer.arrays for answer in answers if answer.arrays is not None],
        [float(answer.num_examples) for answer in answers if answer.arrays is not None],
    )


def retrain(
    start: Parameters,
    clients: Sequence[str],
    rounds: int,
    *,
    first_round: int = 1,
    aggregate: Aggregate = federated_average,
    action: str = "train",
    settings: Mapping[str, Scalar] | None = None,
) -> Plan[Parameters]:
    """Run ``rounds`` rounds of training among ``clients`` and return the last model.

    Parameters
    ----------
    start
        Model that the first round starts from.
    clients
        The retained clients; at least one.
    rounds
        Number of rounds; 0 returns ``start`` itself.
    first_round
        Number that the first round carries. Clients draw their randomness from it, so replaying
        the numbers of the original run replays its draws.
    aggregate
        How a round's answers become a model; the federation's own rule, FedAvg by default.
    action, settings
        What clients do in a round: ordinary training, or ``train.<step>`` with its settings.
    """
    if not clients:
        raise SecateurError("nobody is left to train with: every client is to be forgotten")
    model = start
    for number in range(first_round, first_round + rounds):
        answers = yield Ask(
            action,
            to=tuple(clients),
            arrays=model,
            config={**(settings or {}), "round": number},
            mean=True,
        )
        model = aggregate(number, model, answers)
    return model
