"""Training on what is to be forgotten, with wrong labels."""

from client.forgetting.holding import classes_of
from client.forgetting.interface import Holding, Outcome
from strategies.actions import LabelFlip
from unlearning.ascent import accuracy_at_most
from unlearning.label_flip import train_on_flipped
from unlearning.parameters import Parameters
from unlearning.partial_updates import shares_by_depth
from unlearning.randomness import derive_seed, generator


def flip(settings: LabelFlip, model: Parameters, holding: Holding) -> Outcome:
    """Train on the rows to forget with wrong labels, by parts of layers or all (6.3).

    Ends once at most the share ``forgotten`` of the rows is recognised. Without rows the model
    stays as it is.
    """
    if not len(holding.forget[0]):
        return Outcome(dict(model))
    classes = classes_of(model, holding)
    shares = shares_by_depth(model, settings.first, settings.last) if settings.partial else None
    moved = train_on_flipped(
        model,
        holding.forward,
        holding.loss,
        *holding.forget,
        classes,
        generator=generator(holding.training.seed, "label flip", *holding.purpose),
        shares=shares,
        pattern=settings.pattern,
        seed=derive_seed(holding.training.seed, "selection", *holding.purpose),
        epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        stop=accuracy_at_most(holding.forward, *holding.forget, classes, settings.forgotten),
    )
    return Outcome(moved)
