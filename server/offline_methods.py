"""Every method on models in files: its settings, and what it makes of a ``Case``.

What is computed is in ``unlearning/``, and what it means in the running federation's
``strategies/methods/``: the same, but that "the model of today" is the average of the others.
"""

import tempfile
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError

from server.offline import Case, check_rounds, check_values
from server.offline_pruning import FedUP, Pruning
from server.offline_settings import (
    Asking,
    Method,
    Names,
    NonNegative,
    Ordered,
    Positive,
    Seed,
)
from server.settings import SettingsError, describe
from strategies.archive import SUFFIX, SavedModel, save_model
from strategies.methods import replay, subtraction
from strategies.methods.interface import Unlearned, done
from unlearning import (
    drift,
    federaser,
    fedrecover,
    negation,
    negative_gradients,
    retraining,
    verifi,
)
from unlearning.catalogue import Need
from unlearning.errors import MissingNeedError
from unlearning.history import clients as clients_of
from unlearning.plan import Plan
from unlearning.randomness import generator


class Drift(Method):
    """Take back part of how they pulled the model away in all rounds (``methods`` 1.9)."""

    strength: NonNegative = drift.STRENGTH
    """Part of the pull that is taken back."""
    memory: Annotated[float, Field(gt=0, le=1)] = 1.0
    """What is left of older pulls from one round to the next."""

    def plan(self, case: Case) -> Plan[Unlearned]:
        """Build the clients' rows of the ledger and subtract them; yields nothing."""
        with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
            rows = self._rows(case, Path(folder))
            retained = case.average(case.others)
            model = drift.subtract(retained, [rows], [case.share], self.strength)
        return done(Unlearned(model, settings=self.told(share=case.share)))

    def _rows(self, case: Case, folder: Path) -> list[SavedModel]:
        """Return S_k of those to be forgotten; on disk, as there may be many."""
        rows: dict[str, SavedModel] = {}
        history = case.recorded()
        for number in history.rounds:
            history.start(number)  # says which round it is
            models = history.models(number)
            weights = {client: model.weight for client, model in models.items()}
            found = drift.updated_rows(rows, models, weights, self.memory, case.forgotten)
            for client, row in found:
                # By number: names that the files of clients have may be too long once quoted.
                path = folder / f"{case.forgotten.index(client)}{SUFFIX}"
                save_model(path, row)
                rows[client] = SavedModel(path)
                del row  # as large as the model, and the next one is not there yet
        return [rows[client] for client in sorted(rows)]


class Negation(Ordered):
    """Negate the first layer (``methods`` 2.3)."""

    layers: Names = ()
    """Tensors to negate; the first layer's weight and bias by default."""

    def plan(self, case: Case) -> Plan[Unlearned]:
        """Negate; yields nothing."""
        names, warnings = self.layers, []
        if not names:
            prunable = self.prunable(case)
            names = negation.first_layer(case.before.schema, prunable)
            warnings = self.doubts(case, prunable, "first")
        model = negation.negate(case.average(case.others), names)
        return done(
            Unlearned(model, settings=self.told(layers=list(names)), warnings=tuple(warnings))
        )


class NegativeGradients(Method):
    """Subtract what they sent (``methods`` 4)."""

    variant: Literal["delta", "loo", "raw"] = "delta"
    """Their updates in all rounds; or their models, out of the last average, or as they are."""
    strength: NonNegative = 1.0
    """gamma: 1 subtracts everything once; ``loo`` has none."""

    def needs(self, name: str) -> frozenset[Need]:
        """Return what must be there."""
        return super().needs(name) if self.variant == "delta" else frozenset()

    def plan(self, case: Case) -> Plan[Unlearned]:
        """Subtract; yields nothing."""
        parts = [case.shares[client] for client in case.forgotten]
        if self.variant == "delta":
            return self._delta(case)
        model = case.average(list(case.locals_))
        if self.variant == "loo":
            model = negative_gradients.leave_one_out(model, case.sent, parts)
        else:
            model = negative_gradients.raw(model, case.sent, parts, self.strength)
        return done(Unlearned(model, settings=self.told(share=case.share)))

    def _delta(self, case: Case) -> Plan[Unlearned]:
        retained, history = case.average(case.others), case.earlier()
        found = self.told(rounds=len(history.rounds))
        if not history.rounds:
            warning = "only the last round is recorded, and the average of the others holds none"
            return done(Unlearned(retained, settings=found, warnings=(f"{warning} of theirs",)))
        gone = frozenset(case.forgotten)
        model = negative_gradients.delta(retained, history, gone, self.strength)
        absent = gone.isdisjoint(clients_of(history))
        warning = "nothing was subtracted: they took part in no round before the last"
        return done(Unlearned(model, settings=found, warnings=(warning,) if absent else ()))


