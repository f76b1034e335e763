"""Methods in which whoever holds the data changes the model (``methods`` 2.9, 2.12, 6.6).

The holders start from the global model and send back what they made of it; the server takes over as
much of it as they weigh in an average: ``w + sum_k p_k (w'_k - w)``.
"""

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from strategies.actions import (
    Action,
    Amnesiac,
    Ascend,
    Ascent,
    Batches,
    LabelFlip,
    MacForget,
    checked,
    joined,
)
from strategies.memory import LastRound, Memory
from strategies.methods.interface import Situation, Unlearned
from strategies.methods.progress import progress_of
from strategies.screen import Screen
from unlearning import ascent
from unlearning.errors import (
    MissingNeedError,
    NoBatchLogError,
    NoLastRoundError,
    RefusedRequestError,
    SecateurError,
)
from unlearning.parameters import Parameters, check_finite, copied, difference, trained_names
from unlearning.partial_updates import merged
from unlearning.plan import Answer, Ask, Plan


@dataclass(frozen=True, kw_only=True)
class Holders:
    """Let the holders take a step, and take it over.

    Attributes
    ----------
    step
        What they do.
    settings
        Of the step, where they differ from its defaults; checked, and all of them afterwards.
    strength
        What a holder's weight p_k is multiplied by, at least 0. Holders weigh against one another
        only: with 1 their changes add up to one whole change.
    weight_cap
        Largest weight of a holder, in units of their median, at least 1. The screen's own compares
        with all who answer, and who holds nothing weighs as much as its other rows.
    """

    name: str
    step: type[Action]
    settings: Mapping[str, Any] = field(default_factory=dict)
    strength: float = 1.0
    weight_cap: float = Screen.weight_cap

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf:
            raise SecateurError(f"the strength of holders must be at least 0, got {self.strength}")
        settings = checked(self.name, self.step, self.settings, ("strength",))
        object.__setattr__(self, "settings", settings)

    def freeze(self, memory: Memory, model: Parameters, clients: Collection[str]) -> None:
        """Keep nothing."""

    def plan(self, situation: Situation) -> Plan[Unlearned]:
        """Ask the holders, and merge what they made."""
        model = situation.model
        asked = self.step(**situation.selection.rows(), **self.settings)
        answers = yield Ask(
            self.step.action,
            to=situation.holders,
            arrays=model,
            config=asked.config(),
            everybody=True,
            away=True,
        )
        # Holders of other data have nothing to do, and say so by a weight of none of their rows.
        acted = [a for a in answers if a.arrays is not None and a.metrics.get("rows", 1)]
        if not acted:
            raise MissingNeedError(
                f"{self.name} needs that holders answer, and none of {len(situation.holders)} did"
            )
        acted, capped = Screen(weight_cap=self.weight_cap).cap(acted)
        whole = sum(float(answer.num_examples) for answer in acted)
        result = copied(model)
        for answer in acted:
            assert answer.arrays is not None  # noqa: S101  chosen so
            weight = float(answer.num_examples) / whole
            moved = merged(model, answer.arrays, min(1.0, self.strength * weight))
            for name in trained_names(model):
                result[name] += moved[name] - model[name]
        told = {"holders": len(acted), "strength": self.strength, **self.settings}
        progress, warnings = progress_of(self.step, model, acted)
        warnings += tuple(
            f"capped: {client} claims {claimed:g} rows, more than {self.weight_cap:g} times the "
            "holders' median, and counts as that"
            for client, claimed in sorted(capped.items())
        )
        return Unlearned(result, settings=told, progress=progress, warnings=warnings)


def ascending(*, strength: float = 1.0, **settings: Any) -> Holders:
    """Return gradient ascent on what is to be forgotten (``methods`` 6.4)."""
    return Holders(name="ascent", step=Ascent, settings=settings, strength=strength)


