"""Rounds of training on the rows that remain, each in the manner of a method."""

import torch
from torch.utils.data import TensorDataset

from client.forgetting.interface import Holding, Outcome
from client.scratch import scratch_for
from client.train import Penalty, seed_dropout, train
from strategies.actions import Noisy, Rapid, Rcad
from unlearning import noisy_descent, rapid_retraining, rcad
from unlearning.errors import MissingNeedError
from unlearning.parameters import Parameters
from unlearning.randomness import derive_seed, generator


def check_remaining(holding: Holding) -> None:
    """Raise ``MissingNeedError`` where nothing remains to train on: no round is of no rows."""
    if not len(holding.remain[0]):
        raise MissingNeedError("no row of this client remains to train on; do not ask it to train")


def rapid(settings: Rapid, model: Parameters, holding: Holding) -> Outcome:
    """Train with steps scaled by curvature (Rapid Retraining, ``methods`` 2.8).

    In training mode, as ordinary training is: it may begin with the initial model, whose statistics
    are of no data. What the steps remember begins anew in every round, as an optimizer does.

    Raises
    ------
    MissingNeedError
        If nothing remains to train on.
    """
    check_remaining(holding)
    training = holding.training
    with torch.random.fork_rng(devices=[]):
        seed_dropout(holding.device, derive_seed(training.seed, "dropout", *holding.purpose))
        made, _ = rapid_retraining.train(
            model,
            holding.forward,
            holding.loss,
            *holding.remain,
            epochs=training.local_epochs,
            batch_size=training.batch_size,
            generator=generator(training.seed, "rapid", *holding.purpose),
            settings=rapid_retraining.Settings(
                learning_rate=settings.rapid_rate,
                beta1=settings.beta1,
                beta2=settings.beta2,
                damping=settings.damping,
                block=settings.block,
                fisher=settings.fisher,
            ),
            learn=holding.learn,
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

    In evaluation mode: statistics of a batch would tie its rows together, and running ones, which
    stay as they came, would tell of rows without any noise.

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
    """Train as ever, and be unsure of perturbed rows (RCAD, ``methods`` 2.13).

    At a strength of 0 it is an ordinary round, bit for bit.

    Raises
    ------
    MissingNeedError
        If nothing remains to train on.
    """
    check_remaining(holding)
    scratch = scratch_for(holding.task, holding.device)
    scratch.load(model)
    train(
        holding.task,
        scratch.model,
        TensorDataset(*holding.remain),
        holding.training,
        device=holding.device,
        purpose=holding.purpose,
        penalty=unsure(settings, holding),
    )
    return Outcome(scratch.state())


def unsure(settings: Rcad, holding: Holding) -> Penalty | None:
    """Return RCAD's penalty for training at a holder; ``None`` where there is none."""
    forgets = settings.source == "forget"
    if not settings.strength or (forgets and not len(holding.forget[0])):
        return None
    value = rcad.penalty(
        holding.forward,
        holding.loss,
        strength=settings.strength,
        radius=settings.radius,
        forget=holding.forget if forgets else None,
        most=holding.training.batch_size,
        generator=generator(holding.training.seed, "rcad", *holding.purpose),
    )
    return lambda model, inputs, targets: value(model.state_dict(keep_vars=True), inputs, targets)