class ScaleToUnlearn(Asking):
    """Scale their last contribution down and the others' up (``methods`` 2.10)."""

    rounds: Annotated[int, Field(ge=1)] = 1
    """Rounds scaled; the last one asks nobody, and those after it ask the others to train."""
    strong: bool = False
    """Whether to take their last contribution back once more."""

    def plan(self, case: Case) -> Plan[Unlearned]:
        """Scale; asks the others in all rounds but the first."""
        model = yield from verifi.scale_to_unlearn(
            case.before,
            case.average(case.others),
            case.sent,
            [case.shares[client] for client in case.forgotten],
            case.retained(),
            first_round=case.number + 1,
            rounds=self.rounds,
            strong=self.strong,
        )
        return Unlearned(model, settings=self.told(share=case.share))


class Natural(Method):
    """Leave them out of the average and change nothing else (``methods`` 2.2)."""

    def plan(self, case: Case) -> Plan[Unlearned]:
        """Average the others; yields nothing."""
        return done(Unlearned(case.average(case.others), settings=self.told()))


class FAST(Method):
    """Subtract round by round while accuracy on the data holds, then repair (``methods`` 2.6)."""

    epochs: Annotated[int, Field(ge=0)] = subtraction.FAST.epochs
    """Passes over the data in the repair."""
    learning_rate: Positive = subtraction.FAST.learning_rate
    batch_size: Annotated[int, Field(ge=1)] = subtraction.FAST.batch_size
    seed: Seed = 0
    """The order of the examples depends on it."""

    def plan(self, case: Case) -> Plan[Unlearned]:
        """Subtract and repair; yields nothing."""
        rounds = case.earlier()
        check_rounds(rounds, case.forgotten)
        method = subtraction.FAST(
            epochs=self.epochs, learning_rate=self.learning_rate, batch_size=self.batch_size
        )
        model, log = method.subtracted(
            case.average(case.others),
            rounds,
            case.forgotten,
            case.laboratory(),
            generator(self.seed, "repair"),
        )
        found = self.told(rounds_subtracted=list(log.accepted), accuracies=list(log.accuracies))
        return done(Unlearned(model, settings=found))


class KD(Method):
    """Subtract every update they sent, then distil what is left of it (``methods`` 2.7)."""

    epochs: Annotated[int, Field(ge=0)] = subtraction.Distillation.epochs
    learning_rate: Positive = subtraction.Distillation.learning_rate
    batch_size: Annotated[int, Field(ge=1)] = subtraction.Distillation.batch_size
    temperature: Positive = subtraction.Distillation.temperature
    seed: Seed = 0
    """The order of the examples depends on it."""

    def plan(self, case: Case) -> Plan[Unlearned]:
        """Subtract and distil; yields nothing."""
        method = subtraction.Distillation(
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            temperature=self.temperature,
            batch_size=self.batch_size,
        )
        model = method.distilled(
            case.average(case.others),
            case.earlier(),
            case.forgotten,
            case.laboratory(),
            generator(self.seed, "distillation"),
        )
        return done(Unlearned(model, settings=self.told()))