def flipping(*, strength: float = 1.0, **settings: Any) -> Holders:
    """Return training on wrong labels (``methods`` 6.3)."""
    return Holders(name="label-flip", step=LabelFlip, settings=settings, strength=strength)


def macforget(*, strength: float = 1.0, **settings: Any) -> Holders:
    """Return MacForget (``methods`` 2.9)."""
    return Holders(name="macforget", step=MacForget, settings=settings, strength=strength)


@dataclass(frozen=True, kw_only=True)
class TakeBack:
    """Subtract what batches with the forgotten rows brought into the model (``methods`` 6.6).

    The holders' answers are ``w - Z_k``; the holder's share of each round is in Z_k already.
    """

    name: str = "amnesiac"

    def freeze(self, memory: Memory, model: Parameters, clients: Collection[str]) -> None:
        """Keep nothing."""

    def plan(self, situation: Situation) -> Plan[Unlearned]:
        """Ask the holders whether they can, then for the model without their batches.

        Their logs lose nothing until all have answered: then the request counts as served, which
        they are told with the last ask, and, should they miss it, with whatever comes later.

        Raises
        ------
        RefusedRequestError
            If it was all taken back before.
        NoBatchLogError
            If a log begins later than its client did.
        ParametersError
            If the result is not finite.
        """
        model, selected = situation.model, situation.selection.rows()
        check = Batches(**selected).config()
        answers = yield Ask(Batches.action, to=situation.holders, config=check, everybody=True)
        holding = [answer for answer in answers if answer.metrics.get("rows", 0) > 0]
        if not holding:
            raise RefusedRequestError(
                f"{self.name}: already removed, or never held: none of {len(answers)} clients has "
                "rows left to take back"
            )
        for answer in holding:
            check_whole(answer, situation.memory)
        asked, request = tuple(answer.client for answer in holding), named(situation)
        answers = yield Ask(
            Amnesiac.action,
            to=asked,
            arrays=model,
            config=Amnesiac(**selected, request=request).config(),
            everybody=True,
        )
        result, batches = copied(model), 0
        trained = trained_names(model)
        for answer in answers:
            for name, moved in difference(answer.arrays or {}, model).items():
                if name in trained:
                    result[name] += moved
            batches += int(answer.metrics.get("batches", 0))
        check_finite(result)
        situation.memory.taken_back += (request,)
        answers = yield Ask(Batches.action, to=asked, config=check)
        left = [answer.client for answer in answers if answer.metrics.get("rows", 0) > 0]
        told = {"batches": batches, "holders": len(asked)}
        warnings = (f"not deleted: {', '.join(left)} can still take back the same",) if left else ()
        return Unlearned(result, settings=told, warnings=warnings)


def named(situation: Situation) -> str:
    """Return what a request is called: the same only for the same rows in the same round."""
    text = repr(sorted(situation.selection.rows().items()))
    return f"{situation.number}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def check_whole(answer: Answer, memory: Memory) -> None:
    """Raise ``NoBatchLogError`` if a client's log does not tell of all rounds that it took part in.

    It may begin later than its client did, or tell of training that did not count, or that the
    model was made of otherwise.
    """
    client, first = answer.client, int(answer.metrics.get("first-round", 0))
    joined_in = memory.first_rounds.get(client)
    if joined_in is not None and first > joined_in:
        raise NoBatchLogError(
            f"the batch log of {client} begins in round {first}, and it took part from "
            f"round {joined_in} on: what came before cannot be taken back; ask for another method"
        )
    if client in memory.unlogged:
        raise NoBatchLogError(
            f"the batch log of {client} is of no use from round {memory.unlogged[client]} on: a "
            "request that trained beside the rounds, or played them again, wrote over it; ask for "
            "another method"
        )


Radius = float | Literal["random", "start"]
"""Of PGA's ball: a number, or what it is measured by."""


