"""Gradient ascent on what is to be forgotten: inside a ball, or by partial updates."""

from client.forgetting.holding import classes_of, predicted
from client.forgetting.interface import Holding, Outcome
from client.task.evaluation import accuracy_of
from strategies.actions import Ascend, Ascent, parted
from unlearning import ascent as rules
from unlearning.ascent import (
    accuracy_at_most,
    ascend_in_ball,
    ascend_partially,
    either,
    loss_over,
    most_uncertain_loss,
)
from unlearning.errors import ParametersError
from unlearning.parameters import Parameters
from unlearning.partial_updates import Stop, shares_by_depth
from unlearning.randomness import derive_seed, generator


def ascend(settings: Ascend, model: Parameters, holding: Holding) -> Outcome:
    """Climb the loss of the rows to forget inside a ball (UN, PGA; ``methods`` 2.12).

    Parameters
    ----------
    model
        ``joined(reference=w_ref, leaver=w_k)``.

    Returns
    -------
    Outcome
        The model in the ball; metrics ``steps``, ``distance`` from w_ref, ``stopped``, 1 if a stop
        rule ended it, and ``floor_measured``, 0 if there is no floor, or no
        test rows or accuracy to hold it against.
    """
    parts = parted(model)
    if parts.keys() != {"reference", "leaver"}:
        raise ParametersError(
            "an ascent in a ball starts from the models reference and leaver, and got "
            f"{', '.join(sorted(parts)) or 'none'}"
        )
    floor = _under(settings.floor, parts["leaver"], holding)
    went = ascend_in_ball(
        parts["reference"],
        parts["leaver"],
        holding.forward,
        holding.loss,
        *holding.forget,
        radius=settings.radius,
        batch_size=settings.batch_size,
        generator=generator(holding.training.seed, "ascend", *holding.purpose),
        epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        momentum=settings.momentum,
        longest=settings.longest,
        farthest=settings.farthest,
        stop=floor,
    )
    return Outcome(
        went.model,
        {
            "steps": len(went.distances),
            "distance": rules.distance(went.model, parts["reference"]),
            "stopped": int(went.stopped),
            "floor_measured": int(floor is not None),
        },
    )


def _under(floor: float, start: Parameters, holding: Holding) -> Stop | None:
    """Return a stop rule: accuracy on the holder's own test rows is under a floor.

    ``None`` where nothing can be under it: the floor is 0, or there is no accuracy.
    """

    def accuracy(model: Parameters) -> float | None:
        outputs = predicted(model, holding, holding.test)
        return accuracy_of(holding.task.metrics(outputs, holding.test[1]))

    if not floor or not len(holding.test[0]) or accuracy(start) is None:
        return None
    # A task that has an accuracy of one model, and none of another, is stopped.
    return lambda model: (accuracy(model) or 0.0) < floor


def ascent(settings: Ascent, model: Parameters, holding: Holding) -> Outcome:
    """Step up the loss of the rows to forget, by parts of layers or all of them (6.4).

    Ends once at most the share ``forgotten`` of the rows is recognised, or the loss is over
    2 log C. Without rows the model stays as it is.
    """
    if not len(holding.forget[0]):
        return Outcome(dict(model))
    classes = classes_of(model, holding)
    shares = shares_by_depth(model, settings.first, settings.last) if settings.partial else None
    stop = either(
        accuracy_at_most(holding.forward, *holding.forget, classes, settings.forgotten),
        loss_over(
            holding.forward, holding.loss, *holding.forget, limit=most_uncertain_loss(classes)
        ),
    )
    moved = ascend_partially(
        model,
        holding.forward,
        holding.loss,
        *holding.forget,
        generator=generator(holding.training.seed, "ascent", *holding.purpose),
        shares=shares,
        pattern=settings.pattern,
        seed=derive_seed(holding.training.seed, "selection", *holding.purpose),
        epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        longest=settings.longest,
        stop=stop,
    )
    return Outcome(moved)