class FedEraser(Asking):
    """Replay some rounds, directions corrected by short training (``methods`` 2.4)."""

    interval: Annotated[int, Field(ge=1)] = replay.FedEraser.interval
    """Rounds from one replayed round to the next."""
    ratio: Positive = replay.FedEraser.ratio
    """Share of the usual local epochs that the correction takes."""
    local_epochs: Annotated[int, Field(ge=1)] = replay.FedEraser.local_epochs
    """Epochs of an ordinary round."""

    gap: ClassVar[str] = ""  # it needs a round now and then

    def plan(self, case: Case) -> Plan[Unlearned]:
        """Ask the others, recorded round after recorded round."""
        check_rounds(case.recorded(), case.retained())
        model = yield from federaser.federaser(
            case.recorded(),
            case.forgotten,
            case.retained(),
            interval=self.interval,
            ratio=self.ratio,
            local_epochs=self.local_epochs,
        )
        return Unlearned(model, settings=self.told())


class FedRecover(Asking):
    """Replay all rounds, the others' updates estimated (``methods`` 2.5)."""

    gap: ClassVar[str] = "it is not played again"

    def plan(self, case: Case) -> Plan[Unlearned]:
        """Ask the others in some of the rounds."""
        rounds = case.recorded()
        check_rounds(rounds, case.retained())
        model = yield from fedrecover.fedrecover(rounds, case.forgotten, case.retained())
        return Unlearned(model, settings=self.told(rounds=len(rounds.rounds)))


class Retrain(Asking):
    """Train again from round 0 without them; exact (``methods`` 2.1)."""

    gap: ClassVar[str] = ""  # it needs none but the first

    def plan(self, case: Case) -> Plan[Unlearned]:
        """Ask the others in all rounds."""
        start = case.recorded().start(self.first(case))
        check_values(start)
        first = self.first(case)
        rounds = case.number - first + 1
        model = yield from retraining.retrain(start, case.retained(), rounds, first_round=first)
        settings = self.told(rounds=rounds, from_round=first - 1)
        return Unlearned(model, settings=settings, exact=True)

    def first(self, case: Case) -> int:
        """Return the first round to play again."""
        if case.recorded().rounds[0] != 1:
            raise MissingNeedError(
                f"retraining starts from the model of round 0, and the first round recorded is "
                f"{case.recorded().rounds[0]}; give a history with round-0001"
            )
        return 1


class Rollback(Retrain):
    """Go back to the model from before they took part, and train again; exact (10.3)."""

    def first(self, case: Case) -> int:
        """Return the first round that one of them took part in."""
        rounds = case.recorded()
        if list(rounds.rounds) != list(range(1, case.number + 1)):
            raise MissingNeedError(
                "rollback is exact only if every round is recorded, and some are not; retrain "
                "would work if round 1 is"
            )
        gone = frozenset(case.forgotten)
        # The last round, where it is not recorded, does not show it: more may lie before it.
        if not gone <= clients_of(case.history or rounds):
            raise MissingNeedError(
                "rollback must know when they first took part, and the recorded rounds do not show "
                "it of everybody; retrain would work"
            )
        return next(n for n in rounds.rounds if not gone.isdisjoint(rounds.weights(n)))


METHODS_OF_FILES: dict[str, type[Method]] = {
    "fedup": FedUP,
    "drift": Drift,
    "not": Negation,
    "negative-gradients": NegativeGradients,
    "federaser": FedEraser,
    "fedrecover": FedRecover,
    "fast": FAST,
    "kd": KD,
    "verifi": ScaleToUnlearn,
    "rollback": Rollback,
    "retrain": Retrain,
    "natural": Natural,
    "random": Pruning,
}
"""Every method by the name that it has in ``unlearning.catalogue``."""


def choose(name: str, settings: dict[str, Any]) -> Method:
    """Return a method with its settings.

    Raises
    ------
    SettingsError
        If there is no such method, or it has no such settings; every fault is told.
    """
    if name not in METHODS_OF_FILES:
        raise SettingsError(
            f"there is no method {name!r}; choose one of {', '.join(METHODS_OF_FILES)}"
        )
    kind = METHODS_OF_FILES[name]
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        keys = ", ".join(str(entry.alias) for entry in kind.model_fields.values())
        known = f"its settings are {keys}" if keys else "it has no settings"
        raise SettingsError(f"{name}: {'; '.join(describe(error))}; {known}") from error