@dataclass(frozen=True, kw_only=True)
class Ball:
    """Let the leaving client climb its loss near the others' average (UN, PGA; ``methods`` 2.12).

    Attributes
    ----------
    radius
        Of the ball; ``random`` for the root of a third of the mean squared distance of that average
        from freshly initialised models, or ``start`` for half its distance from the initial model.
    drawn
        Makes the freshly initialised models that ``random`` needs, one at a time.
    settings
        Of the step, where they differ from its defaults; checked, and all of them afterwards.
    """

    name: str = "pga"
    radius: Radius = "random"
    drawn: Callable[[], Iterable[Parameters]] = tuple
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.radius, str) and not 0 <= self.radius < math.inf:
            raise SecateurError(f"the radius of a ball must be at least 0, got {self.radius}")
        settings = checked(self.name, Ascend, self.settings, ("radius",), radius=0.0)
        object.__setattr__(self, "settings", settings)

    def freeze(
        self, memory: Memory, model: Parameters, clients: Collection[str]
    ) -> tuple[LastRound, Parameters, float]:
        """Keep what the client sent last, the others' average beside it, and the radius.

        Raises
        ------
        NoLastRoundError
            If the client's last model was not remembered.
        MissingNeedError
            If there is nothing to measure the radius by.
        """
        last = memory.last
        if last is None or not set(clients) <= last.locals_.keys():
            raise NoLastRoundError(
                f"{self.name} needs the leaving client's model of the last round, which was not "
                "remembered"
            )
        theirs = last.without(last.locals_.keys() - set(clients))
        kept = {client: copied(sent) for client, sent in theirs.locals_.items()}
        evidence = LastRound(last.number, copied(last.previous), kept, theirs.weights)
        return evidence, copied(model), self._radius(memory, model)

    def _radius(self, memory: Memory, reference: Parameters) -> float:
        match self.radius:
            case "random":
                return ascent.random_radius(reference, self.drawn())
            case "start":
                if memory.initial is None:
                    raise MissingNeedError(
                        f"{self.name} with radius = start needs the initial model, which was not "
                        "remembered; make a method ready that needs it, such as retrain, or set "
                        "radius = random"
                    )
                return ascent.start_radius(reference, memory.initial)
        return self.radius

    def plan(self, situation: Situation) -> Plan[Unlearned]:
        """Ask the client once; what it returns is projected again."""
        (client,) = situation.forgotten
        last, reference, radius = situation.evidence[0]
        leaver = last.locals_[client]
        asked = Ascend(**situation.selection.rows(), radius=radius, **self.settings)
        (answer,) = yield Ask(
            Ascend.action,
            to=(client,),
            arrays=joined(reference=reference, leaver=leaver),
            config=asked.config(),
            expects=reference,
            everybody=True,
        )
        assert answer.arrays is not None  # noqa: S101  the screen has looked
        model = ascent.projected_again(answer.arrays, reference, radius)
        told = {"radius": radius, "distance": ascent.distance(model, reference), **self.settings}
        went = {metric: answer.metrics.get(metric, 0) for metric in Ascend.told}
        warnings = _far(reference, leaver, asked.farthest)
        if self.settings["floor"] > 0 and not went["floor_measured"]:
            warnings += (
                f"floor_not_measured: {client} has no test rows or its task no accuracy, so that "
                "no floor held the ascent",
            )
        return Unlearned(model, settings=told, progress=went, warnings=warnings)


def climbing(*, radius: Radius = "random", **settings: Any) -> Ball:
    """Return ascent in a ball (``methods`` 2.12)."""
    return Ball(radius=radius, settings=settings)


def _far(reference: Parameters, leaver: Parameters, farthest: float) -> tuple[str, ...]:
    """Return a warning where an ascent is as far from the client's model as it is to go."""
    apart = ascent.distance(reference, leaver)
    if apart <= farthest:
        return ()
    return (
        f"far_at_first: the others' average is {apart:.3g} from the leaving client's model, and an "
        f"ascent ends farther than {farthest:g} from it: after its first step; set farthest higher",
    )
