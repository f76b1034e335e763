"""Methods that subtract what clients sent: negative gradients, and with repair FAST and KD."""

from collections.abc import Collection
from dataclasses import dataclass

from torch import Generator

from strategies.memory import Memory
from strategies.methods.interface import ServerLab, Situation, Unlearned, done, sums
from unlearning import distillation, fast, negative_gradients
from unlearning.errors import MissingNeedError
from unlearning.history import History
from unlearning.parameters import Parameters
from unlearning.plan import Plan
from unlearning.randomness import generator


@dataclass(frozen=True, kw_only=True)
class NegativeGradients:
    """Subtract every update that they sent (``methods`` 4); asks nobody.

    Attributes
    ----------
    strength
        gamma: 1 removes what they added, once.
    """

    strength: float = 1.0
    name: str = "negative-gradients"

    def freeze(self, memory: Memory, model: Parameters, clients: Collection[str]) -> None:
        """Keep nothing: their updates stay in the history until they are forgotten."""

    def plan(self, situation: Situation) -> Plan[Unlearned]:
        """Subtract; yields nothing."""
        model = negative_gradients.delta(
            situation.model,
            history_of(situation, self.name),
            frozenset(situation.forgotten),
            self.strength,
        )
        settings = {"strength": self.strength}
        return done(Unlearned(model, settings=settings, warnings=sums(situation, self.name)))


@dataclass(frozen=True, kw_only=True)
class FAST:
    """Subtract round by round while accuracy on server data holds, then repair (``methods`` 2.6).

    Attributes
    ----------
    learning_rate
        Step size of the repair.
    epochs
        Passes over the server's data in the repair.
    """

    learning_rate: float = 0.01
    epochs: int = 5
    batch_size: int = 32
    name: str = "fast"

    def freeze(self, memory: Memory, model: Parameters, clients: Collection[str]) -> None:
        """Keep nothing."""

    def plan(self, situation: Situation) -> Plan[Unlearned]:
        """Subtract and repair; yields nothing."""
        lab = situation.lab
        if lab is None or lab.root is None:
            raise MissingNeedError("FAST needs labelled server data; set server-examples")
        model, log = self.subtracted(
            situation.model,
            history_of(situation, self.name),
            situation.forgotten,
            lab,
            generator(situation.seed, "repair", situation.number),
        )
        accepted = ", ".join(str(number) for number in log.accepted)
        settings = {"rounds_subtracted": accepted}
        return done(Unlearned(model, settings=settings, warnings=sums(situation, self.name)))

    def subtracted(
        self,
        model: Parameters,
        history: History,
        forgotten: Collection[str],
        lab: ServerLab,
        draw: Generator,
    ) -> tuple[Parameters, fast.Subtractions]:
        """Return the model without what they sent, repaired, and what was done.

        Parameters
        ----------
        lab
            With labelled data.
        draw
            Draws the order of the examples.
        """
        assert lab.root is not None  # noqa: S101  whoever calls has looked
        inputs, targets = lab.root

        def repair(model: Parameters) -> Parameters:
            return distillation.fine_tune(
                model,
                lab.forward,
                lab.loss,
                inputs,
                targets,
                epochs=self.epochs,
                learning_rate=self.learning_rate,
                batch_size=self.batch_size,
                generator=draw,
            )

        return fast.fast(model, history, frozenset(forgotten), lab.accuracy, repair)


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Subtract every update that they sent, then distil the old model (``methods`` 2.7)."""

    epochs: int = 10
    learning_rate: float = 0.01
    temperature: float = 3.0
    batch_size: int = 32
    name: str = "kd"

    def freeze(self, memory: Memory, model: Parameters, clients: Collection[str]) -> None:
        """Keep nothing."""

    def plan(self, situation: Situation) -> Plan[Unlearned]:
        """Subtract and distil; yields nothing."""
        lab = situation.lab
        if lab is None or lab.unlabelled is None:
            raise MissingNeedError("KD unlearning needs server data; set server-examples")
        model = self.distilled(
            situation.model,
            history_of(situation, self.name),
            situation.forgotten,
            lab,
            generator(situation.seed, "distillation", situation.number),
        )
        settings = {"epochs": self.epochs, "temperature": self.temperature}
        return done(Unlearned(model, settings=settings, warnings=sums(situation, self.name)))

    def distilled(
        self,
        model: Parameters,
        history: History,
        forgotten: Collection[str],
        lab: ServerLab,
        draw: Generator,
    ) -> Parameters:
        """Return the model without what they sent, taught by itself; arguments as ``FAST``'s."""
        assert lab.unlabelled is not None  # noqa: S101  whoever calls has looked
        return distillation.kd_unlearn(
            model,
            history,
            frozenset(forgotten),
            lab.forward,
            lab.unlabelled,
            temperature=self.temperature,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            generator=draw,
        )


def history_of(situation: Situation, method: str) -> History:
    """Return the recorded rounds.

    Raises
    ------
    MissingNeedError
        If there are none, or not all.
    """
    history = situation.memory.history
    if history is None:
        why = situation.memory.given_up or "none was recorded"
        raise MissingNeedError(f"{method} needs the history of rounds: {why}")
    return history
