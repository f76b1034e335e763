"""What plans that replay a history have in common: where they begin, and who takes part."""

from collections.abc import Callable, Collection, Sequence

from unlearning.errors import MissingNeedError
from unlearning.history import History
from unlearning.parameters import Parameters
from unlearning.plan import Answer

Played = Callable[[int, Parameters, Sequence[Answer]], None]
"""Told of a round that was played again: its number, the model that it started from, and the models
that entered its aggregate, with their weights."""


def beginning(history: History) -> Parameters:
    """Return w^0, the model that round 1 started from.

    A later start is no substitute: it holds what the forgotten clients sent before.

    Raises
    ------
    MissingNeedError
        If round 1 is not recorded.
    """
    if 1 not in history.rounds:
        raise MissingNeedError(
            "a replay begins with the model of round 0, and round 1 was not recorded; "
            "record from the first round on, or retrain"
        )
    return dict(history.start(1))


def staying(
    history: History, forgotten: Collection[str], retained: Collection[str]
) -> frozenset[str]:
    """Return the retained clients that are in the history and not to be forgotten.

    Raises
    ------
    MissingNeedError
        If there are none: the replay would stand still.
    """
    known = {client for number in history.rounds for client in history.weights(number)}
    stay = frozenset(retained) & known - frozenset(forgotten)
    if not stay:
        raise MissingNeedError(
            "nobody is left to replay with: no retained client is in the history; retrain instead"
        )
    return stay


def participants(history: History, number: int, stay: Collection[str]) -> dict[str, float]:
    """Return the weights in a recorded round of those who stay, sorted by client."""
    weights = history.weights(number)
    return {client: weights[client] for client in sorted(weights) if client in stay}
