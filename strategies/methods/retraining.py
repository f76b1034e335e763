"""Exact forgetting, from round 0 or from a checkpoint; and natural forgetting."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from strategies import messages
from strategies.actions import Action, Noisy, Rapid, Rcad, Selection, checked
from strategies.memory import Memory
from strategies.methods.interface import Method, Situation, Unlearned, done
from unlearning import retraining
from unlearning.errors import MissingNeedError, RefusedRequestError, SecateurError
from unlearning.parameters import Parameters
from unlearning.plan import Answer, Plan
from unlearning.replay import Played

MOST_VOID = 0.2
"""Share of the rounds played again that may make no model."""


def check_share(name: str, share: float) -> None:
    """Raise ``SecateurError`` unless a share of rounds is one that can be played."""
    if not 0 < share < math.inf:
        raise SecateurError(f"the share of rounds that {name} plays must be over 0, got {share}")


NO_SOURCE = "no_source: nobody who stays holds what is forgotten, so no rows were perturbed"
ONE_SOURCE = "one_source: only rows of the first of several requests were perturbed"


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

    def __post_init__(self) -> None:
        check_share(self.name, self.share)

    def freeze(self, memory: Memory, model: Parameters, clients: Collection[str]) -> None:
        """Keep nothing."""

    def plan(self, situation: Situation) -> Plan[Unlearned]:
        """Replay rounds among the retained clients."""
        number, start = self.origin(situation.memory, situation.holders, situation.remembers)
        rounds = self.rounds(situation.number - number)
        model, warnings = yield from trained(
            situation, start, number, rounds, self.step, situation.played
        )
        told = {"rounds": rounds, "from_round": number, **(self.step.config() if self.step else {})}
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
    name = "rapid-retraining"
    return Retrain(name=name, step=_step(name, Rapid, settings), share=share)


def _step(name: str, kind: type[Action], settings: Mapping[str, Any]) -> Action:
    return kind(**checked(name, kind, settings, ("share",)))


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

    def __post_init__(self) -> None:
        check_share(self.name, self.share)

    def freeze(self, memory: Memory, model: Parameters, clients: Collection[str]) -> None:
        """Keep nothing."""

    def plan(self, situation: Situation) -> Plan[Unlearned]:
        """Play rounds among those who stay."""
        rounds = math.ceil(self.share * situation.number)
        step, warned = self._about(situation)
        model, warnings = yield from trained(
            situation, situation.model, situation.number, rounds, step
        )
        untold = Selection(forget="none").config()
        own = {key: value for key, value in self.step.config().items() if key not in untold}
        return Unlearned(model, settings={"rounds": rounds, **own}, warnings=warned + warnings)

    def _about(self, situation: Situation) -> tuple[Action, tuple[str, ...]]:
        """Return the step, told what is forgotten if it looks at that, and what to be warned of."""
        if not isinstance(self.step, Rcad) or self.step.source == "remain":
            return self.step, ()
        asked = [entry.selection for entry in situation.pending if entry.selection is not None]
        if not asked:
            return self.step, (NO_SOURCE,)
        step = self.step.model_copy(update=asked[0].rows())
        return step, (ONE_SOURCE,) if len(asked) > 1 else ()


def noisy(share: float = 0.2, **settings: Any) -> GoOn:
    """Return noisy full-batch descent without what is to be forgotten (``methods`` 2.15)."""
    name = "noisy-gd"
    return GoOn(name=name, step=_step(name, Noisy, settings), share=share)


def rcad(share: float = 1.0, **settings: Any) -> GoOn:
    """Return fine-tuning with RCAD's regulariser (``methods`` 2.13)."""
    return GoOn(name="rcad", step=_step("rcad", Rcad, settings), share=share)


@dataclass(frozen=True, kw_only=True)
class NaturalForgetting:
    """Go on without the forgotten clients and change nothing else: the null hypothesis."""

    name: str = "natural"

    def freeze(self, memory: Memory, model: Parameters, clients: Collection[str]) -> None:
        """Keep nothing."""

    def plan(self, situation: Situation) -> Plan[Unlearned]:
        """Return the retained clients' aggregate; the recovery rounds are the method."""
        return done(Unlearned(situation.model))
