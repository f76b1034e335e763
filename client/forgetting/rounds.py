"""Rounds of training on the rows that remain, each in the manner of a method."""

from client.forgetting.interface import Holding, Outcome
from strategies.actions import Noisy, Rapid, Rcad
from unlearning import noisy_descent, rapid_retraining, rcad
from unlearning.errors import MissingNeedError
from unlearning.parameters import Parameters
from unlearning.randomness import generator


def check_remaining(holding: Holding) -> None:
    """Raise ``MissingNeedError`` where nothing remains to train on: no round is of no rows."""
    if not len(holding.remain[0]):
        raise MissingNeedError("no row of this client remains to train on; do not ask it to train")


def rapid(settings: Rapid, model: Parameters, holding: Holding) -> Outcome:
    """Train with steps scaled by curvature (Rapid Retraining, ``methods`` 2.8).

    What the steps remember begins anew in every round, as an optimizer does.

    Raises
    ------
    MissingNeedError
        If nothing remains to train on.
    """
    check_remaining(holding)
    made, _ = rapid_retraining.train(
        model,
        holding.forward,
        holding.loss,
        *holding.remain,
        epochs=holding.training.local_epochs,
        batch_size=holding.training.batch_size,
        generator=generator(holding.training.seed, "rapid", *holding.purpose),
        settings=rapid_retraining.Settings(
            learning_rate=settings.rapid_rate,
            beta1=settings.beta1,
            beta2=settings.beta2,
            damping=settings.damping,
            block=settings.block,
            fisher=settings.fisher,
        ),
    )
    return Outcome(made)


def noisy_settings(settings: Noisy) -> noisy_descent.Settings:
    """Return the numbers of the method."""
    return noisy_descent.Settings(
        learning_rate=settings.noisy_rate,
        decay=settings.decay,
        clip=settings.clip,
        noise=settings.noise,
    )


def noisy(settings: Noisy, model: Parameters, holding: Holding) -> Outcome:
    """Take steps of noisy descent on all rows that remain (``methods`` 2.15).

    Raises
    ------
    MissingNeedError
        If nothing remains to train on.
    """
    check_remaining(holding)
    made = noisy_descent.train(
        model,
        holding.forward,
        holding.loss,
        *holding.remain,
        steps=settings.steps,
        generator=generator(holding.training.seed, "noisy", *holding.purpose),
        settings=noisy_settings(settings),
        chunk=64,
    )
    return Outcome(made)


def regularised(settings: Rcad, model: Parameters, holding: Holding) -> Outcome:
    """Train with uncertainty on perturbed rows (RCAD, ``methods`` 2.13).

    Raises
    ------
    MissingNeedError
        If nothing remains to train on.
    """
    check_remaining(holding)
    made = rcad.train(
        model,
        holding.forward,
        holding.loss,
        *holding.remain,
        epochs=holding.training.local_epochs,
        learning_rate=holding.training.learning_rate,
        batch_size=holding.training.batch_size,
        generator=generator(holding.training.seed, "rcad", *holding.purpose),
        strength=settings.strength,
        radius=settings.radius,
    )
    return Outcome(made)
