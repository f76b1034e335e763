"""Exact forgetting, from round 0 or from a checkpoint; and natural forgetting."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from strategies import messages
from strategies.actions import Action, Noisy, Rapid, Rcad
from strategies.memory import Memory
from strategies.methods.interface import Method, Situation, Unlearned, done
from unlearning import retraining
from unlearning.errors import MissingNeedError, RefusedRequestError
from unlearning.parameters import Parameters
from unlearning.plan import Answer, Plan
from unlearning.replay import Played

MOST_VOID = 0.2
"""Share of the rounds played again that may make no model."""


class ReplayError(RefusedRequestError):
    """Too few clients answered for a training to count."""


def trained(
    situation: Situation,
    start: Parameters,
    number: int,
    rounds: int,
    step: Action | None,
    played: Played = lambda number, start, answers: None,
) -> Plan[tuple[Parameters, tuple[str, ...]]]:
    """Play rounds among those who stay; return the model and what to be warned of.

    Parameters
    ----------
    start, number
        The model to start from, and the round that made it.
    step
        How clients train; ``None`` for as they always do.
    played
        Told of every round that made a model.

    Raises
    ------
    ReplayError
        If more than ``MOST_VOID`` of the rounds made no model, or the last one.
    """
    void: list[int] = []

    def aggregate(now: int, before: Parameters, answers: Sequence[Answer]) -> Parameters:
        after = situation.aggregate(now, before, answers)
        if after is before:
            void.append(now)
            if len(void) > rounds * MOST_VOID or now == number + rounds:
                raise ReplayError(
                    f"{len(void)} of the first {now - number} of {rounds} rounds made no "
                    "model, too few clients answered: what was trained again is not a whole "
                    "training; it is tried again later"
                )
        else:
            played(now, before, answers)
        return after

    model = yield from retraining.retrain(
        start,
        situation.active,
        rounds,
        first_round=number + 1,
        aggregate=aggregate,
        action=messages.TRAIN if step is None else step.action,
        settings=None if step is None else step.config(),
    )
    return model, (f"rounds without a model: {', '.join(map(str, void))}",) if void else ()


@dataclass(frozen=True, kw_only=True)
class Retrain:
    """Train again without the forgotten clients: exact, and the most expensive.

    Attributes
    ----------
    rollback
        Whether to start from the last model from before they first took part, if there is one,
        instead of round 0 (``methods`` 10.3).
    step
        How clients train; ``None`` for as they always do.
    share
        Rounds in units of those that are undone; fewer where a step learns faster.
    """

    rollback: bool = False
    name: str = "retrain"
    step: Action | None = None
    share: float = 1.0

    def freeze(self, memory: Memory, model: Parameters, clients: Collection[str]) -> None:
        """Keep nothing."""

    def plan(self, situation: Situation) -> Plan[Unlearned]:
        """Replay rounds among the retained clients."""
        number, start = self.origin(situation.memory, situation.holders, situation.remembers)
        rounds = self.rounds(situation.number - number)
        model, warnings = yield from trained(
            situation, start, number, rounds, self.step, situation.played
        )
        told = {"rounds": rounds, "from_round": number}
        return Unlearned(model, settings=told, exact=True, origin=number, warnings=warnings)

    def rounds(self, undone: int) -> int:
        """Return how many rounds are played in place of those that are undone."""
        return math.ceil(self.share * undone)

    def origin(
        self, memory: Memory, clients: Collection[str], remembers: bool
    ) -> tuple[int, Parameters]:
        """Return the round to go back to and its model.

        A strategy that remembers past rounds had its memory from them, and checkpoints are of the
        model alone: such a federation goes back to round 0.
        """
        origin = memory.checkpoint(clients if self.rollback and not remembers else ())
        if origin is None or memory.initial is None:
            raise MissingNeedError(f"{self.name} needs the initial model; it was not remembered")
        return origin if self.rollback and not remembers else (0, memory.initial)


def plays_as_ever(method: Method) -> bool:
    """Say whether a method plays rounds again by the federation's own training and average."""
    return isinstance(method, Retrain) and method.step is None


def rapid(share: float = 0.5, **settings: Any) -> Retrain:
    """Return retraining with steps scaled by curvature, in fewer rounds (``methods`` 2.8)."""
    return Retrain(name="rapid-retraining", step=Rapid(**settings), share=share)


@dataclass(frozen=True, kw_only=True)
class GoOn:
    """Go on from today's model with another kind of training (``methods`` 2.13, 2.15).

    Attributes
    ----------
    step
        How clients train.
    share
        Rounds in units of those played so far.
    """

    name: str
    step: Action
    share: float

    def freeze(self, memory: Memory, model: Parameters, clients: Collection[str]) -> None:
        """Keep nothing."""

    def plan(self, situation: Situation) -> Plan[Unlearned]:
        """Play rounds among those who stay."""
        rounds = math.ceil(self.share * situation.number)
        model, warnings = yield from trained(
            situation, situation.model, situation.number, rounds, self.step
        )
        told = {"rounds": rounds, **self.step.config()}
        return Unlearned(model, settings=told, warnings=warnings)


def noisy(share: float = 0.2, **settings: Any) -> GoOn:
    """Return noisy full-batch descent without what is to be forgotten (``methods`` 2.15)."""
    return GoOn(name="noisy-gd", step=Noisy(**settings), share=share)


def rcad(share: float = 1.0, **settings: Any) -> GoOn:
    """Return fine-tuning with RCAD's regulariser (``methods`` 2.13)."""
    return GoOn(name="rcad", step=Rcad(**settings), share=share)


@dataclass(frozen=True, kw_only=True)
class NaturalForgetting:
    """Go on without the forgotten clients and change nothing else: the null hypothesis."""

    name: str = "natural"

    def freeze(self, memory: Memory, model: Parameters, clients: Collection[str]) -> None:
        """Keep nothing."""

    def plan(self, situation: Situation) -> Plan[Unlearned]:
        """Return the retained clients' aggregate; the recovery rounds are the method."""
        return done(Unlearned(situation.model))
