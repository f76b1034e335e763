"""Exact forgetting, from round 0 or from a checkpoint; and natural forgetting."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from strategies.memory import Memory
from strategies.methods.interface import Situation, Unlearned, done
from unlearning import retraining
from unlearning.errors import MissingNeedError, RefusedRequestError
from unlearning.parameters import Parameters
from unlearning.plan import Answer, Plan

MOST_VOID = 0.2
"""Share of the rounds played again that may make no model."""


class ReplayError(RefusedRequestError):
    """Too few clients answered for a training to count."""


@dataclass(frozen=True, kw_only=True)
class Retrain:
    """Train again without the forgotten clients: exact, and the most expensive.

    Attributes
    ----------
    rollback
        Whether to start from the last model from before they first took part, if there is one,
        instead of round 0 (``methods`` 10.3).
    """

    rollback: bool = False
    name: str = "retrain"

    def freeze(self, memory: Memory, model: Parameters, clients: Collection[str]) -> None:
        """Keep nothing."""

    def plan(self, situation: Situation) -> Plan[Unlearned]:
        """Replay rounds among the retained clients."""
        number, start = self.origin(situation.memory, situation.forgotten, situation.remembers)
        rounds = situation.number - number
        void: list[int] = []

        def aggregate(played: int, before: Parameters, answers: Sequence[Answer]) -> Parameters:
            after = situation.aggregate(played, before, answers)
            if after is before:
                void.append(played)
                if len(void) > rounds * MOST_VOID or played == situation.number:
                    raise ReplayError(
                        f"{len(void)} of the first {played - number} of {rounds} rounds made no "
                        "model, too few clients answered: what was trained again is not a whole "
                        "training; it is tried again later"
                    )
            else:
                situation.played(played, before, answers)
            return after

        model = yield from retraining.retrain(
            start, situation.active, rounds, first_round=number + 1, aggregate=aggregate
        )
        warnings = (f"rounds without a model: {', '.join(map(str, void))}",) if void else ()
        told = {"rounds": rounds, "from_round": number}
        return Unlearned(model, settings=told, exact=True, origin=number, warnings=warnings)

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


@dataclass(frozen=True, kw_only=True)
class NaturalForgetting:
    """Go on without the forgotten clients and change nothing else: the null hypothesis."""

    name: str = "natural"

    def freeze(self, memory: Memory, model: Parameters, clients: Collection[str]) -> None:
        """Keep nothing."""

    def plan(self, situation: Situation) -> Plan[Unlearned]:
        """Return the retained clients' aggregate; the recovery rounds are the method."""
        return done(Unlearned(situation.model))
