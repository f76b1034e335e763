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
from unlearning.errors import MissingNeedError, ParametersError
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
        The model in the ball; metrics ``steps``, ``distance`` from w_ref, and ``stopped``, 1 if a
        stop rule ended it.

    Raises
    ------
    MissingNeedError
        If there is a floor, and no test rows or no accuracy to hold it against.
    """
    parts = parted(model)
    if parts.keys() != {"reference", "leaver"}:
        raise ParametersError(
            "an ascent in a ball starts from the models reference and leaver, and got "
            f"{', '.join(sorted(parts)) or 'none'}"
        )
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
        stop=_under(settings.floor, holding) if settings.floor else None,
    )
    return Outcome(
        went.model,
        {
            "steps": len(went.distances),
            "distance": rules.distance(went.model, parts["reference"]),
            "stopped": int(went.stopped),
        },
    )


def _under(floor: float, holding: Holding) -> Stop:
    """Return a stop rule: accuracy on the holder's own test rows is under a floor."""

    def accuracy(model: Parameters) -> float | None:
        if not len(holding.test[0]):
            return None
        outputs = predicted(model, holding, holding.test)
        return accuracy_of(holding.task.metrics(outputs, holding.test[1]))

    def reached(model: Parameters) -> bool:
        found = accuracy(model)
        if found is None:
            raise MissingNeedError(
                "an ascent ends when accuracy on the client's test rows falls under a floor, and "
                "it has no such rows or its task no accuracy; set floor to 0"
            )
        return found < floor

    return reached


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
